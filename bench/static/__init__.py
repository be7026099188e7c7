"""What can be told of the Triton kernels without a GPU: see `python -m bench.static --help`."""
