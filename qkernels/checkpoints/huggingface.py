"""Hugging Face model directories: config.json with `quantization_config`, safetensors, tokenizer.

Tensor names and config fields are the ecosystem's own; each Format knows its own fields
(`to_hf_config`, `from_hf_config`) and names (`specs`). Nothing is downloaded; no pickle and no code from
a directory is ever run. Needs `transformers` and `accelerate` (`pip install qkernels[hf]`).
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import formats
from ..embedding import QuantEmbedding
from ..linear import QuantLinear
from ..packed import pack
from . import directories, quantization, tensor_files
from .quantization import Plan, Scheme
from .tensor_files import TensorFiles, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
QUANTIZATION = "quantization_config"
#: without these in config.json a config class would silently take its own model's sizes
_SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads",
    "num_key_value_heads", "num_experts", "num_local_experts",
)  # fmt: skip
_REQUIRED_FIELDS = ("hidden_size", "num_hidden_layers", "vocab_size")
#: where AutoGPTQ and AutoAWQ kept their config before config.json had a place for it
_OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
#: scales of a quantized key-value cache; ours holds 16 bits
_CACHE_SCALE = re.compile(r"\.([qkv]_scale|[qkv]_zero_point|kv_scale)$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


# ---------------------------------------------------------------------- save
def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `model` (and `tokenizer`, if given) as the directory `path`.

    All is written to a directory beside `path` that takes its name at the end, so `path` never holds
    half a model. An earlier save there is replaced. Weights above `max_shard_bytes` are sharded.

    Raises ValueError if the quantized layers differ in a way no `quantization_config` can say, or if `path` is a file or holds something that is no saved model.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}")
    _check_kinds(model)
    quantization, packed = _quantization_config(model)
    config = _plain_config(model, packed)
    target = directories.check_target(Path(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.saving-") as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        tensor_files.write(_stored_tensors(model, packed), fresh, max_shard_bytes)
        config.save_pretrained(fresh)
        if quantization is not None:
            directories.write_json(fresh / CONFIG, {**read_json(fresh / CONFIG), QUANTIZATION: quantization})
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            model.generation_config.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        directories.swap_in(fresh, target)


def _check_kinds(model: nn.Module) -> None:
    """ValueError for a module whose tensors `_stored_tensors` cannot know: they would be lost."""
    usual = nn.Module._save_to_state_dict
    for name, module in model.named_modules():
        own = type(module)._save_to_state_dict is not usual
        if own and not isinstance(module, (QuantLinear, QuantEmbedding)):
            raise ValueError(
                f"{name}: expected no module that keeps its tensors in a way of its own, got {type(module).__name__}"
            )


def _plain_config(model: PreTrainedModel, packed: bool) -> Any:
    config = copy.deepcopy(model.config)
    for mark in (QUANTIZATION, "_pre_quantization_dtype"):
        if hasattr(config, mark):
            delattr(config, mark)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
    if shared or _stored_head(model, packed) is not None:
        config.tie_word_embeddings = True  # the tensor is stored once
    elif isinstance(head, QuantLinear):
        config.tie_word_embeddings = False
    return config


def _quantization_config(model: PreTrainedModel) -> tuple[dict[str, Any] | None, bool]:
    """(`quantization_config` or None, whether it speaks of embeddings, which then stay packed).

    Only our own config can say that an embedding is packed. Beside linears of another method it is
    written dequantized, in the dtype it computes in, so that the model stays the same function.
    """
    layers = {n: m.packed for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    embeddings = {n: m.packed for n, m in model.named_modules() if isinstance(m, QuantEmbedding)}
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if any(not formats.get(packed.format).dense for packed in embeddings.values()):
        tied = _tied_head(model)
        others = {name: packed for name, packed in layers.items() if name != tied}
        try:
            config = quantization.describe({**embeddings, **others}, plain)
        except ValueError:
            config = None
        if config is not None and config["quant_method"] == quantization.OWN:
            return config, True
    return quantization.describe(layers, plain), False


def _tied_head(model: PreTrainedModel) -> str | None:
    """Name of a QuantLinear output projection that holds the same bytes as the QuantEmbedding, or None."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, QuantLinear) or not isinstance(embedding, QuantEmbedding):
        return None
    ours, theirs = head.packed, embedding.packed
    if head.bias is not None or (ours.format, ours.shape, ours.params) != (
        theirs.format, theirs.shape, theirs.params
    ):  # fmt: skip
        return None
    pairs = [(tensor, theirs.tensors[name]) for name, tensor in ours.tensors.items()]
    if not all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in pairs):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _stored_head(model: PreTrainedModel, packed: bool) -> str | None:
    """Name of a tied head of which the file holds only the embedding's tensors, or None.

    A dequantized embedding is no packed head's weight, unless it is 16 bits wide in the first place.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, QuantEmbedding):
        return None
    fmt = formats.get(embedding.packed.format)
    same = fmt.dense and embedding.packed.tensors["weight"].dtype == embedding.dtype
    return _tied_head(model) if packed or same else None


def _stored_tensors(model: PreTrainedModel, packed: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that belongs in the file, a tied tensor under its first name only.

    packed: embeddings stay so. Layer by layer, so that the checkpoint's form of a prepacked weight exists
    for one layer at a time.
    """
    seen: set[tuple[Any, ...]] = set()
    tied = _stored_head(model, packed)
    for prefix, module in model.named_modules():
        if prefix == tied:
            continue
        own: dict[str, Tensor]
        if isinstance(module, QuantEmbedding):
            stays = packed and not formats.get(module.packed.format).dense
            own = dict(module.packed.tensors) if stays else {"weight": module.packed.dequantize(module.dtype)}
        elif isinstance(module, QuantLinear):
            own = dict(module.packed.tensors)
            if module.bias is not None:
                own["bias"] = module.bias
        elif _inside_quantized(model, prefix):
            continue
        else:
            own = {k: v for k, v in module._parameters.items() if v is not None}
            buffers = module._buffers.items()
            own |= {k: v for k, v in buffers if v is not None and k not in module._non_persistent_buffers_set}
        for name, tensor in own.items():
            if tensor.numel():
                key = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
                if key in seen and not isinstance(module, (QuantLinear, QuantEmbedding)):
                    continue
                seen.add(key)
            yield (f"{prefix}.{name}" if prefix else name), tensor


