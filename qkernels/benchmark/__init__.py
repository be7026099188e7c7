"""Times fused products against torch's and their roofline: `qkernels bench`, and `python -m bench`
with peers.
"""
