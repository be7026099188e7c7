"""The compile jobs: each module has `compile_jobs` for one launcher of the Triton backend."""
