"""A Llama small enough for unit tests, and a tokenizer for it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128


def tiny_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """2 layers, hidden 64, feed-forward 96: with random weights, in eval mode, on the CPU."""
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than transformers' 0.02, so that the layers matter to the logits.
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3 if "embed" in name else 0.2)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(VOCABULARY)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token=chr(0))


def save_tiny(path: Path, **changes: object) -> LlamaForCausalLM:
    """Save a tiny model with its tokenizer as a Hugging Face directory; returns the model."""
    from qkernels.checkpoints.hf import reader as huggingface

    model = tiny_model(**changes)
    huggingface.save(model, path, tokenizer=tiny_tokenizer())
    return model


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
