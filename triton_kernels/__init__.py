"""Triton kernels, installed as `qkernels.triton_kernels`. Importing one imports triton."""
