"""Benchmarks. `python -m bench --help` races; README.md says how to spend time on a GPU."""
