"""The process that prepares and times, so that a kernel that crashes or hangs takes nothing else
along.

python -m bench.worker FD: reads a `Job` from stdin as JSON and writes events to the file descriptor
FD, one JSON object a line. `supervisor` starts it, listens, and starts another when this one is
gone.
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

#: (number of the contestant, N, K, numbers of rows)
Case = tuple[int, int, int, list[int]]
#: what the process ends with when the GPU's context or torch's state is no good any more
SPOILT = 70


@dataclass
class Job:
    """suite, backend, with_peers, tiny: who races, as the command line has it. cases: what is to be
    done, in order. dense: "N,K,M" -> microseconds of the dense product. warm: compile only, time
    nothing. copy: measure the copy bandwidth first."""

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
    """The dense product, ours, and the peers that race one of ours; in every process the same, in
    order.
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
    """Do all cases and `say` what comes out. Returns what the process ends with."""
    found = contestants(job.suite, job.backend, job.with_peers, job.tiny)
    settings = race.Settings(job.device, job.repeats)
    dense: dict[tuple[int, int, int], float] = {}
    for place, value in job.dense.items():
        n, k, m = map(int, place.split(","))
        dense[n, k, m] = value
    if job.copy:
        say({"copy": timing.copy_bandwidth(job.device)})
    for number, n, k, rows in job.cases:
        contestant = found[number]
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
            return SPOILT  # a capture that failed may leave torch's allocator and generators in it
    return 0


def spoilt(device: str) -> bool:
    """Whether nothing can be run on the GPU any more: an illegal access fails every later call,
    too.
    """
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
    os._exit(ended)  # a spoilt context would only print what is known


if __name__ == "__main__":
    main()
