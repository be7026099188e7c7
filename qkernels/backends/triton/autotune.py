"""Optional tuning on the device: with QKERNELS_AUTOTUNE=1, the first call of a problem times
configurations.

The fastest configuration is kept on disk, in one small JSON file per problem under
$QKERNELS_CACHE/tune (default ~/.cache/qkernels/tune). The file's name is a hash of the GPU, the
versions of torch and triton, the source of our kernels, and the problem with M rounded up to a
power of two. Files are written under a temporary name and renamed, so any number of processes may
tune at once. A file that cannot be read is ignored.

Nothing is tuned at import, under CUDA graph capture, in batch-invariant mode (the order of sums
must not depend on timings) or when the variable is not set.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import configs

if TYPE_CHECKING:
    from ..problem import Problem

#: repetitions of a timed launch, of which the median counts
REPEATS = 20

_tuned: dict[str, configs.GemmConfig | None] = {}
#: host seconds of the first call
_first_calls: dict[tuple[Problem, configs.GemmConfig], float] = {}


def enabled() -> bool:
    """Whether QKERNELS_AUTOTUNE is 1; ValueError unless it is 0, 1 or not set."""
    text = os.environ.get("QKERNELS_AUTOTUNE", "0")
    if text not in ("0", "1"):
        raise ValueError(f"QKERNELS_AUTOTUNE: expected 0 or 1, got {text!r}")
    return text == "1"


def best(
    family: str,
    problem: Problem,
    tabled: configs.GemmConfig,
    launch: Callable[[configs.GemmConfig], Any],
    device: torch.device,
) -> configs.GemmConfig:
    """The configuration to launch now: tuned earlier, tuned by this call, or the table's."""
    if due(family, problem, device):
        return tune(family, problem, tabled, launch, cuda_seconds)
    return tuned(family, problem) or tabled


def due(family: str, problem: Problem, device: torch.device) -> bool:
    """Whether a call has to tune the problem now."""
    return (
        not problem.batch_invariant
        and enabled()
        and tuned(family, problem) is None
        and device.type == "cuda"
        and not torch.cuda.is_current_stream_capturing()
    )


def tuned(family: str, problem: Problem) -> configs.GemmConfig | None:
    """The configuration tuned earlier, by this process or another; None without one.

    None also if tuning is switched off.
    """
    if problem.batch_invariant or not enabled():
        return None
    key = _key(family, problem)
    if _tuned.get(key) is None:
        _tuned[key] = _read(_path(key))
    return _tuned[key]


def tune(
    family: str,
    problem: Problem,
    tabled: configs.GemmConfig,
    launch: Callable[[configs.GemmConfig], Any],
    seconds: Callable[[Callable[[], Any]], float],
) -> configs.GemmConfig:
    """Time every candidate that can run, keep the fastest on disk and return it."""
    times: dict[configs.GemmConfig, float] = {}
    for config in configs.candidates(tabled, problem.m):
        try:
            launch(config)
            times[config] = seconds(lambda c=config: launch(c))  # type: ignore[misc]
        except Exception as error:  # triton has several exceptions for a kernel that does not fit
            if config == tabled:
                raise
            if (
                "out of resource" not in str(error).lower()
                and type(error).__name__ != "OutOfResources"
            ):
                raise
    winner = min(times, key=times.__getitem__)
    key = _key(family, problem)
    _tuned[key] = winner
    _write(
        _path(key), {"key": json.loads(key), "config": winner._asdict(), "seconds": times[winner]}
    )
    return winner


def cuda_seconds(call: Callable[[], Any]) -> float:
    """Median time of a launch. The L2 cache is flushed between launches, as in a model."""
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    samples = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)


# ---------------------------------------------------------------------- first calls, for explain()
def timed_first(problem: Problem, config: configs.GemmConfig, call: Callable[[], Any]) -> Any:
    """`call()`. The host time of the first call of a problem is kept for `explain`."""
    if (problem, config) in _first_calls:
        return call()
    start = time.perf_counter()
    result = call()
    _first_calls[problem, config] = time.perf_counter() - start
    return result


def first_call_words(problem: Problem, config: configs.GemmConfig) -> str:
    """The sentence of `explain` about the first call of a problem."""
    seconds = _first_calls.get((problem, config))
    if seconds is None:
        return (
            "not called yet here: the first call compiles it, seconds unless triton has it on disk"
        )
    return f"the first call took {seconds * 1e3:.0f} ms"


def words(family: str, problem: Problem, tabled: configs.GemmConfig) -> str:
    """The words of `explain` about the configuration of a problem."""
    config, source = tabled, "from the table"
    if problem.batch_invariant:
        source = "batch-invariant"
    elif (tuned_config := tuned(family, problem)) is not None:
        config, source = tuned_config, "tuned on this GPU"
    elif enabled():
        count = sum(1 for _ in configs.candidates(tabled, problem.m))
        source = (
            f"from the table until the first call on a GPU tunes it: {count} candidates, minutes"
        )
    shown = ", ".join(f"{k}={v}" for k, v in config._asdict().items())
    return f"{shown} ({source}); {first_call_words(problem, config)}"


# ---------------------------------------------------------------------- keys and files
def _key(family: str, problem: Problem) -> str:
    """JSON of everything that the fastest configuration may depend on."""
    return json.dumps(
        {
            "family": family,
            "format": problem.format,
            "params": dict(problem.params),
            "shape": problem.shape,
            "m": 1 << max(0, problem.m - 1).bit_length(),
            "dtype": str(problem.dtype),
            **_machine(),
        },
        sort_keys=True,
    )


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    """The part of a key that is the same for all problems: GPU, versions and kernels."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": _kernel_hash(),
    }


def _kernel_hash() -> str:
    """Hash of the source of all Triton kernels, so that a changed kernel is tuned anew."""
    from ... import triton_kernels

    digest = hashlib.sha256()
    for file in sorted(Path(triton_kernels.__path__[0]).glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _path(key: str) -> Path:
    root = Path(os.environ.get("QKERNELS_CACHE") or Path.home() / ".cache" / "qkernels")
    return root / "tune" / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".json")


def _read(path: Path) -> configs.GemmConfig | None:
    """The configuration in a file; None if there is none or it is not valid."""
    try:
        config = json.loads(path.read_text())["config"]
        fields = configs.GemmConfig._field_defaults | config
        if set(fields) != set(configs.GemmConfig._fields):
            return None
        return (
            configs.GemmConfig(**fields)
            if all(isinstance(v, int) for v in fields.values())
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
