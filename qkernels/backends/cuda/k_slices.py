"""Split-K: how the launchers cut K into slices, which blocks sum separately.

The order of a sum depends on the number of slices. So the number depends on the weight, the GPU and
at most the rows of the whole problem, and not on which rows one launch computes. One exception: the
Hopper kernel cuts only the last wave of a launch, and nothing where rows go in slices (hopper.py).
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=4096)
def count_for(
    steps: int, blocks: int, resident: int, min_steps: int, most: int | None = None
) -> int:
    """Number of slices that K is cut into, so that all blocks of the launch run at once.

    Args:
        steps: steps along K, the unit that K is cut in.
        blocks: blocks of the launch without split-K.
        resident: blocks that the GPU holds at a time.
        min_steps: a slice has at least this many steps, unless K has fewer.
        most: the largest number of slices; None for any.
    """
    count = max(1, min(resident // blocks, steps // min_steps))
    if most is not None:
        count = max(1, min(count, most))
    return -(-steps // steps_of(steps, count))


def steps_of(steps: int, count: int) -> int:
    """Steps of one slice, if `steps` are cut into `count` slices; the last slice may be shorter."""
    return -(-steps // count)
