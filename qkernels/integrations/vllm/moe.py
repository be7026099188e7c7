"""vLLM's interface to layers of experts (vllm.model_executor.layers.fused_moe), as of vLLM 0.32."""

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

#: shard id -> vLLM's parameter: gate and up, w1 and w3, share one
_PARAMETER = {"w1": "w13", "w2": "w2", "w3": "w13"}


def experts_method(
    layer: RoutedExperts, prefix: str, checkpoint: Checkpoint
) -> QKernelsMoEMethod | None:
    """The method of a layer of experts; None if they are unquantized.

    Raises ValueError if each packed tensor holds all experts.
    """
    prefix = prefix.removesuffix(".routed_experts")
    leaves = [layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name]
    names = [
        {shard: f"{prefix}.{e}.{leaf}" for shard, leaf in zip(SHARDS, leaves, strict=True) if leaf}
        for e in range(layer.global_num_experts)
    ]
    if any(checkpoint.scheme(name) is not None for modules in names for name in modules.values()):
        return QKernelsMoEMethod(layer, prefix, names, checkpoint)
    packed = checkpoint.packed_below(prefix)
    if packed is not None:
        raise ValueError(
            f"{prefix}: expected separate tensors for each expert, {names[0]['w1']}.* and "
            f"so on, got {packed}"
        )
    return None


class QKernelsMoEMethod(FusedMoEMethodBase):
    """Experts in any storage format, the same for all experts of a layer.

    Gate, up and down may have different formats.
    """

    def __init__(
        self, layer: RoutedExperts, prefix: str, names: list[dict[str, str]], checkpoint: Checkpoint
    ) -> None:
        """names: for each expert, vLLM's shard id -> the checkpoint's module.

        Raises ValueError naming the layer if it is not supported.
        """
        super().__init__(layer.moe_config)
        self.prefix, self.names, self.checkpoint = prefix, names, checkpoint
        self.invariant = True if envs.VLLM_BATCH_INVARIANT else None
        self.activation = layer.activation.value
        self._check(layer)

    def _check(self, layer: RoutedExperts) -> None:
        """ValueError for a layer that our kernels do not compute."""
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
            for modules in self.names:
                if (scheme := self.checkpoint.scheme(modules[shard])) != first:
                    raise ValueError(
                        f"{modules[shard]}: expected {first}, as {self.names[0][shard]}, got "
                        f"{scheme}"
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
        """ValueError naming the expert if its weights cannot be served or cut like this."""
        if hidden_size != self.moe.hidden_dim_unpadded:
            raise ValueError(
                f"{self.prefix}: expected {self.moe.hidden_dim_unpadded} features as in the "
                f"checkpoint, because {NAME} pads none, got {hidden_size}"
            )
        count, rank = self.moe.tp_size, self.moe.tp_rank
        inner = intermediate_size_per_partition * count
        tall, wide = (inner, hidden_size), (hidden_size, inner)
        layer.qkernels_dtype = params_dtype
        # (index in this process, shard id) -> its source
        sources: dict[tuple[int, str], Source] = {}
        for e, modules in enumerate(self.names):
            local_expert = layer._map_global_expert_id_to_local_expert_id(e)
            if local_expert < 0:
                continue
            for shard, name in modules.items():
                down = shard == "w2"
                pieces = [Piece(0, hidden_size)] if down else [Piece(0, inner, rank, count)]
                columns = (rank, count) if down else (0, 1)
                shape = wide if down else tall
                options: dict[str, Any] = {"columns": columns, "dtype": params_dtype}
                sources[local_expert, shard] = source_of(
                    self.checkpoint, name, shape, pieces, **options
                )
        if len(sources) != num_experts * len(SHARDS):
            raise ValueError(
                f"{self.prefix}: expected {num_experts} experts in this process, got "
                f"{len(sources) // len(SHARDS)}"
            )
        self._accept(layer, sources)

    def _accept(self, layer: RoutedExperts, sources: dict[tuple[int, str], Source]) -> None:
        """Make the layer take the tensors of these sources, in both of vLLM's ways of loading.

        See `config._Method._accept`.
        """
        device = torch.empty(0).device  # vLLM sets torch's default device to the model's
        layer.qkernels_sources = sources
        leaves = [
            layer.ckpt_gate_proj_name,
            layer.ckpt_down_proj_name,
            str(layer.ckpt_up_proj_name),
        ]

        def take(expert: int, shard: str, leaf: str, tensor: Tensor) -> bool:
            """Give the tensor to its source; False if the expert is not in this process."""
            local_expert = layer._map_global_expert_id_to_local_expert_id(expert)
            if local_expert < 0:
                return False
            source = sources[local_expert, shard]
            if leaf != "bias":
                source.add(leaf, tensor, device)
            elif bool(tensor.any()):  # GPTQ files often hold a bias of zeros for layers without one
                raise ValueError(
                    f"{source.name}.bias: expected none or zeros, got one that is not zero"
                )
            return True

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
            for name, tensor in weights:
                try:
                    expert, shard, leaf = expert_tensor(name, leaves)
                    if expert >= len(self.names):
                        raise ValueError(
                            f"experts: expected 0..{len(self.names) - 1}, got {name!r:.80}"
                        )
                except ValueError as error:
                    raise ValueError(f"{self.prefix}: {error}") from None
                if take(expert, shard, leaf, tensor):
                    yield f"{_PARAMETER[shard]}_{leaf}"

        layer.load_weights = load_weights
        for (_, shard), source in sources.items():
            for leaf in source.names():
                name = f"{_PARAMETER[shard]}_{leaf}"
                if name not in layer._parameters:
                    # not register_parameter, which refuses dots
                    layer._parameters[name] = _placeholder(take, leaf)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Stack the experts and prepack them, once: no other copy remains.

        Raises ValueError if a tensor did not arrive, or if experts differ in more than their
        values.
        """
        sources: dict[tuple[int, str], Source] = layer.qkernels_sources
        if not sources:  # called again, by reloading
            return
        device = torch.empty(0).device
        stacks: dict[str, list[Any]] = {shard: [] for shard in SHARDS}
        for local_expert, shard in sorted(sources):
            source = sources[local_expert, shard]
            for leaf in source.names():
                layer._parameters.pop(f"{_PARAMETER[shard]}_{leaf}", None)
            stacks[shard] += source.finish(device)
            source.parts = None
        layer.qkernels_sources = {}
        sources.clear()  # because `load_weights` still refers to it
        try:
            parts = ExpertParts(stacks["w1"], stacks["w3"], stacks["w2"])
            parts.prepack(layer.qkernels_dtype, self.activation, self.invariant)
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from None
        layer.qkernels_experts = parts

    # ------------------------------------------------------------------ inference
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
        """The sum of this process's experts, (T, K).

        x: (T, K). topk_weights, topk_ids: (T, top_k). vLLM's runner computes shared experts and the
        sum over processes.
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


def _placeholder(take: Any, leaf: str) -> nn.Parameter:
    """An empty parameter that models with their own loading loop find by its name."""

    def load(
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        taken: bool = take(expert_id, shard_id, leaf, loaded_weight)
        return taken if return_success else None

    load.supports_moe_loading = True  # type: ignore[attr-defined]
    empty = nn.Parameter(torch.empty(0), requires_grad=False)
    empty.weight_loader = load  # type: ignore[attr-defined]
    return empty
