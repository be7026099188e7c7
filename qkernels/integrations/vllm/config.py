"""vLLM's interface to quantization methods, as of vLLM 0.32.

See vllm.model_executor.layers.quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import vllm.envs as envs
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from ... import formats
from ...checkpoints.hf.quantization import OWN_METHOD
from ...nn.embedding import QuantEmbedding
from ...nn.linear import QuantLinear
from .checkpoint import NAME, Checkpoint
from .loading import Piece, Source, fused_pieces, layer_pieces, shard_index, source_of
from .moe import experts_method

#: methods in directories of `qk.save_model` that vLLM does not know, so ours takes them unasked
_OURS = (OWN_METHOD, "quip", "spqr", "quip_sharp", "bitsandbytes")
#: linear layers of vLLM that cut their weights differently from all others
_UNKNOWN_CUTS = ("MinimaxM3QKVParallelLinearWithIndexer", "KimiK3MergedQKVGateLinear")


class QKernelsConfig(QuantizationConfig):
    """One method for every storage format; the checkpoint says which format a layer has."""

    def __init__(self, config: dict[str, Any]) -> None:
        """config: the checkpoint's `quantization_config`. ValueError if no format reads it."""
        super().__init__()
        self.checkpoint = Checkpoint(config)
        self.tied = False

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json", "quant_config.json"]  # of old GPTQ and AWQ checkpoints

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QKernelsConfig:
        if "quant_method" not in config:
            config = {**config, "quant_method": "gptq" if "desc_act" in config else "awq"}
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        mine = user_quant is None and hf_quant_cfg.get("quant_method") in _OURS
        return NAME if mine or user_quant == NAME else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper()  # the default drops g_idx

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers of local files, so that errors show before weights are loaded."""
        self.tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        directory = Path(model_name)
        if directory.is_dir() and any(directory.glob("*.safetensors")):
            self.checkpoint.open(directory)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.checkpoint.rename(hf_to_vllm_mapper.map_name)

    # ------------------------------------------------------------------ layers
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            names = self.names_of(prefix)
            if all(self.checkpoint.scheme(name) is None for name in names):
                return UnquantizedLinearMethod()
            return QKernelsLinearMethod(self, names)
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return experts_method(layer, prefix, self.checkpoint)
        return None

    def _vocabulary_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        head = isinstance(layer, ParallelLMHead)
        name = prefix or (None if head else self.checkpoint.embedding())
        if name is not None and self.checkpoint.scheme(name) is not None:
            return QKernelsVocabularyMethod(self, [name])
        if head and self.tied and self.checkpoint.embedding() is not None:
            return QKernelsVocabularyMethod(self, [])
        return None

    def names_of(self, prefix: str) -> list[str]:
        """The checkpoint's modules that vLLM fuses into the layer `prefix`."""
        parent, _, leaf = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(leaf)
        if fused is None or self.checkpoint.has(prefix):
            return [prefix]
        return [f"{parent}.{name}" if parent else name for name in fused]


class _Method:
    """The common part of both methods: make sources, load them, and get their parts."""

    def __init__(self, config: QKernelsConfig, names: list[str]) -> None:
        self.config, self.names = config, names

    def _source(
        self, name: str, shape: tuple[int, int], pieces: list[Piece], **more: Any
    ) -> Source:
        return source_of(self.config.checkpoint, name, shape, pieces, **more)

    def _accept(self, layer: nn.Module, sources: list[Source]) -> None:
        """Make the layer take the tensors of these sources.

        vLLM loads in two ways. Models that load module by module call `load_weights`. Others look
        up parameters by name, so the layer gets empty parameters, which `_finish` removes.
        """
        device = torch.empty(0).device  # vLLM sets torch's default device to the model's
        layer.qkernels_sources = sources  # type: ignore[assignment]

        def take(leaf: str, tensor: Tensor, shard: Any) -> None:
            try:
                source = sources[shard_index(shard, len(sources))]
            except ValueError as error:
                raise ValueError(f"{layer.prefix}.{leaf}: {error}") from None
            source.add(leaf, tensor, device)

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
            for leaf, tensor in weights:
                shard = getattr(tensor, "shard_id", None)
                if leaf == "bias":
                    _load_bias(layer, tensor, shard)
                else:
                    take(leaf, tensor, shard)
                yield leaf

        layer.load_weights = load_weights  # type: ignore[assignment]
        for leaf in sorted({leaf for source in sources for leaf in source.names()}):
            empty = nn.Parameter(torch.empty(0), requires_grad=False)
            empty.weight_loader = _loader(take, leaf)  # type: ignore[attr-defined]
            layer._parameters[leaf] = empty  # not register_parameter, which refuses dots

    def _finish(self, layer: nn.Module) -> list[Any]:
        """The packed parts of all sources. ValueError if a tensor did not arrive."""
        sources: list[Source] = layer.qkernels_sources  # type: ignore[assignment]
        device = torch.empty(0).device
        if "bias" in layer._parameters and layer.bias is not None:
            device = layer.bias.device  # type: ignore[union-attr]
        for source in sources:
            for leaf in source.names():
                layer._parameters.pop(leaf, None)
        parts = [part for source in sources for part in source.finish(device)]
        layer.qkernels_sources = []  # type: ignore[assignment]
        return parts


