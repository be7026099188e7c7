"""The process that prepares and times products, so that a hung kernel blocks no other process.

    python -m bench.worker FD

reads a `Job` from stdin as JSON and writes events to the file descriptor FD, one JSON object a
line. `supervisor` starts it, reads the events, and starts another when this one has ended.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qkernels.benchmark import race, shapes, timing

from . import peers

#: (number of the contestant, N, K, values of M)
Case = tuple[int, int, int, list[int]]
#: exit code of a worker whose CUDA context or torch state is unusable
SPOILT = 70


@dataclass
class Job:
    """What a worker has to do.

    suite, backend, with_peers, tiny: the contestants, as on the command line. cases: in order.
    dense: "N,K,M" -> microseconds of the dense product. warm: compile only, time nothing. copy:
    measure the copy bandwidth first.
    """

    suite: str
    backend: str
    with_peers: str
    tiny: bool
    device: str
    repeats: int
    cases: list[Case]
    dense: dict[str, float]
    warm: bool = False
    copy: bool = False


def contestants(suite: str, backend: str, with_peers: str, tiny: bool) -> list[race.Contestant]:
    """The dense product, our kernels, and the peers that have a format of ours to race.

    Every process gets the same list in the same order, so a contestant's number names it.
    """
    group = {"group_size": 64} if tiny else {}
    ours = [
        race.Ours(name, {**params, **{k: v for k, v in group.items() if k in params}}, chosen)
        for name, params in shapes.formats_of(suite)
        for chosen in backend.split(",")
    ]
    others = (
        []
        if with_peers == "none"
        else peers.contestants(None if with_peers == "all" else with_peers.split(","))
    )
    groups = {one.group for one in [*ours, *others] if one.name.startswith("qkernels")}
    return [race.Dense(), *ours, *(peer for peer in others if tiny or peer.group in groups)]


def work(job: Job, say: Any) -> int:
    """Do all cases and `say` each event. Returns the exit code of the process."""
    field = contestants(job.suite, job.backend, job.with_peers, job.tiny)
    settings = race.Settings(job.device, job.repeats)
    dense: dict[tuple[int, int, int], float] = {}
    for place, value in job.dense.items():
        n, k, m = map(int, place.split(","))
        dense[n, k, m] = value
    if job.copy:
        say({"copy": timing.copy_bandwidth(job.device)})
    for number, n, k, rows in job.cases:
        contestant = field[number]
        say({"begin": [number, n, k]})
        if job.warm:
            try:
                race.warm(contestant, (n, k), rows, settings)
            except Exception as error:
                print(
                    f"{contestant.name} {n}x{k}: {type(error).__name__}: {error}"[:500],
                    file=sys.stderr,
                )
                if spoilt(job.device):
                    return SPOILT
            continue
        captured = contestant.graphs
        for row in race.case(contestant, (n, k), rows, settings, dense):
            say({"row": asdict(row)})
            if row.failed and spoilt(job.device):
                return SPOILT
        if captured and not contestant.graphs:
            # a capture that failed may leave torch's allocator and generators in capture mode
            return SPOILT
    return 0


def spoilt(device: str) -> bool:
    """Whether the GPU is unusable for this process: after an illegal access every call fails."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(8, device=device) + 1).sum().item() != 16)
    except Exception:
        return True


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as pipe:
        job = Job(**json.load(sys.stdin))
        ended = work(job, lambda event: pipe.write(json.dumps(event) + "\n"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # at a normal exit a spoilt context prints errors that are known already


if __name__ == "__main__":
    main()
