"""Benchmarks. `python -m bench` races kernels; README.md lists the other commands."""
