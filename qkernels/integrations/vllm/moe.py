"""vLLM's interface to layers of experts (vllm.model_executor.layers.fused_moe, seen with 0.32)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts

from ...ops.moe import ACTIVATIONS
from .checkpoint import NAME, Checkpoint
from .experts import SHARDS, ExpertParts, expert_tensor, local_ids
from .loading import Piece, Source, source_of

#: vLLM's parameter of each shard: gate and up, w1 and w3, share theirs
_PARAMETER = {"w1": "w13", "w2": "w2", "w3": "w13"}


def experts_method(
    layer: RoutedExperts, prefix: str, checkpoint: Checkpoint
) -> QKernelsMoEMethod | None:
    """The method of a layer of experts; None if they are plain.

    ValueError if they are packed in tensors that hold all experts at once.
    """
    prefix = prefix.removesuffix(".routed_experts")
    leaves = [layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name]
    names = [
        {shard: f"{prefix}.{e}.{leaf}" for shard, leaf in zip(SHARDS, leaves, strict=True) if leaf}
        for e in range(layer.global_num_experts)
    ]
    if any(checkpoint.scheme(name) is not None for own in names for name in own.values()):
        return QKernelsMoEMethod(layer, prefix, names, checkpoint)
    packed = checkpoint.packed_below(prefix)
    if packed is not None:
        raise ValueError(
            f"{prefix}: expected the tensors of each expert by themselves, {names[0]['w1']}.* and "
            f"so on, got {packed}"
        )
    return None


class QKernelsMoEMethod(FusedMoEMethodBase):
    """Experts in any storage format, all of a layer in one; gate, up and down may each have its
    own.
    """

    def __init__(
        self, layer: RoutedExperts, prefix: str, names: list[dict[str, str]], checkpoint: Checkpoint
    ) -> None:
        """names: of each expert's modules by vLLM's shard ids. ValueError, naming the layer, if it
        is not served.
        """
        super().__init__(layer.moe_config)
        self.prefix, self.names, self.checkpoint = prefix, names, checkpoint
        self.invariant = True if envs.VLLM_BATCH_INVARIANT else None
        self.activation = layer.activation.value
        self._check(layer)

    def _check(self, layer: RoutedExperts) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{self.prefix}: activation: expected one of {', '.join(ACTIVATIONS)}, got "
                f"{self.activation!r}"
            )
        if self.moe.has_bias:
            raise ValueError(
                f"{self.prefix}: expected experts without biases, because {NAME} serves no others"
            )
        for field in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
            if getattr(layer, field) is not None:
                raise ValueError(
                    f"{self.prefix}: {field}: expected None, got {getattr(layer, field)}"
                )
        for shard in SHARDS:
            first = self.checkpoint.scheme(self.names[0][shard])
            for own in self.names:
                if (scheme := self.checkpoint.scheme(own[shard])) != first:
                    raise ValueError(
                        f"{own[shard]}: expected {first}, as {self.names[0][shard]}, got {scheme}"
                    )

    # ------------------------------------------------------------------ weights
    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """ValueError, naming the expert, if its weights cannot be served or cut so."""
        if hidden_size != self.moe.hidden_dim_unpadded:
            raise ValueError(
                f"{self.prefix}: expected {self.moe.hidden_dim_unpadded} features as in the "
                f"checkpoint, because {NAME} pads none, got {hidden_size}"
            )
        count, rank = self.moe.tp_size, self.moe.tp_rank
        inner = intermediate_size_per_partition * count
        tall, wide = (inner, hidden_size), (hidden_size, inner)
        layer.qkernels_dtype = params_dtype
        found: dict[tuple[int, str], Source] = {}  # of this process's experts, by their place here
        for e, own in enumerate(self.names):
            here = layer._map_global_expert_id_to_local_expert_id(e)
            if here < 0:
                continue
            for shard, name in own.items():
                down = shard == "w2"
                pieces = [Piece(0, hidden_size)] if down else [Piece(0, inner, rank, count)]
                columns = (rank, count) if down else (0, 1)
                shape = wide if down else tall
                more: dict[str, Any] = {"columns": columns, "dtype": params_dtype}
                found[here, shard] = source_of(self.checkpoint, name, shape, pieces, **more)
        if len(found) != num_experts * len(SHARDS):
            raise ValueError(
                f"{self.prefix}: expected {num_experts} experts in this process, got "
                f"{len(found) // len(SHARDS)}"
            )
        self._expect(layer, found)

    def _expect(self, layer: RoutedExperts, sources: dict[tuple[int, str], Source]) -> None:
        """Make the layer take these sources' tensors, in both of vLLM's ways of loading (as
        `config._Method`).
        """
        device = torch.empty(0).device  # vLLM builds models under the device they go to
        layer.qkernels_sources = sources
        leaves = [
            layer.ckpt_gate_proj_name,
            layer.ckpt_down_proj_name,
            str(layer.ckpt_up_proj_name),
        ]

        def take(expert: int, shard: str, own: str, tensor: Tensor) -> bool:
            """Whether it is of an expert of this process."""
            here = layer._map_global_expert_id_to_local_expert_id(expert)
            if here < 0:
                return False
            source = sources[here, shard]
            if own != "bias":
                source.add(own, tensor, device)
            elif bool(tensor.any()):  # GPTQ files often hold zeros for layers that have no bias
                raise ValueError(
                    f"{source.name}.bias: expected none or zeros, got one that is not zero"
                )
            return True

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
            for name, tensor in weights:
                try:
                    expert, shard, own = expert_tensor(name, leaves)
                    if expert >= len(self.names):
                        raise ValueError(
                            f"experts: expected 0..{len(self.names) - 1}, got {name!r:.80}"
                        )
                except ValueError as error:
                    raise ValueError(f"{self.prefix}: {error}") from None
                if take(expert, shard, own, tensor):
                    yield f"{_PARAMETER[shard]}_{own}"

        layer.load_weights = load_weights
        for (_, shard), source in sources.items():
            for own in source.names():
                name = f"{_PARAMETER[shard]}_{own}"
                if name not in layer._parameters:
                    # not register_parameter, which refuses dots
                    layer._parameters[name] = _placeholder(take, own)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Stack the experts and move them to the kernel's layout, once: the only copy there is.

        ValueError if something did not come, or if experts differ in more than their values.
        """
        sources: dict[tuple[int, str], Source] = layer.qkernels_sources
        if not sources:  # called again, by reloading
            return
        device = torch.empty(0).device
        stacks: dict[str, list[Any]] = {shard: [] for shard in SHARDS}
        for here, shard in sorted(sources):
            source = sources[here, shard]
            for own in source.names():
                layer._parameters.pop(f"{_PARAMETER[shard]}_{own}", None)
            stacks[shard] += source.finish(device)
            source.parts = None
        layer.qkernels_sources = {}
        sources.clear()  # `load_weights` holds on to it
        try:
            parts = ExpertParts(stacks["w1"], stacks["w3"], stacks["w2"])
            parts.prepack(layer.qkernels_dtype, self.activation, self.invariant)
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from None
        layer.qkernels_experts = parts

    # ------------------------------------------------------------------ running
    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None  # none of vLLM's own kernels runs here

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x (T, K), topk_weights and topk_ids (T, top_k) -> (T, K): what this process's experts
        add.

        Shared experts are run by vLLM's runner, whose business the sum over processes is, too.
        """
        if layer.apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise ValueError(
                    f"{self.prefix}: expected one expert a token, whose input is weighted, got "
                    f"{topk_ids.shape[1]}"
                )
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        parts: ExpertParts = layer.qkernels_experts
        ids = local_ids(topk_ids, layer.expert_map)
        return parts.run(x, topk_weights, ids, self.activation, self.invariant)


def _placeholder(take: Any, own: str) -> nn.Parameter:
    """An empty parameter that models with a loading loop of their own find by its name."""

    def load(
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        found: bool = take(expert_id, shard_id, own, loaded_weight)
        return found if return_success else None

    load.supports_moe_loading = True  # type: ignore[attr-defined]
    empty = nn.Parameter(torch.empty(0), requires_grad=False)
    empty.weight_loader = load  # type: ignore[attr-defined]
    return empty
