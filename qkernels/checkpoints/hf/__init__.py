"""Hugging Face model directories: config.json, safetensors, tokenizer.

Reading, in the order of use:
    reader.py           load a model or a tokenizer; start here
    model_config.py     config.json, and the model it describes, without weights
    config_checks.py    limits for the values in config.json
    quantization.py     `quantization_config`: which layer is in which format (written here, too)
    patterns.py         its regular expressions and name lists, matched in bounded time
    names.py            tensor names: transformers' and the files'
    layers.py           linear layers and embeddings from the files' tensors
    expert_layers.py    expert modules from the files' tensors
    plain_weights.py    packed matrices of modules that need a plain weight (routers)
    tying.py            tied weights

Writing:
    writer.py           save a model as a directory
    save_pretrained.py  makes transformers' `save_pretrained` write the same files
"""
