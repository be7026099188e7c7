"""Tensor parallelism of QuantLinear with torch.distributed alone (Megatron-LM, arXiv 1909.08053).

    column parallel   each process has some output features: y is in pieces
    row parallel      each has some input features, takes its piece of x, and the products are
                      summed

A column-parallel layer feeds a row-parallel layer, so each pair communicates one sum only.
Inference only.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.linear import QuantLinear
from ..weights.sharding import COLUMNS, ROWS, shard

#: names of column-parallel and row-parallel layers; attention in these models derives its number of
#: heads from the shapes
LLAMA: dict[str, int] = {
    "*.q_proj": ROWS, "*.k_proj": ROWS, "*.v_proj": ROWS, "*.o_proj": COLUMNS,
    "*.gate_proj": ROWS, "*.up_proj": ROWS, "*.down_proj": COLUMNS,
}  # fmt: skip
PLANS: dict[str, Mapping[str, int]] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA)


class ColumnParallel(nn.Module):
    """Output features of this process: x (..., K) -> y (..., N / processes).

    With `gather`, y (..., N) of all processes.
    """

    def __init__(self, layer: nn.Module, group: Any, gather: bool = False) -> None:
        super().__init__()
        self.layer, self.group, self.gather = layer, group, gather

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if not self.gather:
            return y
        pieces = [torch.empty_like(y) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(pieces, y.contiguous(), group=self.group)
        return torch.cat(pieces, -1)


class RowParallel(nn.Module):
    """Input features of this process: x (..., K / processes) -> y (..., N), summed.

    The sum is over all processes.
    """

    def __init__(self, layer: nn.Module, bias: Tensor | None, group: Any) -> None:
        super().__init__()
        self.layer, self.group = layer, group
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x).contiguous()
        dist.all_reduce(y, group=self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def parallelize(
    model: nn.Module, group: Any = None, plan: Mapping[str, int] | None = None, gather: bool = False
) -> nn.Module:
    """Keep this process's part of each layer that `plan` names, in place; returns the model.

    group: a torch.distributed process group; None for all processes.
    plan: fnmatch pattern of module names -> 0 for column parallel (rows of W are cut), 1 for row
    parallel; None for the plan of the model's type.
    gather: column-parallel layers output all features, for plans without a row-parallel layer
    behind them.

    Raises ValueError naming the layer if its weight cannot be cut into that many parts, if heads
    are not divisible, or if there is no plan; the model is then unchanged.
    """
    count, index = dist.get_world_size(group), dist.get_rank(group)
    config = getattr(model, "config", None)
    if plan is None:
        model_type = getattr(config, "model_type", None)
        if model_type not in PLANS:
            raise ValueError(
                f"plan: expected one for a model of type {model_type!r}; known: {', '.join(PLANS)}"
            )
        plan = PLANS[model_type]
        for field in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, field, None)
            if heads is not None and heads % count:
                raise ValueError(
                    f"model: expected {field}={heads} to be a multiple of {count} processes"
                )
    parts: dict[str, nn.Module] = {}
    unused = set(plan)
    for name, module in model.named_modules():
        pattern = next((p for p in plan if fnmatchcase(name, p)), None)
        if pattern is None or not isinstance(module, (QuantLinear, nn.Linear)):
            continue
        unused.discard(pattern)
        try:
            parts[name] = _part(module, plan[pattern], index, count, group, gather)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if unused:
        raise ValueError(
            f"plan: expected patterns that match a linear layer, got {sorted(unused)[0]!r}"
        )
    for name, part in parts.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, part)
    return model


def _part(
    module: QuantLinear | nn.Linear, dim: int, index: int, count: int, group: Any, gather: bool
) -> nn.Module:
    """This process's part of a layer, column-parallel or row-parallel."""
    bias = module.bias
    if dim == ROWS:
        if bias is not None:
            bias = nn.Parameter(bias.detach().chunk(count)[index].clone(), requires_grad=False)
        return ColumnParallel(_cut(module, dim, index, count, bias), group, gather)
    return RowParallel(_cut(module, dim, index, count, None), bias, group)


def _cut(module: QuantLinear | nn.Linear, dim: int, index: int, count: int, bias: Any) -> nn.Module:
    """Part `index` of `count` of a layer, cut along `dim` of its weight (N, K)."""
    if isinstance(module, QuantLinear):
        packed = shard(module.packed, dim, index, count)
        return QuantLinear(
            packed, bias, module.backend, module.batch_invariant, module.dtype
        ).train(module.training)
    weight = module.weight
    if weight.shape[dim] % count:
        raise ValueError(
            f"expected {weight.shape[dim]} features to be a multiple of {count} processes"
        )
    part = weight.detach().chunk(count, dim)[index].clone()
    linear = nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta", dtype=part.dtype)
    linear.weight = nn.Parameter(part, requires_grad=False)
    linear.bias = bias
    return linear
