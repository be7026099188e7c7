"""`qkernels inspect`: lists the tensors of a model's files, from the files' headers only."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common

#: dtypes of unquantized weights, in the files' spelling
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Row:
    """The tensors of one module.

    Attributes:
        module: full name.
        format: storage format, or the dtype of unquantized weights, or "-" if unknown.
        tensors: name within the module -> dtype and shape.
        shape: (N, K) of the weight, or its own shape; None if unknown.
        weights: number of weights; None if the files do not say it.
        nbytes: bytes of all tensors.
    """

    module: str
    format: str
    tensors: dict[str, str]
    shape: tuple[int, ...] | None
    weights: int | None
    nbytes: int

    @property
    def bits_per_weight(self) -> float | None:
        return None if self.weights is None else 8 * self.nbytes / self.weights


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    path: Annotated[str, typer.Argument(help="A model directory, a .safetensors or a .gguf file.")],
    json: common.JsonOption = False,
) -> None:
    """List a model's tensors by module, with format, shape, bytes and bits per weight.

    Reads headers only, so it is quick at any size.

    Example: qkernels inspect ./my-model-nf4
    """
    facts, rows = collect(path)
    total = sum(row.nbytes for row in rows)
    counted = [row for row in rows if row.weights is not None]
    quantized = [row for row in counted if row.format not in (*_FLOATS, "-")]
    summary = {
        "modules": len(rows),
        "bytes": total,
        "weights": sum(row.weights or 0 for row in counted) if len(counted) == len(rows) else None,
        "bits_per_weight": _bits(counted) if len(counted) == len(rows) else None,
        "quantized_modules": len(quantized),
        "quantized_bits_per_weight": _bits(quantized),
        "formats": dict(Counter(row.format for row in rows)),
    }
    if json:
        table = [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in rows]
        common.write_json({**facts, "totals": summary, "modules": table})
        return
    columns = ["module", "format", "tensors", "shape", "bytes", "bits/weight"]
    lines = [
        [
            row.module,
            row.format,
            ", ".join(f"{name} {kind}" for name, kind in row.tensors.items()),
            "x".join(map(str, row.shape)) if row.shape is not None else "-",
            f"{row.nbytes:,}",
            _number(row.bits_per_weight),
        ]
        for row in rows
    ]
    common.write_table(None, columns, lines, left=3)
    for key, value in facts.items():
        if value is not None:
            print(f"{key}: {value}")
    print(f"total: {len(rows)} modules, {common.human_bytes(total)} of tensors", end="")
    if summary["bits_per_weight"] is not None:
        print(
            f", {summary['weights']:,} weights, {summary['bits_per_weight']:.3f} bits per weight",
            end="",
        )
    if quantized:
        bits = summary["quantized_bits_per_weight"]
        print(f"; {len(quantized)} quantized modules at {bits:.3f} bits per weight", end="")
    print()


def _bits(rows: list[Row]) -> float | None:
    """Bits per weight of several modules together; None without weights."""
    weights = sum(row.weights or 0 for row in rows)
    return 8 * sum(row.nbytes for row in rows) / weights if weights else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def collect(name: str) -> tuple[dict[str, Any], list[Row]]:
    """(facts about the file, one Row per module) of a MODEL path."""
    from ..checkpoints.gguf import reader as gguf

    path = common.model_path(name)
    if gguf.is_gguf(path):
        return _gguf(path)
    return _safetensors(path)


def _gguf(path: Path) -> tuple[dict[str, Any], list[Row]]:
    from ..checkpoints.gguf import reader as gguf

    header = gguf.read_header(path)
    rows = []
    for tensor in header.tensors:
        module, _, leaf = tensor.name.rpartition(".")
        label = {leaf: f"{tensor.type} {list(tensor.shape)}"}
        rows.append(
            Row(module, tensor.type, label, tensor.shape, math.prod(tensor.shape), tensor.nbytes)
        )
    keys = {"general.architecture": "architecture", "general.name": "name"}
    facts = {label: header.metadata.get(key) for key, label in keys.items()}
    return {"file": str(path), "gguf version": header.version, **facts}, rows


def _safetensors(path: Path) -> tuple[dict[str, Any], list[Row]]:
    from ..checkpoints.hf import expert_layers, layers, model_config, quantization
    from ..checkpoints.tensor_files import TensorFiles

    directory = path if path.is_dir() else path.parent
    plan = None
    shapes: dict[str, tuple[int, int]] = {}
    kinds: dict[str, quantization.Kinds] = {}
    facts: dict[str, Any] = {"file": str(path)}
    with TensorFiles(path) as files:
        # A file without a config.json beside it is also listed, without sizes of packed weights.
        if path.is_dir() or (directory / model_config.CONFIG).is_file():
            from torch import nn

            common.quiet_transformers()
            model, plan = model_config.skeleton(directory, files)
            inventory = layers.Inventory(model, files)
            for prefix, stored in inventory.layers.items():
                layer = model.get_submodule(prefix)
                kinds[layers.stored_module(stored)] = quantization.kinds_of(layer)
                if isinstance(layer, nn.Linear):
                    shapes[layers.stored_module(stored)] = (layer.out_features, layer.in_features)
                elif isinstance(weight := getattr(layer, "weight", None), nn.Parameter):
                    shapes[layers.stored_module(stored)] = (weight.shape[0], weight.shape[1])
            for prefix, experts in inventory.experts.items():
                sizes = expert_layers.expert_shapes(model.get_submodule(prefix))
                shapes |= {
                    layers.stored_module(stored): sizes[role]
                    for (_, role), stored in experts.items()
                    if role in sizes
                }
            schemes = plan.schemes
            facts |= {
                "model": type(model).__name__,
                "format": ", ".join(dict.fromkeys(scheme.format for scheme in schemes)) or None,
                "parameters": (schemes[0].params or None) if len(schemes) == 1 else None,
            }
        modules: dict[str, dict[str, str]] = {}
        for name in files.infos:
            module, leaf = _split(name, shapes)
            modules.setdefault(module, {})[leaf] = name
        rows = []
        for module, leaves in sorted(modules.items(), key=lambda item: _natural(item[0])):
            infos = {leaf: files.infos[name] for leaf, name in leaves.items()}
            scheme = (
                None
                if plan is None
                else plan.scheme(module, kinds.get(module, quantization.LINEAR))
            )
            rows.append(_row(module, infos, scheme and scheme.format, shapes.get(module)))
    return facts, rows


def _row(
    module: str, infos: dict[str, Any], format: str | None, shape: tuple[int, int] | None
) -> Row:
    tensors = {leaf: f"{info.dtype} {list(info.shape)}" for leaf, info in infos.items()}
    nbytes = sum(info.nbytes for info in infos.values())
    plain = set(infos) <= {"weight", "bias"} and all(i.dtype in _FLOATS for i in infos.values())
    if plain and "weight" in infos:
        weight = infos["weight"]
        count = sum(math.prod(info.shape) for info in infos.values())
        return Row(module, weight.dtype, tensors, weight.shape, count, nbytes)
    if shape is None:
        return Row(module, "-", tensors, None, None, nbytes)
    return Row(module, format or "-", tensors, shape, math.prod(shape), nbytes)


def _split(name: str, shapes: dict[str, Any]) -> tuple[str, str]:
    """Module and tensor within it: "a.q_proj.weight.absmax" -> ("a.q_proj", "weight.absmax")."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if ".".join(parts[:i]) in shapes or parts[i] == "weight":
            return ".".join(parts[:i]), ".".join(parts[i:])
    return ".".join(parts[:-1]), parts[-1]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key that puts layers.2 before layers.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
