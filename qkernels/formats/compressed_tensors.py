"""compressed-tensors' `quantization_config`: what one config group says, read and written.

A config holds groups, each a scheme for the modules its `targets` name. A format reads a config with one
group; qkernels/checkpoints/quantization.py splits and joins those with more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

METHOD = "compressed-tensors"
_WHERE = "quantization_config"


class Scheme(NamedTuple):
    """The one group of a config. `storage` is its `format`: "pack-quantized", "int-quantized", ..."""

    storage: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None

    @property
    def kind(self) -> tuple[str, int]:
        """("int" | "float", bits) of the weights."""
        return self.weights.get("type", "int"), self.weights.get("num_bits", 8)

    def expect(self, field: str, allowed: tuple[Any, ...]) -> Any:
        """The value of weights.`field`; ValueError unless it is one of `allowed`."""
        value = self.weights.get(field)
        if value not in allowed:
            raise ValueError(f"{_WHERE} weights.{field}: expected one of {allowed}, got {value!r}")
        return value


def arguments(
    kind: str, bits: int, strategy: str, *, dynamic: bool = False, symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    """How weights or inputs are quantized, with compressed-tensors' field names."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "dynamic": dynamic,
        **more,
    }


def write(
    storage: str, weights: dict[str, Any], inputs: dict[str, Any] | None, skipped: list[str]
) -> dict[str, Any]:
    """A `quantization_config` with one group, for all linears but the `skipped` ones."""
    return {
        "quant_method": METHOD,
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": storage,
            }
        },
        "ignore": skipped,
        "kv_cache_scheme": None,
    }


def check_dense(config: Mapping[str, Any]) -> None:
    """ValueError if the config leaves out weights that are zero."""
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise ValueError(f"{_WHERE}.sparsity_config.format: expected 'dense', got {sparsity['format']!r:.60}")


def read(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config with one group; None if its quant_method is another's.

    Raises ValueError naming the field that is missing, misstated, or that no format here implements.
    """
    if config.get("quant_method") != METHOD:
        return None
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        count = len(groups) if isinstance(groups, Mapping) else repr(groups)
        raise ValueError(f"{_WHERE}.config_groups: expected one group, got {count}")
    name, group = next(iter(groups.items()))
    where = f"{_WHERE}.config_groups.{name}"
    if not isinstance(group, Mapping):
        raise ValueError(f"{where}: expected an object, got {group!r:.60}")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise ValueError(f"{where}.weights: expected an object, got {weights!r:.60}")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ValueError(f"{where}.input_activations: expected an object or null, got {inputs!r:.60}")
    if group.get("output_activations") is not None:
        raise ValueError(
            f"{where}.output_activations: expected null, got {group['output_activations']!r:.60}"
        )
    if weights.get("dynamic"):
        raise ValueError(f"{where}.weights.dynamic: expected false, got {weights['dynamic']!r:.60}")
    check_dense(config)
    if config.get("transform_config"):
        raise ValueError(f"{_WHERE}.transform_config: expected none, got {config['transform_config']!r:.60}")
    storage = group.get("format") or config.get("format")
    if not isinstance(storage, str):
        raise ValueError(f"{_WHERE}.format: expected a string, got {storage!r:.60}")
    return Scheme(storage, weights, inputs)


def read_eight_bit(config: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """granularity, activation and symmetric_input of an 8-bit scheme of `kind`, else None.

    Raises ValueError naming the field for a scheme of this kind that we do not implement.
    """
    scheme = read(config)
    if scheme is None or scheme.kind != (kind, 8) or scheme.storage == "pack-quantized":
        return None
    strategies = ("tensor", "channel", "block") if kind == "float" else ("tensor", "channel")
    granularity = scheme.expect("strategy", strategies)
    if granularity == "block" and scheme.weights.get("block_structure") not in ([128, 128], "128x128"):
        raise ValueError(
            f"{_WHERE} weights.block_structure: expected [128, 128], "
            f"got {scheme.weights.get('block_structure')!r:.60}"
        )
    if scheme.weights.get("symmetric", True) is not True:
        raise ValueError(f"{_WHERE} weights.symmetric: expected true with 8 bits, got false")
    inputs = scheme.inputs
    if inputs is None:
        return {"granularity": granularity, "activation": "none", "symmetric_input": True}
    if (inputs.get("type", "int"), inputs.get("num_bits", 8)) != (kind, 8):
        raise ValueError(
            f"{_WHERE} input_activations: expected {kind} of 8 bits like the weights, got "
            f"{inputs.get('type', 'int')!r:.60} of {inputs.get('num_bits', 8)!r:.60}"
        )
    strategy, dynamic = inputs.get("strategy"), inputs.get("dynamic", False)
    symmetric = inputs.get("symmetric", True) is True
    per_token = ("group",) if granularity == "block" else ("token",)
    if dynamic is True and strategy in per_token and symmetric:
        if granularity == "block" and inputs.get("group_size") != 128:
            raise ValueError(
                f"{_WHERE} input_activations.group_size: expected 128, got {inputs.get('group_size')!r:.60}"
            )
        return {"granularity": granularity, "activation": "dynamic", "symmetric_input": True}
    if dynamic is False and strategy == "tensor" and granularity != "block":
        return {"granularity": granularity, "activation": "static", "symmetric_input": symmetric}
    raise ValueError(
        f"{_WHERE} input_activations: expected dynamic per {per_token[0]} and symmetric, or static per "
        f"tensor, got dynamic={dynamic!r:.60} strategy={strategy!r:.60} symmetric={symmetric}"
    )


def write_eight_bit(
    kind: str, granularity: str, activation: str, symmetric: bool, skipped: list[str]
) -> dict[str, Any]:
    """The inverse of `read_eight_bit`."""
    block = granularity == "block"
    weights = arguments(kind, 8, granularity)
    if block:
        weights["block_structure"] = [128, 128]
    inputs = {
        "none": None,
        "dynamic": arguments(kind, 8, "group", dynamic=True, group_size=128)
        if block
        else arguments(kind, 8, "token", dynamic=True),
        "static": arguments(kind, 8, "tensor", symmetric=symmetric),
    }
    return write(f"{kind}-quantized", weights, inputs[activation], skipped)
