"""Reads and writes compressed-tensors' `quantization_config` with one config group.

A config holds groups; each is a scheme for the modules that its `targets` name. A format reads and
writes one group; qkernels/checkpoints/hf/quantization.py splits and joins configs with more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

METHOD = "compressed-tensors"
_WHERE = "quantization_config"
#: values of `format` that store each code in a byte
_BYTES = ("int-quantized", "float-quantized", "naive-quantized")


class Scheme(NamedTuple):
    """The one group of a config.

    Attributes:
        storage: its `format`: "pack-quantized", "int-quantized", ...
        weights, inputs: how weights and input activations are quantized; inputs None: not at all.
    """

    storage: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None

    @property
    def kind(self) -> tuple[str, int]:
        """Type ("int" or "float") and bits of the weights."""
        return self.weights.get("type", "int"), self.weights.get("num_bits", 8)

    def expect(self, field: str, allowed: tuple[Any, ...]) -> Any:
        """The value of `weights[field]`. Raises ValueError unless it is one of `allowed`."""
        value = self.weights.get(field)
        if value not in allowed:
            raise ValueError(f"{_WHERE} weights.{field}: expected one of {allowed}, got {value!r}")
        return value


def arguments(
    kind: str,
    bits: int,
    strategy: str,
    *,
    dynamic: bool = False,
    symmetric: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """The config object that describes how weights or inputs are quantized."""
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
    """A `quantization_config` with one group, for all linear layers but the `skipped` ones."""
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
    """Raise ValueError if the config has sparse weights, which leave out zeros."""
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise ValueError(
            f"{_WHERE}.sparsity_config.format: expected 'dense', got {sparsity['format']!r:.60}"
        )


def read(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config with one group; None if its quant_method is not compressed-tensors.

    Raises ValueError naming a field that is missing or wrong, or that no format here implements.
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
        raise ValueError(
            f"{where}.input_activations: expected an object or null, got {inputs!r:.60}"
        )
    if group.get("output_activations") is not None:
        raise ValueError(
            f"{where}.output_activations: expected null, got {group['output_activations']!r:.60}"
        )
    if weights.get("dynamic"):
        raise ValueError(f"{where}.weights.dynamic: expected false, got {weights['dynamic']!r:.60}")
    check_dense(config)
    if config.get("transform_config"):
        raise ValueError(
            f"{_WHERE}.transform_config: expected none, got {config['transform_config']!r:.60}"
        )
    storage = group.get("format") or config.get("format")
    if not isinstance(storage, str):
        raise ValueError(f"{_WHERE}.format: expected a string, got {storage!r:.60}")
    return Scheme(storage, weights, inputs)


def read_eight_bit(config: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """Parameters of an 8-bit scheme of `kind` ("int" or "float"); None for any other config.

    Returns:
        granularity, activation, symmetric_input and symmetric_weight; for "int" also group_size
        (-1: none); for "float" with granularity "block" also block_rows and block_columns, where a
        group is a block of one row.

    Raises:
        ValueError: naming the field, for a scheme of this kind that no format here implements.
    """
    scheme = read(config)
    if scheme is None or scheme.kind[0] != kind or scheme.storage not in _BYTES:
        return None
    bits = scheme.kind[1]
    # compressed-tensors' W4A8 also stores narrower integers in bytes.
    if type(bits) is not int or bits > 8 or (kind == "float" and bits != 8):
        return None
    strategies = ("tensor", "channel", "group", *(["block"] if kind == "float" else []))
    strategy = scheme.expect("strategy", strategies)
    symmetric = scheme.weights.get("symmetric", True) is True
    if kind == "float" and not symmetric:
        raise ValueError(f"{_WHERE} weights.symmetric: expected true with float8, got false")
    parsed: dict[str, Any] = {"granularity": strategy, "symmetric_weight": symmetric}
    width: int | None = None
    if strategy == "block":
        rows, width = _block(scheme.weights.get("block_structure"))
        parsed |= {"block_rows": rows, "block_columns": width}
    elif strategy == "group":
        size = _size("weights.group_size", scheme.weights.get("group_size"))
        if kind == "float":
            width = size
            parsed |= {"granularity": "block", "block_rows": 1, "block_columns": size}
        else:
            parsed |= {"granularity": "channel", "group_size": size}
    return parsed | _read_inputs(scheme.inputs, kind, width)


def _read_inputs(inputs: Mapping[str, Any] | None, kind: str, width: int | None) -> dict[str, Any]:
    """The parameters activation and symmetric_input.

    width: input features that share a scale of float weights; None for whole rows.
    """
    if inputs is None:
        return {"activation": "none", "symmetric_input": True}
    stated = inputs.get("type", "int"), inputs.get("num_bits", 8)
    if stated != (kind, 8):
        raise ValueError(
            f"{_WHERE} input_activations: expected {kind} of 8 bits like the weights, got "
            f"{stated[0]!r:.60} of {stated[1]!r:.60}"
        )
    strategy, dynamic = inputs.get("strategy"), inputs.get("dynamic", False)
    symmetric = inputs.get("symmetric", True) is True
    asymmetric = kind == "int"  # only integers may have zero points
    if (
        dynamic is True
        and strategy == ("token" if width is None else "group")
        and (symmetric or asymmetric)
    ):
        if width is not None and inputs.get("group_size") != width:
            raise ValueError(
                f"{_WHERE} input_activations.group_size: expected {width} like the weights, "
                f"got {inputs.get('group_size')!r:.60}"
            )
        return {"activation": "dynamic", "symmetric_input": symmetric}
    if dynamic is False and strategy == "tensor" and width is None and (symmetric or asymmetric):
        return {"activation": "static", "symmetric_input": symmetric}
    allowed = (
        "dynamic per token, or static per tensor"
        if width is None
        else f"dynamic per group of {width}"
    )
    raise ValueError(
        f"{_WHERE} input_activations: expected {allowed}"
        f"{'' if asymmetric else ', and symmetric'}, got "
        f"dynamic={dynamic!r:.60} strategy={strategy!r:.60} symmetric={symmetric}"
    )


def _size(field: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{_WHERE} {field}: expected a positive integer, got {value!r:.60}")
    return value


def _block(value: Any) -> tuple[int, int]:
    """(rows, columns) of [128, 128], or of "128x128" as early versions wrote it."""
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(size) if isinstance(value, str) else size for size in sizes)
        return _size("", rows), _size("", columns)
    except (TypeError, ValueError):
        raise ValueError(
            f"{_WHERE} weights.block_structure: expected two positive integers, got {value!r:.60}"
        ) from None


def write_eight_bit(kind: str, params: Mapping[str, Any], skipped: list[str]) -> dict[str, Any]:
    """The inverse of `read_eight_bit`."""
    granularity, size = params["granularity"], params.get("group_size", -1)
    weights = arguments(kind, 8, granularity, symmetric=params.get("symmetric_weight", True))
    width = None
    if granularity == "block":
        width = params["block_columns"]
        weights["block_structure"] = [params["block_rows"], width]
    elif size != -1:
        weights |= {"strategy": "group", "group_size": size}
    symmetric = params.get("symmetric_input", True)
    inputs = {
        "none": None,
        "dynamic": arguments(kind, 8, "token", dynamic=True, symmetric=symmetric)
        if width is None
        else arguments(kind, 8, "group", dynamic=True, group_size=width),
        "static": arguments(kind, 8, "tensor", symmetric=symmetric),
    }
    return write(f"{kind}-quantized", weights, inputs[params["activation"]], skipped)
