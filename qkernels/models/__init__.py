"""Whole models: quantize, load, save, convert, fuse and evaluate them.

quantize.py        quantize_model, load_model, save_model, model_summary
candidates.py      which linear layers quantize_model replaces, and which it must not
weight_readers.py  finds layers whose weight the model's code reads without calling the layer
convert.py         from one storage format to another, exactly where that is possible
fuse.py            fuse_norms: norms and gated feed-forwards fused with their 8-bit layers
evaluate.py        perplexity, and the divergence from another model
"""
