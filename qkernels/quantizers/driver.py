"""Runs an algorithm over a model block by block, with bounded memory, and can go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic import replacing_file
from ..formats.base import Format
from ..linear import QuantLinear
from ..packed import PackedWeight, pack
from . import algorithms, architectures
from .calibration import BlockInputs, batches_of

MANIFEST = "resume.json"


def split_options(
    fmt: Format, algorithm: type[algorithms.Algorithm], params: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was given beside the format's name -> (parameters of the format, options of the algorithm)."""
    options = {k: v for k, v in params.items() if k in algorithm.options and k not in fmt.defaults}
    for key, value in options.items():
        kind = type(algorithm.options[key])
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            options[key] = value = float(value)
        if not isinstance(value, kind):
            raise ValueError(f"{algorithm.name}: {key}: expected a {kind.__name__}, got {value!r}")
    return {k: v for k, v in params.items() if k not in options}, options


@torch.no_grad()
def quantize_calibrated(
    model: nn.Module,
    fmt: Format,
    wanted: dict[str, nn.Linear],
    calibration: Any,
    algorithm: algorithms.Algorithm,
    resume: str | os.PathLike[str] | None,
    advance: Callable[[int, int], None],
) -> None:
    """Replace each `wanted` linear (full name -> module) by a QuantLinear.

    Blocks see what the quantized blocks before them put out. Linears outside the blocks are rounded to
    nearest. `resume`: a directory that keeps every finished block; if it holds some of the same job they
    are taken from there. `advance(done, total)` is called after each block.
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    batches = batches_of(calibration, vocabulary)
    blocks = architectures.blocks_of(model)
    store = None if resume is None else _Store(Path(resume), _job(algorithm, wanted, batches))
    training = model.training
    model.eval()
    try:
        inputs = BlockInputs(model, blocks[0][1], batches)
        for number, (path, block) in enumerate(blocks):
            prefix = path + "."
            inside = {n.removeprefix(prefix): m for n, m in wanted.items() if n.startswith(prefix)}
            packed = store.load(number, block, inside) if store else None
            if packed is None:
                packed = algorithm.run(block, inside, inputs) if inside else {}
                if store:
                    store.save(number, block, packed)
            for name, weight in packed.items():
                inside[name].weight.copy_(weight.dequantize())
            if number + 1 < len(blocks):
                inputs.advance(block)
            for name, weight in packed.items():
                replace(block, name, inside[name], weight)
                del wanted[prefix + name]
            advance(number + 1, len(blocks))
        for name, linear in wanted.items():
            replace(model, name, linear, algorithm.rounded(linear.weight.detach(), name))
    finally:
        model.train(training)


def replace(root: nn.Module, name: str, linear: nn.Linear, packed: PackedWeight) -> None:
    """Put a QuantLinear with `packed` in the place of `linear`."""
    parent, _, leaf = name.rpartition(".")
    bias = None if linear.bias is None else linear.bias.detach().clone()
    layer = QuantLinear(packed, bias, dtype=linear.weight.dtype)
    setattr(root.get_submodule(parent), leaf, layer.stand_in_for(linear))


# ---------------------------------------------------------------------- resuming
def _job(
    algorithm: algorithms.Algorithm, wanted: dict[str, nn.Linear], batches: list[Tensor]
) -> dict[str, Any]:
    """What must be the same for finished blocks to be of use."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.cpu().numpy().tobytes())
    weights = hashlib.sha256()
    for name, linear in wanted.items():
        row = linear.weight.detach()[0].float().cpu()
        weights.update(name.encode() + row.numpy().tobytes())
    return {
        "format": algorithm.fmt.name,
        "params": algorithm.params,
        "algorithm": algorithm.name,
        "settings": algorithm.settings,
        "calibration": digest.hexdigest(),
        "weights": weights.hexdigest(),
    }


class _Store:
    """Finished blocks in a directory: block-N.safetensors, each written whole or not at all."""

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        manifest = path / MANIFEST
        if manifest.exists():
            try:
                found = json.loads(manifest.read_text())
            except ValueError:
                raise ValueError(f"{manifest}: expected JSON, got something else") from None
            for key, value in job.items():
                if not isinstance(found, dict) or found.get(key) != value:
                    got = found.get(key) if isinstance(found, dict) else found
                    raise ValueError(
                        f"resume: expected finished blocks of the same job in {path}, but {key} was "
                        f"{got!r} there and is {value!r} now"
                    )
        elif any(path.iterdir()):
            raise ValueError(f"resume: expected an empty directory or one of an earlier run, got {path}")
        else:
            _write(manifest, lambda p: p.write_text(json.dumps(job, indent=1)))

    def _file(self, number: int) -> Path:
        return self.path / f"block-{number}.safetensors"

    def save(self, number: int, block: nn.Module, packed: dict[str, PackedWeight]) -> None:
        tensors = {f"packed.{n}/{k}": t.contiguous() for n, p in packed.items() for k, t in p.tensors.items()}
        for name, parameter in block.named_parameters():
            if name.removesuffix(".weight") not in packed:
                tensors[f"plain.{name}"] = parameter.detach().contiguous()
        params = json.dumps({name: p.params for name, p in packed.items()})
        tensors = {k: t.clone() for k, t in tensors.items()}
        _write(self._file(number), lambda p: save_file(tensors, p, {"params": params}))

    def load(
        self, number: int, block: nn.Module, wanted: dict[str, nn.Linear]
    ) -> dict[str, PackedWeight] | None:
        """The block's packed weights, None if it is not there; sets its other parameters."""
        file = self._file(number)
        if not file.exists():
            return None
        format = json.loads((self.path / MANIFEST).read_text())["format"]
        try:
            with safe_open(file, "pt") as opened:
                params = json.loads((opened.metadata() or {})["params"])
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{file}: expected a finished block, got {error}; delete it to redo it"
            ) from None
        if set(params) != set(wanted):
            raise ValueError(f"{file}: expected the layers {sorted(wanted)}, got {sorted(params)}")
        for name, parameter in block.named_parameters():
            if name.removesuffix(".weight") not in params:
                parameter.data.copy_(tensors[f"plain.{name}"])
        packed = {}
        for name, linear in wanted.items():
            prefix = f"packed.{name}/"
            mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            mine = {k: t.to(linear.weight.device) for k, t in mine.items()}
            packed[name] = pack(format, mine, (linear.out_features, linear.in_features), **params[name])
        return packed


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    with replacing_file(path) as fresh:
        write(fresh)
