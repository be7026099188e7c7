"""The experts of one layer that a process holds, without vLLM; `ExpertParts` is their product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checkpoints.hf import names
from ...nn.experts import ExpertParts

__all__ = ["SHARDS", "ExpertParts", "expert_tensor", "local_ids"]

#: vLLM's shard ids of the weights of an expert: gate, down, up
SHARDS = ("w1", "w2", "w3")


def local_ids(ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """The router's ids (T, top_k) as indices into this process's experts, -1 for other experts.

    expert_map: (experts of all processes,), the index of each expert here or -1; None if all are
    here.
    """
    if expert_map is None:
        return ids
    valid = (ids >= 0) & (ids < expert_map.numel())
    index = torch.where(valid, ids, 0).long()
    return torch.where(valid, expert_map[index].to(ids.dtype), -1)


def expert_tensor(name: str, leaves: Sequence[str]) -> tuple[int, str, str]:
    """Split "3.up_proj.qweight" into (expert, vLLM's shard id, tensor name).

    leaves: what the checkpoint calls gate, down and up.
    Raises ValueError for a name of another form.
    """
    expert, leaf, tensor_name = names.expert_tensor(name, leaves)
    return expert, SHARDS[list(leaves).index(leaf)], tensor_name
