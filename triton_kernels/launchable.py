"""The decorator of kernels that are launched, and what they want of the compiler."""

from collections.abc import Callable
from typing import Any

import triton

#: Multiplications fuse with additions. Said at each launch, for triton 3.10 will do so no more by
#: itself, and
#: triton 3.9 warns whoever does not say. Where it would do harm a kernel rounds by instructions of
#: its own.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def kernel(fn: Callable[..., Any]) -> Any:
    """@triton.jit, with OPTIONS at each launch that does not say otherwise."""
    made = triton.jit(fn)
    run = made.run

    def with_options(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **{**OPTIONS, **kwargs})

    made.run = with_options
    return made
