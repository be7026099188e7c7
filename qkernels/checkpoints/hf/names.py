"""Tensor names: what transformers calls a model's tensors, and what files call them.

Files keep the names of each architecture's first code. Mixtral's files have
`block_sparse_moe.experts.3.w1`, where transformers has one parameter, `mlp.experts.gate_up_proj`,
for all experts. transformers lists these conversions itself (transformers.conversion_mapping). We
apply its list to module names, because transformers does not know the tensors of packed weights.
Where the list does not mention experts, files call them gate_proj, up_proj and down_proj.

"Stored" names are the names in files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...nn.embedding import QuantEmbedding
from ...nn.experts import DOWN, GATE, LEAVES, UP, QuantExperts, expert_modules, routers
from ...nn.linear import QuantLinear, computes_otherwise, is_linear

#: transformers' operations on tensors of single experts -> (the parameter that they build, the
#: roles of the tensors that they take)
_MERGES = {
    ("MergeModulelist", "Concatenate"): ("gate_up_proj", (GATE, UP)),
    ("MergeModulelist",): ("down_proj", (DOWN,)),
}
_DIGITS = 6


@dataclass(frozen=True)
class ExpertNames:
    """What files call the weights of one module of experts.

    stored: the name of the module itself.
    leaves: role ("gate", "up", "down") -> the name of its projection.
    mapped: whether these names come from transformers' list.
    """

    stored: str
    leaves: dict[str, str]
    mapped: bool

    def of(self, expert: int, role: str) -> str:
        """The stored module name of one weight of an expert."""
        return f"{self.stored}.{expert}.{self.leaves[role]}"


@dataclass(frozen=True)
class Part:
    """A stored tensor that is part of a larger tensor in transformers.

    transformers concatenates `count` such tensors along `dim` to its tensor `whole`; this one is
    number `index`.
    """

    whole: str
    index: int
    count: int
    dim: int


def _may_be_packed(module: nn.Module) -> bool:
    """Whether the module's tensors may be packed; packed tensors may have any names."""
    return isinstance(module, (nn.Embedding, QuantLinear, QuantEmbedding)) or is_linear(module)


def expert_tensor(name: str, leaves: Sequence[str]) -> tuple[int, str, str]:
    """Split "3.up_proj.qweight" into (expert, leaf, tensor name). ValueError for another form.

    leaves: what the checkpoint calls gate, down and up.
    """
    number, _, rest = name.partition(".")
    leaf, _, tensor_name = rest.partition(".")
    is_number = number.isascii() and number.isdecimal() and len(number) <= _DIGITS
    if not is_number or leaf not in leaves or not tensor_name:
        raise ValueError(
            "experts: expected tensors named EXPERT.NAME.TENSOR with NAME one of "
            f"{', '.join(leaves)}, got {name!r:.80}"
        )
    return int(number), leaf, tensor_name


