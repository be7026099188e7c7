"""How a product runs: which kernel is chosen, what it allocates and launches, one folder a
language.

    problem.py      what kernels are chosen by: format, shape, M, dtype, device
    registry.py     the kernels in order of preference, and the choice
    explain.py      the choice in words                  measured.py   which language measured faster
    reference.py    plain torch                          roofline.py   the least time a GPU could take
    plan.py         what a product allocates and launches, recorded once and replayed
    workspace.py    scratch memory                       triton/ cuda/ launchers of the fused kernels

Importing this package registers all kernels, the most preferred first.
"""

from . import cuda, reference, triton

triton.register_kernels()
cuda.register_kernels()
reference.register_kernels()
