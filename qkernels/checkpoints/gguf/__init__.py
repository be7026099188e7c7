"""GGUF files, as llama.cpp reads and writes them.

reader.py     load a model or a tokenizer; start here
header.py     the header, checked strictly
metadata.py   the metadata as a transformers config
model.py      the model with packed weights
tokenizer.py  tokenizers, read and written
writer.py     save a model as a file
"""
