"""Builds a runnable model from a GGUF file, its weights packed as in the file.

Packed tensors become QuantLinear, QuantEmbedding and QuantExperts. Only tensors that are no matrix
are dequantized. Tensors are mapped, not read: the system loads pages when they are used. In the
file, Llama's query and key rows have the order of ggml's rotary embedding, with the two rows of a
pair next to each other; their packed rows are put back in transformers' order exactly. Needs the
package `gguf` (`pip install qkernels[gguf]`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import formats
from ...nn.embedding import QuantEmbedding
from ...nn.experts import DOWN, GATE, LEAVES, ROLES, UP, QuantExperts, expert_weights
from ...nn.linear import QuantLinear
from ...weights.packed import PackedWeight, pack
from ..files import UnchangedFile
from ..hf.expert_layers import expert_shapes
from ..hf.model_config import NoExperts
from ..hf.save_pretrained import attach_saver
from .header import GgufHeader, GgufTensor, read_header
from .metadata import ARCHITECTURES, ROPE_TABLE, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: ggml types without blocks
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_packed(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model in a GGUF file whose architecture is one of ARCHITECTURES.

    dtype: of norms and of the embedding's rows, the values between quantized layers.
    Raises ValueError naming the file and a tensor that is missing, or has a wrong shape or an
    unknown type.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    path = path.resolve()
    file = UnchangedFile(path)
    header = read_header(path)
    config = read_config(path, header)  # checks its sizes against the tensors
    with init_empty_weights(include_buffers=False), NoExperts():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    reader = _Reader(file, header, config)
    device = torch.device(device)
    embedding = model.get_input_embeddings()
    for name, module in list(model.named_modules()):
        if module is model.get_output_embeddings() and not reader.has(name, "weight"):
            continue  # tied to the embedding, see below
        if isinstance(module, nn.Linear) and reader.is_packed(name):
            _replace(model, name, _linear(reader, name, module).to(device))
        elif module is embedding and reader.is_packed(name):
            packed = reader.weight(name, (embedding.num_embeddings, embedding.embedding_dim))
            replaced = QuantEmbedding(packed, dtype).to(device)
            _replace(model, name, replaced)
        elif expert_shapes(module):
            _replace(model, name, _experts(reader, name, module, device, dtype))
        else:
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                value = reader.plain(f"{name}.{leaf}", tuple(parameter.shape)).to(device, dtype)
                module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight.is_meta:  # tied
        if isinstance(embedding, QuantEmbedding):
            model.set_output_embeddings(QuantLinear(embedding.packed))
        else:
            head.weight = embedding.weight
    reader.check_all_used()
    # The head shares the bytes of the embedding or has different ones: transformers need not tie
    # anything.
    model.config.tie_word_embeddings = False
    model.config.dtype = dtype
    attach_saver(model)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the module called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _linear(reader: _Reader, name: str, linear: nn.Linear) -> QuantLinear:
    """The QuantLinear that replaces `linear`."""
    packed = reader.weight(name, (linear.out_features, linear.in_features))
    bias = None
    if linear.bias is not None:
        bias = nn.Parameter(
            reader.plain(f"{name}.bias", (linear.out_features,)), requires_grad=False
        )
    return QuantLinear(packed, bias)


def _experts(
    reader: _Reader, name: str, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """QuantExperts with the packed experts, or `module` filled, if all experts are float32."""
    gate_up, _, activation = expert_weights(module)
    count, shapes = gate_up.shape[0], expert_shapes(module)
    module_names = {role: f"{name}.{leaf}" for role, leaf in LEAVES.items()}
    if not any(reader.is_packed(module_name) for module_name in module_names.values()):
        weights = {
            role: reader.plain(f"{module_names[role]}.weight", (count, *shapes[role]))
            for role in ROLES
        }
        gate_up = torch.cat([weights[GATE], weights[UP]], 1)
        for leaf, value in (("gate_up_proj", gate_up), ("down_proj", weights[DOWN])):
            setattr(module, leaf, nn.Parameter(value.to(device, dtype), requires_grad=False))
        return module
    stacks = {role: reader.experts(module_names[role], count, shapes[role]) for role in ROLES}
    try:
        return QuantExperts.from_experts(stacks[GATE], stacks[UP], stacks[DOWN], activation).to(
            device
        )
    except ValueError as error:
        raise ValueError(f"{reader.path}: {name}: {error}") from None


def row_order(name: str, rows: int, config: Any) -> Tensor | None:
    """For a query or key weight (or bias): the row in a Llama file of each row here, int64 (rows).

    None for other tensors. ggml's rotary embedding rotates pairs of neighbouring rows,
    transformers' pairs a row of the first half of a head with one of the second half.
    """
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    field = next((field for part, field in heads.items() if f".{part}." in f".{name}."), None)
    if field is None:
        return None
    count = getattr(config, field)
    return torch.arange(rows).view(count, rows // count // 2, 2).transpose(1, 2).reshape(-1)


class _Reader:
    """The tensors of a file, by transformers' names."""

    def __init__(self, file: UnchangedFile, header: GgufHeader, config: Any) -> None:
        import gguf

        self.file, self.path, self.config = file, file.path, config
        self.tensors = {tensor.name: tensor for tensor in header.tensors}
        self.used = {ROPE_TABLE}  # metadata.py reads this table; transformers computes it
        self.permuted = ARCHITECTURES[header.metadata["general.architecture"]]
        kinds = {str(name): kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        kind = kinds[header.metadata["general.architecture"]]
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def _find(self, name: str) -> str | None:
        """The name in the file of transformers' tensor `name`; None if GGUF has none."""
        module, _, leaf = name.rpartition(".")
        stored_module = self._names.get_name(module)
        return None if stored_module is None else f"{stored_module}.{leaf}"

    def has(self, module: str, leaf: str) -> bool:
        """Whether the file holds the module's tensor `leaf`."""
        return self._find(f"{module}.{leaf}") in self.tensors

    def is_packed(self, module: str) -> bool:
        """Whether the module keeps its weight as in the file: in blocks or in 16 bits."""
        tensor = self.tensors.get(self._find(f"{module}.weight") or "")
        return tensor is None or tensor.type != "F32"

    def _tensor(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        """The header entry of a tensor, of this shape."""
        stored = self._find(name)
        if stored is None or stored not in self.tensors:
            raise ValueError(
                f"{self.path}: {stored or name}: expected a tensor of shape {shape}, found none"
            )
        tensor = self.tensors[stored]
        # The gate of a shared expert is a matrix of one row; the file stores it with one dimension.
        if tuple(tensor.shape) != shape and (shape[0] != 1 or tuple(tensor.shape) != shape[1:]):
            raise ValueError(
                f"{self.path}: {stored}: expected shape {shape}, got {tuple(tensor.shape)}"
            )
        self.used.add(stored)
        return tensor

    def _bytes(self, tensor: GgufTensor) -> Tensor:
        """The tensor's bytes, mapped copy-on-write."""
        self.file.check()
        mapped = np.memmap(
            self.path, dtype=np.uint8, mode="c", offset=tensor.offset, shape=(tensor.nbytes,)
        )
        return torch.from_numpy(mapped)

    def _order(self, name: str, rows: int) -> Tensor | None:
        """`row_order`, if this architecture permutes rows."""
        return row_order(name, rows, self.config) if self.permuted else None

    def weight(self, module: str, shape: tuple[int, int]) -> PackedWeight:
        """The weight (N, K) of a linear layer or an embedding, as stored."""
        tensor = self._tensor(f"{module}.weight", shape)
        return self._pack(tensor, self._bytes(tensor), shape, self._order(module, shape[0]))

    def experts(self, module: str, count: int, shape: tuple[int, int]) -> list[PackedWeight]:
        """The weight (N, K) of each expert, as stored in one tensor (E, N, K)."""
        tensor = self._tensor(f"{module}.weight", (count, *shape))
        return [
            self._pack(tensor, part, shape, None) for part in self._bytes(tensor).view(count, -1)
        ]

    def _pack(
        self, tensor: GgufTensor, data: Tensor, shape: tuple[int, int], order: Tensor | None
    ) -> PackedWeight:
        """The bytes of a tensor, or of one expert in it, as a PackedWeight. F32 cannot be one."""
        if tensor.type in ("F16", "BF16"):
            dense = data.view(_PLAIN[tensor.type]).view(shape)
            dense = dense if order is None else dense[order]
            return pack(
                "fp16" if dense.dtype == torch.float16 else "bf16", {"weight": dense}, shape
            )
        names = {fmt.ggml_type: fmt.name for fmt in formats.GGUF_TYPES}
        name = names.get(tensor.type)
        if name is None:
            known = ", ".join(sorted(names))
            raise ValueError(
                f"{self.path}: {tensor.name}: expected one of the types {known}, F16, BF16; got "
                f"{tensor.type}"
            )
        data = data.view(shape[0], -1)
        try:
            return pack(name, {"data": data if order is None else data[order]}, shape)
        except ValueError as error:
            raise ValueError(f"{self.path}: {tensor.name}: {error}") from None

    def plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that is not packed: the weight of a norm, a bias, a matrix in float32."""
        tensor = self._tensor(name, shape)
        if tensor.type not in _PLAIN:
            raise ValueError(
                f"{self.path}: {tensor.name}: expected one of {', '.join(_PLAIN)}, got "
                f"{tensor.type}"
            )
        value = self._bytes(tensor).view(_PLAIN[tensor.type]).view(shape)
        order = self._order(name, shape[0])
        value = value.clone() if order is None else value[order]
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{self.path}: {tensor.name}: expected finite values, got others")
        return value

    def check_all_used(self) -> None:
        """ValueError if the file holds tensors that the model did not take."""
        left = sorted(set(self.tensors) - self.used)
        if left:
            raise ValueError(
                f"{self.path}: {left[0]}: expected only tensors the model has, got {len(left)} more"
            )


def memory_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; shared memory counts once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.data_ptr()] = max(
            seen.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size()
        )
    return sum(seen.values())
