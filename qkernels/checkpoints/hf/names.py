"""What transformers calls a model's tensors, and what files call them.

Files keep the names of each architecture's first code, Mixtral's `block_sparse_moe.experts.3.w1`,
where transformers has one parameter, `mlp.experts.gate_up_proj`, for all experts. It says itself
which names go where (transformers.conversion_mapping). That is followed here by modules, because
packed weights come in tensors that it does not know. Where it says nothing of experts they are
called gate_proj, up_proj and down_proj.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...nn.embedding import QuantEmbedding
from ...nn.experts import DOWN, GATE, LEAVES, UP, QuantExperts, expert_modules, routers
from ...nn.linear import QuantLinear, computes_otherwise, is_linear

#: transformers' operations on tensors of single experts -> what it makes of them, and of whose
#: tensors
_MERGES = {
    ("MergeModulelist", "Concatenate"): ("gate_up_proj", (GATE, UP)),
    ("MergeModulelist",): ("down_proj", (DOWN,)),
}
_DIGITS = 6


@dataclass(frozen=True)
class ExpertNames:
    """What files call the weights of one module of experts.

    stored: the module itself. leaves: "gate", "up", "down" -> their names. mapped: whether
    transformers says so.
    """

    stored: str
    leaves: dict[str, str]
    mapped: bool

    def of(self, expert: int, role: str) -> str:
        return f"{self.stored}.{expert}.{self.leaves[role]}"


@dataclass(frozen=True)
class Part:
    """Which part of transformers' tensor `whole` a file's tensor is: of `count`, one behind another
    along `dim`.
    """

    whole: str
    index: int
    count: int
    dim: int


def _may_be_packed(module: nn.Module) -> bool:
    """Whether a module's tensors may be packed, and be called anything then."""
    return isinstance(module, (nn.Embedding, QuantLinear, QuantEmbedding)) or is_linear(module)


def expert_tensor(name: str, leaves: Sequence[str]) -> tuple[int, str, str]:
    """(expert, leaf, tensor's name) of "3.up_proj.qweight". ValueError for a name of another form.

    leaves: what the checkpoint calls gate, down and up.
    """
    number, _, rest = name.partition(".")
    leaf, _, own = rest.partition(".")
    plain = number.isascii() and number.isdecimal() and len(number) <= _DIGITS
    if not plain or leaf not in leaves or not own:
        raise ValueError(
            f"experts: expected tensors called EXPERT.NAME.TENSOR with NAME one of {', '.join(leaves)}, got {name!r:.80}"
        )
    return int(number), leaf, own


class Names:
    """Names of one model's tensors. `experts` has those of its experts, by module."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        self._layers = {name for name, module in model.named_modules() if _may_be_packed(module)}
        self._layers -= {name for name, _ in routers(model)}
        self._layers -= {name for name, module in model.named_modules() if own_forward(module)}
        #: what else has a matrix called `weight`, and computes with it in a way of its own
        self._matrices = {
            name for name, module in model.named_modules() if _has_matrix(module)
        } - self._layers
        #: what transformers calls a model without its head inside of one with it
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
        for prefix, names in self.experts.items():  # after all are known
            own = f".0.{names.leaves[GATE]}.weight"
            stored = self._written(f"{prefix}{own}").removesuffix(own)
            self.experts[prefix] = ExpertNames(stored, names.leaves, names.mapped)

    def _leaves(self, prefix: str) -> dict[str, str] | None:
        found: dict[str, str] = {}
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
                    found[role] = leaf
        return found if set(found) == set(LEAVES) else None

    # ------------------------------------------------------------------ of files
    def layer_of(self, name: str) -> str | None:
        """The module whose matrix a tensor belongs to by its name, as transformers has both: a
        linear, an embedding, or, unless it is a tensor of transformers', what has a matrix besides
        (a router)."""
        prefix = _prefix(name, self._layers)
        return (
            prefix if prefix is not None or name in self._tensors else _prefix(name, self._matrices)
        )

    def has_matrix_of_its_own(self, prefix: str) -> bool:
        """Whether the module computes with a matrix in a way of its own, so that no layer of ours
        can stand in.
        """
        return prefix in self._matrices

    def matrix_of(self, name: str) -> str | None:
        """The module that a tensor called `weight` belongs to, if it is no linear or embedding."""
        prefix = name.removesuffix(".weight")
        return prefix if prefix != name and prefix in self._matrices else None

    def experts_of(self, name: str) -> str | None:
        """The module of experts that a tensor belongs to, as transformers has both; None for its
        own parameters.
        """
        return None if name in self._tensors else _prefix(name, self.experts)

    def has(self, name: str) -> bool:
        """Whether it is the name of a tensor, or of one in a module that may be packed."""
        return name in self._tensors or self.layer_of(name) is not None

    def of_file(self, name: str) -> str:
        """transformers' name of the tensor that files call `name`, or that name itself if it leads
        nowhere.
        """
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
                return other  # of a model without its head, or with one
        return name

    def part(self, name: str) -> Part | None:
        """Of which plain tensor the one that files call `name` is a part; None for all others."""
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

    # ------------------------------------------------------------------ for files
    def written(self, name: str) -> str:
        """What files call the tensor that transformers calls `name`.

        Names of models without experts stay: transformers reads its own, too, and so do all others.
        """
        return self._written(name) if any(own.mapped for own in self.experts.values()) else name

    def parts(self, name: str) -> list[tuple[str, Part]]:
        """The files' names of the equal parts that they keep transformers' tensor `name` in; empty
        if it is one.
        """
        if not any(own.mapped for own in self.experts.values()):
            return []
        for converter in self._converters:
            if len(converter.target_patterns) != 1:
                continue
            found = []
            for index, pattern in enumerate(converter.source_patterns):
                stored = _apply(self._reversed, name.replace(converter.target_patterns[0], pattern))
                part = self.part(stored)
                if part is not None and (part.whole, part.index) == (name, index):
                    found.append((stored, part))
            if found and len(found) == len(converter.source_patterns):
                return found
        return []

    def module(self, name: str) -> str:
        """`written` of a module that has a weight."""
        return self.written(f"{name}.weight").removesuffix(".weight")

    def _written(self, name: str) -> str:
        found = _apply(self._reversed, name)
        return found if found == name or self.of_file(found) == name else name


def own_forward(module: nn.Module) -> bool:
    """Whether it is a linear or an embedding and more, so that no other can stand in: a scaled
    embedding, say.
    """
    if isinstance(module, nn.Linear):
        return computes_otherwise(module)
    return isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _prefix(name: str, modules: Any) -> str | None:
    dot = name.find(".")
    while dot >= 0:
        if name[:dot] in modules:
            return name[:dot]
        dot = name.find(".", dot + 1)
    return None


def _apply(renamings: Sequence[Any], name: str) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def _transforms(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters for `model`; none from versions that have no such
    list.
    """
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
    """From transformers' names to those of files. Prefixes that files may have or not are left as
    they are.
    """
    kept = [r for r in reversed(renamings) if type(r).__name__ != "PrefixChange"]
    return [renaming.reverse_transform() for renaming in kept]
