"""Static analysis of the Triton kernels, without a GPU: see `python -m bench.static --help`."""
