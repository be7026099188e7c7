"""How a product runs: which kernel is chosen, and what it allocates and launches.

    problem.py      Problem: the product that a kernel is chosen for (format, shape, M, dtype, ...)
    registry.py     the kernels in order of preference, and the choice
    measured.py     which language measured faster, for the choice
    explain.py      the choice in words
    plan.py         a product's scratch memory and launches, declared once
    workspace.py    scratch memory
    device.py       facts about the GPU
    eight_bit.py    shared by both languages' launchers of the 8-bit family
    roofline.py     the least time a GPU could take
    reference.py    the kernels in plain torch
    triton/ cuda/   the launchers of the fused kernels, one folder a language

Importing this package registers all kernels, the most preferred first.
"""

from . import cuda, reference, triton

triton.register_kernels()
cuda.register_kernels()
reference.register_kernels()
