"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs
(sm_90 on).

    kernel before   |======== programs ========| tail |
    this kernel            | set up, fetch W into L2 ..| x is there: the rest |
                           ^ all programs of the one before have begun and said so

Weights depend on no kernel before, so what a program multiplies first is on its way when x comes.
It is fetched into the L2 cache only: should somebody have just written the weight, L2 has what was
written. Everything else, reads and writes, comes after the wait, so kernels of any kind before and
after see each other's results as ever.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """The next kernel may begin as soon as all programs of this one have said so."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Until the kernel before is done and all it wrote is there."""
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
