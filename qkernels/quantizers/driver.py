"""Runs an algorithm over a model block by block, with bounded memory, and can resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoints import atomic
from ..checkpoints.tensor_files import write_tensors
from ..formats.base import Format
from ..nn.linear import QuantLinear
from ..version import __version__
from ..weights.packed import PackedWeight, pack
from . import algorithms, architectures, digest
from .calibration import BlockInputs, batches_of

MANIFEST = "resume.json"
#: version of the files of finished blocks
_FILES = 2


def split_options(
    fmt: Format, algorithm: type[algorithms.Algorithm], params: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `params` into (parameters of the format, options of the algorithm)."""
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
    linears: dict[str, nn.Linear],
    calibration: Any,
    algorithm: algorithms.Algorithm,
    resume: str | os.PathLike[str] | None,
    advance: Callable[[int, int], None],
) -> None:
    """Replace linear layers by QuantLinear, block by block.

    Each block sees the outputs of the quantized blocks before it. Layers outside the blocks are
    rounded to nearest.

    Args:
        linears: full name -> layer to replace; emptied on the way.
        calibration: token ids, as `calibration.batches_of` takes them.
        resume: directory for finished blocks; blocks of the same job that it holds are loaded
            instead of quantized.
        advance: called with (blocks done, blocks) after each block.
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    batches = batches_of(calibration, vocabulary)
    blocks = architectures.blocks_of(model)
    store = (
        None
        if resume is None
        else _Store(Path(resume), _job(model, algorithm, linears, batches), fmt)
    )
    training = model.training
    model.eval()
    try:
        inputs = BlockInputs(model, blocks[0][1], batches)
        for number, (path, block) in enumerate(blocks):
            prefix = path + "."
            layers = {n.removeprefix(prefix): m for n, m in linears.items() if n.startswith(prefix)}
            packed = store.load(number, block, layers) if store else None
            if packed is None:
                packed = algorithm.run(block, layers, inputs) if layers else {}
                if store:
                    store.save(number, block, packed)
            for name, weight in packed.items():
                layers[name].weight.copy_(weight.dequantize())
            if number + 1 < len(blocks):
                inputs.advance(block)
            for name, weight in packed.items():
                replace(block, name, layers[name], weight)
                del linears[prefix + name]
            advance(number + 1, len(blocks))
        for name, linear in linears.items():
            replace(model, name, linear, algorithm.rounded(linear.weight.detach(), name))
    finally:
        model.train(training)


def replace(root: nn.Module, name: str, linear: nn.Linear, packed: PackedWeight) -> None:
    """Replace `linear`, the module `name` of `root`, by a QuantLinear with `packed`."""
    parent, _, leaf = name.rpartition(".")
    bias = None if linear.bias is None else linear.bias.detach().clone()
    layer = QuantLinear(packed, bias, dtype=linear.weight.dtype)
    setattr(root.get_submodule(parent), leaf, layer.stand_in_for(linear))


# ---------------------------------------------------------------------- resuming
def _job(
    model: nn.Module,
    algorithm: algorithms.Algorithm,
    linears: dict[str, nn.Linear],
    batches: list[Tensor],
) -> dict[str, Any]:
    """Everything that must be equal before finished blocks can be used.

    torch's version and the device are left out: they add in another order, but a block quantized
    elsewhere is as good. Only with the same version and device is the result equal to that of an
    uninterrupted run bit for bit.
    """
    job = {
        "version": f"{__version__}, files {_FILES}",
        "format": algorithm.fmt.name,
        "params": algorithm.params,
        "algorithm": algorithm.name,
        "settings": algorithm.settings,
        "layers": sorted(linears),
        "calibration": digest.of_tensors((str(i), batch) for i, batch in enumerate(batches)),
        "model": digest.of_model(model),
    }
    return json.loads(digest.as_json(job))  # type: ignore[no-any-return]


class _Store:
    """Finished blocks in a directory: block-N.safetensors, each written whole or not at all."""

    def __init__(self, path: Path, job: dict[str, Any], fmt: Format) -> None:
        self.path, self.fmt = path, fmt
        #: stored in each file, to tell which job the file belongs to
        self.job = hashlib.sha256(digest.as_json(job).encode()).hexdigest()
        path.mkdir(parents=True, exist_ok=True)
        manifest = path / MANIFEST
        if manifest.exists():
            try:
                stored = json.loads(manifest.read_text())
            except (ValueError, OSError):
                raise ValueError(f"{manifest}: expected JSON, got something else") from None
            for key, value in job.items():
                if not isinstance(stored, dict) or stored.get(key) != value:
                    got = stored.get(key) if isinstance(stored, dict) else stored
                    raise ValueError(
                        f"resume: expected finished blocks of the same job in {path}, but {key} "
                        f"was {got!r:.200} there and is {value!r:.200} now"
                    )
        elif any(not file.name.startswith(atomic.PREFIX) for file in path.iterdir()):
            raise ValueError(
                f"resume: expected an empty directory or one of an earlier run, got {path}"
            )
        else:
            with atomic.replacing_file(manifest) as fresh:
                fresh.write_text(json.dumps(job, indent=1))

    def _file(self, number: int) -> Path:
        return self.path / f"block-{number}.safetensors"

    def save(self, number: int, block: nn.Module, packed: dict[str, PackedWeight]) -> None:
        """Write the block's packed weights and its other parameters."""
        tensors = {
            f"packed.{n}/{k}": t.contiguous()
            for n, p in packed.items()
            for k, t in p.tensors.items()
        }
        for name, parameter in _unpacked_parameters(block, packed).items():
            tensors[f"plain.{name}"] = parameter.detach().contiguous()
        params = json.dumps({name: p.params for name, p in packed.items()})
        tensors = {k: t.clone() for k, t in tensors.items()}
        metadata = {"params": params, "job": self.job, "block": str(number)}
        with atomic.replacing_file(self._file(number)) as fresh:
            write_tensors(tensors, fresh, metadata)

    def load(
        self, number: int, block: nn.Module, layers: dict[str, nn.Linear]
    ) -> dict[str, PackedWeight] | None:
        """The block's packed weights; also sets its other parameters. None if there is no file.

        Raises ValueError naming the file, before anything is set, unless the file holds this block
        of this job completely.
        """
        file = self._file(number)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return self._restore(number, metadata, tensors, block, layers)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{file}: expected a finished block, got {error}; delete it to redo it"
            ) from None

    def _restore(
        self,
        number: int,
        metadata: dict[str, str],
        tensors: dict[str, Tensor],
        block: nn.Module,
        layers: dict[str, nn.Linear],
    ) -> dict[str, PackedWeight]:
        """Packed weights from a file's metadata and tensors; sets the block's other parameters."""
        for key, value in {"job": self.job, "block": str(number)}.items():
            if metadata.get(key) != value:
                raise ValueError(
                    f"one of another {key}: expected {value}, got {metadata.get(key, 'none')}"
                )
        params = json.loads(metadata.get("params", "null"))
        if not isinstance(params, dict) or not all(
            isinstance(layer_params, dict) for layer_params in params.values()
        ):
            raise ValueError(f"params: expected an object of objects, got {params!r:.80}")
        if set(params) != set(layers):
            raise ValueError(f"layers {sorted(params)}, expected {sorted(layers)}")
        packed = {}
        for name, linear in layers.items():
            prefix, device = f"packed.{name}/", linear.weight.device
            keys = [key for key in tensors if key.startswith(prefix)]
            layer_tensors = {k.removeprefix(prefix): tensors.pop(k).to(device) for k in keys}
            shape = (linear.out_features, linear.in_features)
            try:
                packed[name] = pack(self.fmt.name, layer_tensors, shape, **params[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        plain = _unpacked_parameters(block, packed)
        differing = sorted(set(tensors) ^ {f"plain.{name}" for name in plain})
        if differing:
            got = "one that the block has not" if differing[0] in tensors else "none"
            raise ValueError(f"{differing[0]}: expected the block's own tensors, got {got}")
        for name, parameter in plain.items():
            tensor = tensors[f"plain.{name}"]
            if (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):
                raise ValueError(
                    f"plain.{name}: expected {parameter.dtype} {tuple(parameter.shape)}, got "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
        for name, parameter in plain.items():
            parameter.data.copy_(tensors[f"plain.{name}"])
        return packed


def _unpacked_parameters(
    block: nn.Module, packed: Mapping[str, PackedWeight]
) -> dict[str, nn.Parameter]:
    """The block's parameters, except the weights in `packed`."""
    return {n: p for n, p in block.named_parameters() if n.removesuffix(".weight") not in packed}