class QKernelsLinearMethod(_Method, LinearMethodBase):
    """Linear layers of every kind of parallelism, fused or not."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """ValueError naming the module if its weights cannot be served or cut like this."""
        rank = int(layer.tp_rank)  # type: ignore[arg-type]
        pieces = layer_pieces(
            output_partition_sizes,
            output_size,
            rank,
            int(getattr(layer, "num_kv_head_replicas", 1)),
        )
        cut = input_size // input_size_per_partition
        if type(layer).__name__ in _UNKNOWN_CUTS and output_size != sum(output_partition_sizes):
            raise ValueError(
                f"{layer.prefix}: expected one process, because {NAME} does not cut such a layer"
            )
        more = {"columns": (rank % cut, cut), "dtype": params_dtype}
        if len(self.names) == 1:
            rows, fused = fused_pieces(pieces)
            sources = [self._source(self.names[0], (rows, input_size), fused, **more)]
        elif len(self.names) == len(pieces):
            sources = [
                self._source(name, (rows, input_size), [piece], **more)
                for name, (rows, piece) in zip(self.names, pieces, strict=True)
            ]
        else:
            raise ValueError(
                f"{layer.prefix}: expected {len(pieces)} weights in the checkpoint, one for each "
                f"of its outputs, got {', '.join(self.names)}"
            )
        layer.qkernels_dtype = params_dtype  # type: ignore[assignment]
        self._accept(layer, sources)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        _install(layer, self._finish(layer))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., K) -> (..., N of this process)."""
        return _multiply(layer, x, bias)


class QKernelsVocabularyMethod(_Method, QuantizeMethodBase):
    """Packed input embeddings and output projections, cut by vLLM's vocabulary ranges."""

    def create_weights(
        self, layer: nn.Module, *sizes: Any, params_dtype: torch.dtype, **attrs: Any
    ) -> None:
        layer.qkernels_dtype = params_dtype  # type: ignore[assignment]
        if not self.names:  # tied
            self._accept(layer, [])
            return
        indices: Any = layer.shard_indices
        rows = int(layer.org_vocab_size)  # type: ignore[arg-type]
        begin, end = indices.org_vocab_start_index, indices.org_vocab_end_index
        source = self._source(
            self.names[0], (rows, int(layer.embedding_dim)), [Piece(begin, end - begin)]
        )  # type: ignore[arg-type]
        if not isinstance(layer, ParallelLMHead):
            _check_rows(source)
        self._accept(layer, [source])

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        # in a list, so that it is no child of the head
        layer.qkernels_tied = [embed_tokens]  # type: ignore[assignment]
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        tied = getattr(layer, "qkernels_tied", None)
        if tied:
            embedding = tied[0].qkernels_embedding
            _install(layer, [embedding.packed])
        elif isinstance(layer, ParallelLMHead):
            _install(layer, self._finish(layer))
        else:
            layer.qkernels_embedding = QuantEmbedding(self._finish(layer)[0], layer.qkernels_dtype)  # type: ignore[arg-type]

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., K) -> logits (..., rows of this process).

        Logits are zero where vLLM pads the vocabulary.
        """
        y = _multiply(layer, x, None)
        y = nn.functional.pad(y, (0, int(layer.num_embeddings_per_partition) - y.shape[-1]))  # type: ignore[arg-type]
        return y if bias is None else y + bias

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """ids (...) of this process's rows -> (..., K)."""
        embedding: Any = layer.qkernels_embedding
        return embedding(ids.clamp(max=embedding.num_embeddings - 1))  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- helpers of both
def _install(layer: nn.Module, parts: list[Any]) -> None:
    """Give the layer its parts, prepacked once: no other copy remains."""
    invariant = True if envs.VLLM_BATCH_INVARIANT else None
    layers = nn.ModuleList([QuantLinear(part, batch_invariant=invariant) for part in parts])
    for part in layers:
        assert isinstance(part, QuantLinear)
        part.prepack(
            torch.empty(1, part.in_features, dtype=layer.qkernels_dtype, device=part.packed.device)  # type: ignore[call-overload]
        )
    layer.qkernels_parts = layers.requires_grad_(False)


def _multiply(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """The products with all parts, one after another along the output features."""
    outputs, begin = [], 0
    parts: Any = layer.qkernels_parts
    for part in parts:
        part_bias = None if bias is None else bias[begin : begin + part.out_features]
        outputs.append(part.multiply(x, part_bias))
        begin += part.out_features
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _load_bias(layer: nn.Module, tensor: Tensor, shard: Any) -> None:
    """Load a bias by the loader of vLLM, or check that it is zero if the layer has none."""
    bias: Any = layer.bias
    if bias is not None:
        bias.weight_loader(bias, tensor, *([] if shard is None else [shard]))
    elif bool(tensor.any()):  # GPTQ files often hold a bias of zeros for layers without one
        raise ValueError(
            f"{layer.prefix}.bias: expected none, as vLLM's layer has none, got one that is not "
            "zero"
        )


def _loader(take: Callable[[str, Tensor, Any], None], leaf: str) -> Callable[..., None]:
    """A weight loader that vLLM calls with (parameter, tensor, shard id)."""
    return lambda param, tensor, shard=None: take(leaf, tensor, shard)


def _check_rows(source: Source) -> None:
    """ValueError naming the module if its format cannot look up single rows."""
    assert source.scheme is not None
    from ...weights.packed import PackedWeight

    fmt = formats.get(source.scheme.format)
    params = fmt.resolve(source.shape, source.scheme.params)
    specs = fmt.specs(source.shape, params)
    tensors = {
        name: torch.empty(spec.shape or (1,), dtype=spec.dtypes[0], device="meta")
        for name, spec in specs.items()
        if spec.required
    }
    try:
        QuantEmbedding(PackedWeight(source.scheme.format, source.shape, tensors, params))
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from None
