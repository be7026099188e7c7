"""Fifteen minutes with a GPU: what is run (`plan`), how (`python -m bench.gpu`), and what is
carried there (`parcel`).
"""
