"""qkernels inside other libraries.

    transformers.py      quantize or run quantized checkpoints in `from_pretrained`
    peft.py              LoRA adapters on packed layers
    tensor_parallel.py   tensor parallelism with torch.distributed alone
    vllm/                vLLM serves our formats

Each module needs its library, so import it by name; this package imports none of them.
"""
