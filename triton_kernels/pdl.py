"""Programmatic dependent launch (PDL): a kernel starts while the kernel before it on the stream
still runs. From sm_90 on.

    kernel before   |======== programs ========| tail |
    this kernel            | set up, fetch W into L2 ..| x is there: the rest |
                           ^ all programs of the one before have begun and said so

Weights depend on no earlier kernel, so a program fetches its first tiles of W while x is still
being computed. It fetches them into the L2 cache only: if a kernel has just written the weight, L2
has the new bytes. All other reads and writes come after the wait, so kernels of any kind before and
after see each other's results as they do without PDL.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Allow the next kernel to start, once every program of this kernel has called this."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before is done and everything it wrote is visible."""
    if PDL:
        gdc_wait()


@triton.jit
def fetch(pointers):
    """Bring the 128 bytes around each pointer into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
