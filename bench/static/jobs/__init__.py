"""What is compiled ahead of time: a module for each launcher of the Triton backend, `compile_jobs`
in each.
"""
