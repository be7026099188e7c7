"""The decorator of launched kernels, and the compiler options that it sets."""

from collections.abc import Callable
from typing import Any

import triton

#: Multiplications fuse with additions. Each launch says so, because triton 3.10 no longer does it
#: by default and triton 3.9 warns if a launch says nothing. A kernel that must not fuse rounds with
#: explicit instructions.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def kernel(fn: Callable[..., Any]) -> Any:
    """@triton.jit, with OPTIONS at each launch that gives no other values."""
    jit_function = triton.jit(fn)
    run = jit_function.run

    def with_options(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **{**OPTIONS, **kwargs})

    jit_function.run = with_options
    return jit_function