class Names:
    """The names of one model's tensors, in transformers and in files.

    experts: name of an experts module -> the stored names of its weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        self._layers = {name for name, module in model.named_modules() if _may_be_packed(module)}
        self._layers -= {name for name, _ in routers(model)}
        self._layers -= {
            name for name, module in model.named_modules() if has_custom_forward(module)
        }
        #: other modules with a matrix called `weight`, which do more with it than a linear layer
        #: does
        self._matrices = {
            name for name, module in model.named_modules() if _has_matrix(module)
        } - self._layers
        #: where a model with a head keeps the model without it: `base_model_prefix`
        self._base = getattr(model, "base_model_prefix", "")
        self._renamings, self._converters = _transforms(model)
        self._reversed = _reversed(self._renamings)
        self.experts: dict[str, ExpertNames] = {}
        stacks = [
            name for name, module in model.named_modules() if isinstance(module, QuantExperts)
        ]
        for prefix in (*(name for name, _ in expert_modules(model)), *stacks):
            leaves = self._leaves(prefix)
            self.experts[prefix] = ExpertNames(prefix, leaves or LEAVES, leaves is not None)
        # a second loop, because _reversed_name needs the experts of all modules
        for prefix, names in self.experts.items():
            tensor_name = f".0.{names.leaves[GATE]}.weight"
            stored = self._reversed_name(f"{prefix}{tensor_name}").removesuffix(tensor_name)
            self.experts[prefix] = ExpertNames(stored, names.leaves, names.mapped)

    def _leaves(self, prefix: str) -> dict[str, str] | None:
        """role -> projection name in the experts module `prefix`, if transformers lists them."""
        leaves: dict[str, str] = {}
        for converter in self._converters:
            kinds = tuple(type(operation).__name__ for operation in converter.operations)
            target, roles = _MERGES.get(kinds, ("", ()))
            if len(roles) != len(converter.source_patterns):
                continue
            for role, pattern in zip(roles, converter.source_patterns, strict=True):
                leaf = pattern.split(".")[-2]
                if (
                    converter.rename_source_key(f"{prefix}.0.{leaf}.weight")[0]
                    == f"{prefix}.{target}"
                ):
                    leaves[role] = leaf
        return leaves if set(leaves) == set(LEAVES) else None

    # ------------------------------------------------------------------ reading files
    def layer_of(self, name: str) -> str | None:
        """The module whose weight the tensor `name` belongs to; None if none.

        Both names are transformers'. The module is a linear layer or an embedding or, if `name` is
        no tensor of transformers', any other module that has a matrix, such as a router.
        """
        prefix = _prefix(name, self._layers)
        return (
            prefix if prefix is not None or name in self._tensors else _prefix(name, self._matrices)
        )

    def needs_plain_weight(self, prefix: str) -> bool:
        """Whether the module does more with its matrix than a linear layer or an embedding does.

        None of our layers can replace such a module.
        """
        return prefix in self._matrices

    def matrix_of(self, name: str) -> str | None:
        """The module of a tensor called `weight`, unless it is a linear layer or an embedding."""
        prefix = name.removesuffix(".weight")
        return prefix if prefix != name and prefix in self._matrices else None

    def experts_of(self, name: str) -> str | None:
        """The experts module that a tensor belongs to, by transformers' names.

        None for parameters that transformers itself has in that module.
        """
        return None if name in self._tensors else _prefix(name, self.experts)

    def has(self, name: str) -> bool:
        """Whether `name` is a tensor of the model, or one in a module that may be packed."""
        return name in self._tensors or self.layer_of(name) is not None

    def from_stored(self, name: str) -> str:
        """transformers' name of the stored tensor `name`; `name` itself if there is none."""
        if self.has(name):
            return name
        renamed = _apply(self._renamings, name)
        if self.has(renamed) or (
            self.experts_of(renamed) is not None and self.experts_of(name) is None
        ):
            return renamed
        for other in (
            (f"{self._base}.{name}", name.removeprefix(f"{self._base}.")) if self._base else ()
        ):
            if self.has(other) or self.experts_of(other) is not None:
                return other  # the file is of a model without its head, or with one
        return name

    def part(self, name: str) -> Part | None:
        """The part of a larger tensor that the stored tensor `name` is; None if it is whole."""
        if self.has(name):
            return None
        renamed = _apply(self._renamings, name)
        for converter in self._converters:
            if [type(operation).__name__ for operation in converter.operations] != ["Concatenate"]:
                continue
            whole, pattern = converter.rename_source_key(renamed)
            if pattern is not None and whole in self._tensors:
                patterns = converter.source_patterns
                return Part(
                    whole, patterns.index(pattern), len(patterns), converter.operations[0].dim
                )
        return None

    # ------------------------------------------------------------------ writing files
    def to_stored(self, name: str) -> str:
        """The stored name of transformers' tensor `name`.

        Models without experts keep transformers' names: transformers and all other readers know
        them.
        """
        return (
            self._reversed_name(name) if any(own.mapped for own in self.experts.values()) else name
        )

    def parts(self, name: str) -> list[tuple[str, Part]]:
        """The stored names of the equal parts of transformers' tensor `name`; empty if whole."""
        if not any(own.mapped for own in self.experts.values()):
            return []
        for converter in self._converters:
            if len(converter.target_patterns) != 1:
                continue
            parts = []
            for index, pattern in enumerate(converter.source_patterns):
                stored = _apply(self._reversed, name.replace(converter.target_patterns[0], pattern))
                part = self.part(stored)
                if part is not None and (part.whole, part.index) == (name, index):
                    parts.append((stored, part))
            if parts and len(parts) == len(converter.source_patterns):
                return parts
        return []

    def module_to_stored(self, name: str) -> str:
        """The stored name of a module that has a weight."""
        return self.to_stored(f"{name}.weight").removesuffix(".weight")

    def _reversed_name(self, name: str) -> str:
        """`name` renamed by the reversed list; unchanged if the result does not lead back to it."""
        stored = _apply(self._reversed, name)
        return stored if stored == name or self.from_stored(stored) == name else name


def has_custom_forward(module: nn.Module) -> bool:
    """Whether the module is more than a linear layer or an embedding, such as a scaled embedding.

    None of our layers can replace it.
    """
    if isinstance(module, nn.Linear):
        return computes_otherwise(module)
    return isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _prefix(name: str, modules: Any) -> str | None:
    """The shortest prefix of `name`, up to a dot, that is in `modules`; None if none is."""
    dot = name.find(".")
    while dot >= 0:
        if name[:dot] in modules:
            return name[:dot]
        dot = name.find(".", dot + 1)
    return None


def _apply(renamings: Sequence[Any], name: str) -> str:
    """`name` after all renamings, one after another."""
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def _transforms(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' (renamings, converters) for `model`; empty for versions without such a list."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    if not isinstance(model, PreTrainedModel):
        return [], []
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    kinds = (WeightRenaming, WeightConverter)
    renamings, converters = ([t for t in transforms if isinstance(t, kind)] for kind in kinds)
    return renamings, converters


def _reversed(renamings: Sequence[Any]) -> list[Any]:
    """Renamings from transformers' names to stored names.

    Renamings of a prefix that files may or may not have are left out, so the prefix stays.
    """
    reversible = [r for r in reversed(renamings) if type(r).__name__ != "PrefixChange"]
    return [renaming.reverse_transform() for renaming in reversible]
