"""Times fused products against torch's matmul and their roofline.

`qkernels bench` uses it, and `python -m bench`, which adds the kernels of other packages.

    race.py     times every contestant on the same weights and inputs, and reports
    timing.py   the timing loops: CUDA graphs, a cold L2 cache
    shapes.py   shapes of known models, numbers of rows, suites of formats
"""
