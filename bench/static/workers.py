"""Compile many jobs in worker processes, each with a clean environment."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .facts import Facts, facts_of, jobs

#: (family, architecture, number of the job). A job holds functions, which cannot be sent to a
#: worker, so each worker makes the jobs itself.
Task = tuple[str, int, int]


def start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


@lru_cache(maxsize=32)
def listed(family: str, arch: int, subset: bool) -> list[Any]:
    return jobs(family, arch, subset)


def _work(task: Task, subset: bool, keep: Path | None) -> Facts:
    family, arch, number = task
    return facts_of(family, listed(family, arch, subset)[number], keep)


def compile_all(
    tasks: list[Task], subset: bool, workers: int, keep: Path | None, cache: Path | None = None
) -> list[Facts]:
    """Facts of all tasks, in their order. Workers are new processes.

    cache: folder of triton's cache of compiled kernels, whose keys are the kernels' sources, the
    compiler and its options. None: an empty folder.
    """
    progress = Progress(
        TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    facts: dict[Task, Facts] = {}
    with tempfile.TemporaryDirectory() as empty, progress:
        os.environ["TRITON_CACHE_DIR"] = str(cache or empty)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
            waiting = {pool.submit(_work, task, subset, keep): task for task in tasks}
            for done in progress.track(as_completed(waiting), total=len(tasks)):
                facts[waiting[done]] = done.result()
    return [facts[task] for task in tasks]
