"""Reads GGUF files: packed for the architectures in metadata.py, dequantized for others.

transformers reads the others. Needs the packages `gguf`, `transformers` and `accelerate`
(`pip install qkernels[gguf]`).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...nn.embedding import QuantEmbedding
from ...nn.experts import DOWN, GATE, UP, QuantExperts
from ...nn.linear import QuantLinear
from ..hf.model_config import without_weights
from ..hf.tying import tie
from . import metadata
from .header import GgufHeader, GgufTensor, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "GgufHeader",
    "GgufTensor",
    "is_gguf",
    "load",
    "load_dequantized",
    "load_tokenizer",
    "read_header",
    "save",
]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file named .gguf, or one that begins with GGUF's magic number."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model in a GGUF file, its weights packed as in the file.

    Weights of an architecture that is not in metadata.ARCHITECTURES are dequantized, with a
    warning.
    """
    from . import model as gguf_model

    architecture = metadata.architecture_of(Path(path), read_header(Path(path).resolve()))
    if architecture in metadata.ARCHITECTURES:
        return gguf_model.load_packed(Path(path), device, dtype)
    known = ", ".join(metadata.ARCHITECTURES)
    warnings.warn(
        f"{path}: weights of the architecture {architecture!r} are dequantized to {dtype}; packed: "
        f"{known}",
        stacklevel=2,
    )
    return load_dequantized(path, device, dtype)[0]


def save(model: nn.Module, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write a .gguf file; see writer.py."""
    from . import writer as gguf_writer

    gguf_writer.save(model, path, tokenizer)


def load_dequantized(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a GGUF file, every weight dequantized to `dtype` in nn.Linear.

    Raises FileNotFoundError; ValueError naming file and field for a damaged header, before anything
    big is allocated, and for an architecture that transformers cannot read from GGUF.
    """
    path = Path(path).resolve()
    header = read_header(path)
    architecture = metadata.architecture_of(path, header)
    tokenizer = load_tokenizer(path)  # first, because it is quick and may be invalid
    if architecture in metadata.ARCHITECTURES:
        from . import model as gguf_model

        return _dequantized(gguf_model.load_packed(path, dtype=dtype), dtype).to(device), tokenizer  # type: ignore[arg-type]
    try:
        loaded = _without_mark(_from_pretrained(path, dtype), path)
    except MemoryError:
        raise
    except Exception as error:  # transformers may fail on a bad file in any way
        raise ValueError(
            f"{path}: expected an architecture transformers reads from GGUF, got {architecture!r}: "
            f"{error!r:.300}"
        ) from error
    return loaded.to(device).eval(), tokenizer  # type: ignore[arg-type]


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer in a GGUF file's metadata. ValueError if it is missing or invalid."""
    from . import tokenizer as gguf_tokenizer

    path = Path(path).resolve()
    tokenizer = gguf_tokenizer.load(path)
    # The file has tokenizer entries that transformers drops; tokenizer.write copies them from it.
    tokenizer.gguf_file = str(path)
    return tokenizer


def _dequantized(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with nn.Linear and nn.Embedding in place of packed layers.

    A head that shares the embedding's bytes stays tied.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    tied = weight is not None and weight is getattr(head, "weight", None)
    if isinstance(head, QuantLinear) and isinstance(embedding, QuantEmbedding):
        tied = head.qweight.data_ptr() == next(iter(embedding.packed.tensors.values())).data_ptr()
    stacks = [name for name, module in model.named_modules() if isinstance(module, QuantExperts)]
    unpacked_model = without_weights(model) if stacks else None
    for name, module in list(model.named_modules()):
        plain: nn.Module
        if isinstance(module, QuantEmbedding):
            rows = nn.Parameter(module.packed.dequantize(dtype))
            plain = nn.Embedding(*rows.shape, device="meta")
            plain.weight = rows
        elif isinstance(module, QuantLinear) and not (tied and module is head):
            weight = nn.Parameter(module.packed.dequantize(dtype))
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            plain.weight = weight
            plain.bias = (
                None if module.bias is None else nn.Parameter(module.bias.detach().to(dtype))
            )
        elif isinstance(module, QuantExperts):
            assert unpacked_model is not None
            plain = _plain_experts(module, unpacked_model.get_submodule(name), dtype)
        else:
            continue
        model.set_submodule(name, plain.eval())
    if tied:
        shared = model.get_input_embeddings().weight
        plain = nn.Linear(shared.shape[1], shared.shape[0], bias=False, device="meta").eval()
        plain.weight = shared
        model.set_output_embeddings(plain)
    model.config.tie_word_embeddings = tied
    return model.requires_grad_(True)  # type: ignore[no-any-return]


def _plain_experts(stack: QuantExperts, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """transformers' experts module `module`, filled with the dequantized weights."""
    experts = [stack.parts.expert(e) for e in range(stack.parts.count)]
    gate_up = [
        torch.cat([expert[role].dequantize(dtype) for role in (GATE, UP)]) for expert in experts
    ]
    module.gate_up_proj = nn.Parameter(torch.stack(gate_up))
    module.down_proj = nn.Parameter(
        torch.stack([expert[DOWN].dequantize(dtype) for expert in experts])
    )
    return module


def _from_pretrained(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers reads it from a GGUF file, dequantized."""
    import transformers
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    # Since 5.23 transformers can keep GGUF blocks packed and must be told not to.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=dtype, local_files_only=True, **options
    )


def _without_mark(loaded: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The loaded model without its mark as quantized; `path` is its file.

    transformers marks what it loads from GGUF, dequantized or not, and then refuses to save it.
    """
    import copy

    from accelerate import init_empty_weights

    config = copy.deepcopy(loaded.config)
    for field in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, field):
            delattr(config, field)
    with init_empty_weights(include_buffers=False):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    tie(model, path)
    model.generation_config = loaded.generation_config
    return model