def _inside_quantized(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return bool(parent) and isinstance(model.get_submodule(parent), QuantLinear)


# ---------------------------------------------------------------------- load
def load(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model in directory `path`, on `device`, in eval mode.

    Layers whose packed tensors are in the files become QuantLinear and keep their bytes; everything else
    is a plain module, in `dtype` if given and in the file's otherwise. Tensors are mapped and moved one
    at a time, so peak memory is the model and one tensor.

    Raises FileNotFoundError or ValueError that names the file, the field or tensor, expected and found.
    """
    directory = _model_directory(path)
    with TensorFiles(directory) as files:
        model, plan = skeleton(directory, files)
        owned = owned_tensors(model, files)
        place = {full: prefix for prefix, names in owned.items() for full in names.values()}
        around = _embedding_dtype(model, files)
        used: set[str] = set()
        for name in files.infos:  # file by file: of a sharded checkpoint one shard is mapped at a time
            if name in used:
                continue
            prefix = place.get(name)
            scheme = None
            if prefix is not None:
                scheme = scheme_of(prefix, owned[prefix], files, plan)
                linear = isinstance(model.get_submodule(prefix), nn.Linear)
                if scheme is None and dtype is None and linear:
                    scheme = _mixed_dense(owned[prefix], files, around)
            if prefix is not None and scheme is not None:
                layer = quantized_layer(directory, model, prefix, owned[prefix], files, scheme, device, dtype)
                parent, _, leaf = prefix.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer)
                used |= set(owned[prefix].values())
            elif _assign(model, name, files, device, dtype):
                used.add(name)
    embedding = model.get_input_embeddings()
    if isinstance(embedding, QuantEmbedding) and model.config.tie_word_embeddings:
        model.set_output_embeddings(QuantLinear(embedding.packed))
    if isinstance(model.get_output_embeddings(), QuantLinear):
        model.config.tie_word_embeddings = False  # it has its own weight: nothing left to tie
    model.tie_weights()
    _check_complete(directory, model, [n for n in files.infos if n not in used], plan)
    generation = directory / GENERATION_CONFIG
    if generation.is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(read_json(generation))
    return model.to(device).eval()  # type: ignore[arg-type]


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer saved in a model directory. ValueError if there is none."""
    directory = _model_directory(path)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"{directory}: expected tokenizer files ({_TOKENIZER_FILES[0]}, ...), found none")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def _model_directory(path: str | os.PathLike[str]) -> Path:
    directory = Path(path)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: expected a model directory, found nothing")
    if not directory.is_dir():
        raise ValueError(f"{directory}: expected a model directory or a .gguf file, got another file")
    return directory


def skeleton(directory: Path, files: TensorFiles) -> tuple[PreTrainedModel, Plan]:
    """(model on the meta device with plain linears, what is quantized) as config.json describes it.

    Raises ValueError for sizes that the tensors in `files` cannot have, before anything is made that big.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config, quantized = read_config(directory)
    where = f"{directory / CONFIG}"
    plan = Plan(where, quantized)
    _check_sizes(where, config, files)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config can break a model class in any way
        raise ValueError(f"{where}: expected a causal language model's config, got {error!r:.300}") from error
    return model, plan


def _check_sizes(where: str, config: Any, files: TensorFiles) -> None:
    """ValueError for more layers than tensors, or a size above the number of weights there can be."""
    weights = 8 * sum(info.nbytes for info in files.infos.values())  # of a bit each
    for part in (config, config.get_text_config()):
        for field in _SIZES:
            value = getattr(part, field, None)
            limit = len(files.infos) if field == "num_hidden_layers" else weights
            if type(value) is int and value > limit:
                raise ValueError(
                    f"{where}: {field}: expected at most {limit}, as the files hold {len(files.infos)} tensors "
                    f"and {weights // 8} bytes, got {value}"
                )


def read_config(directory: Path) -> tuple[Any, Mapping[str, Any] | None]:
    """(transformers config without it, `quantization_config` or None) of a model directory.

    Raises ValueError if the file is no JSON, or lacks or misstates a field.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = directory / CONFIG
    values = read_json(path)
    quantization = values.pop(QUANTIZATION, None)
    if quantization is not None and not isinstance(quantization, dict):
        raise ValueError(f"{path}: {QUANTIZATION}: expected an object, got {quantization!r:.60}")
    for name, method in _OLD_CONFIGS.items():
        if quantization is None and (directory / name).is_file():
            quantization = {"quant_method": method, **read_json(directory / name)}
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{path}: model_type: expected a model transformers knows, got {kind!r}")
    config_class = CONFIG_MAPPING[kind]
    aliases = getattr(config_class, "attribute_map", {})
    nested = any(isinstance(value, dict) and "hidden_size" in value for value in values.values())
    for field in _REQUIRED_FIELDS:
        if nested or aliases.get(field, field) in values or field in values:
            continue
        raise ValueError(f"{path}: {field}: expected a positive integer, got none")
    for field in _REQUIRED_FIELDS:
        value = values.get(aliases.get(field, field), values.get(field, 1))
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {field}: expected a positive integer, got {value!r}")
    try:
        return config_class.from_dict(values), quantization
    except Exception as error:  # its checks raise their own kinds, some of them not ValueErrors
        raise ValueError(f"{path}: expected a valid {kind} config, got: {error}") from error


def owned_tensors(model: nn.Module, files: TensorFiles) -> dict[str, dict[str, str]]:
    """Module's name -> {tensor name within it: name in the file}, for the linears and embeddings in the files."""
    kinds = (nn.Linear, nn.Embedding)
    linears = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    owned: dict[str, dict[str, str]] = {}
    for name in files.infos:
        if _CACHE_SCALE.search(name):
            continue
        dot = name.find(".")
        while dot >= 0:
            if name[:dot] in linears:
                owned.setdefault(name[:dot], {})[name[dot + 1 :]] = name
                break
            dot = name.find(".", dot + 1)
    return owned


def scheme_of(prefix: str, names: dict[str, str], files: TensorFiles, plan: Plan) -> Scheme | None:
    """How a linear is quantized; None if the files hold a plain weight for it, whatever the config says.

    Raises ValueError if they hold packed tensors that the config says nothing of.
    """
    packed = sorted(set(names) - {"weight", "bias"})
    if not packed or plan.config is None:
        return None
    scheme = plan.scheme(prefix)
    if scheme is None:
        raise ValueError(
            f"{files.infos[names[packed[0]]].file}: {prefix}: expected a plain weight, because "
            f"{QUANTIZATION} leaves this module unquantized, got {packed[0]}"
        )
    return scheme


def _embedding_dtype(model: PreTrainedModel, files: TensorFiles) -> str | None:
    """safetensors' name of the dtype the input embeddings are stored in."""
    embedding = model.get_input_embeddings()
    prefix = next((name for name, module in model.named_modules() if module is embedding), None)
    info = files.infos.get(f"{prefix}.weight")
    return None if info is None else info.dtype


def _mixed_dense(names: dict[str, str], files: TensorFiles, around: str | None) -> Scheme | None:
    """The 16-bit format of a linear stored in another dtype than the embeddings, else None.

    nn.Linear refuses inputs of another dtype than its weight's; QuantLinear takes them.
    """
    weight = files.infos.get(names.get("weight", ""))
    if around is None or weight is None or around == weight.dtype:
        return None
    format = {"F16": "fp16", "BF16": "bf16"}.get(weight.dtype)
    return None if format is None else Scheme(format, {})


def quantized_layer(
    directory: Path,
    model: nn.Module,
    prefix: str,
    names: dict[str, str],
    files: TensorFiles,
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> QuantLinear | QuantEmbedding:
    """The packed weight of the linear or embedding `prefix` from the files, checked.

    dtype: of an embedding's rows; None for the config's. ValueError names file and module.
    """
    linear = model.get_submodule(prefix)
    if isinstance(linear, nn.Embedding):
        return _packed_embedding(linear, prefix, names, files, scheme, device, dtype or model.dtype)  # type: ignore[arg-type]
    assert isinstance(linear, nn.Linear)
    # GPTQ files often hold a bias of zeros for layers that have none in the model; it is kept.
    if linear.bias is not None and "bias" not in names:
        raise ValueError(f"{directory}: {prefix}.bias: expected shape ({linear.out_features},), got none")
    tensors = {own: files.read(full) for own, full in names.items()}
    bias = tensors.pop("bias", None)
    try:
        packed = pack(scheme.format, tensors, (linear.out_features, linear.in_features), **scheme.params)
        layer = QuantLinear(packed.to(device), None if bias is None else bias.to(device))
    except ValueError as error:
        raise ValueError(f"{files.infos[next(iter(names.values()))].file}: {prefix}: {error}") from None
    return layer.requires_grad_(False)


def _packed_embedding(
    embedding: nn.Embedding,
    prefix: str,
    names: dict[str, str],
    files: TensorFiles,
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype,
) -> QuantEmbedding:
    tensors = {own: files.read(full) for own, full in names.items()}
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    try:
        return QuantEmbedding(pack(scheme.format, tensors, shape, **scheme.params).to(device), dtype)
    except ValueError as error:
        raise ValueError(f"{files.infos[next(iter(names.values()))].file}: {prefix}: {error}") from None


def _assign(
    model: nn.Module,
    name: str,
    files: TensorFiles,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> bool:
    """Put a plain tensor in its place; False if the model has none of that name."""
    prefix, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(prefix)
    except AttributeError:
        return False
    slots = module._parameters if leaf in module._parameters else module._buffers
    slot = slots.get(leaf)
    if slot is None or leaf in module._non_persistent_buffers_set:
        return False
    info = files.infos[name]
    where = f"{info.file}: tensor {name!r}"
    if info.shape != tuple(slot.shape):
        raise ValueError(f"{where}: expected shape {tuple(slot.shape)} from {CONFIG}, got {info.shape}")
    if slot.is_floating_point() and info.dtype not in ("F16", "BF16", "F32", "F64"):
        raise ValueError(f"{where}: expected dtype F16, BF16 or F32, got {info.dtype}")
    tensor = files.read(name)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    tensor = tensor.to(device)
    slots[leaf] = nn.Parameter(tensor, slot.requires_grad) if isinstance(slot, nn.Parameter) else tensor
    return True


def _check_complete(directory: Path, model: Any, unexpected: list[str], plan: Plan) -> None:
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    ignored += [_CACHE_SCALE, re.compile(r"\.rotary_emb\.inv_freq$")]  # old checkpoints carry this constant
    unexpected = [n for n in unexpected if not any(p.search(n) for p in ignored)]
    if unexpected:
        shown = ", ".join(unexpected[:3]) + (", ..." if len(unexpected) > 3 else "")
        hint = "" if plan.config is not None else f"; {CONFIG} has no {QUANTIZATION}"
        raise ValueError(
            f"{directory}: expected the tensors of {type(model).__name__} as {CONFIG} describes it, "
            f"got {len(unexpected)} unexpected: {shown}{hint}"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{directory}: expected {len(missing)} more tensors, found none of: {shown}")
