"""Benchmarks. `python -m bench --help`; `bench/gpu_run.sh OUT` runs everything on a GPU machine."""
