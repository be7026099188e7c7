"""llama.cpp's importance matrix: the mean square of each input feature of each linear layer.

Its file is a GGUF with `general.type` "imatrix". Tensor `t` of the model has two tensors in it:
`t.in_sum2`, float32 (experts, K), the sums of squares, and `t.counts`, float32 (experts, 1), the
numbers of inputs. ggml leaves out outer dimensions of 1, so layers without experts have (K) and
(1).

Source: llama.cpp's tools/imatrix, the format it writes since 2025.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.atomic import replacing_file
from ..nn.linear import is_linear, linear_of
from .calibration import batches_of

_SUMS, _COUNTS = ".in_sum2", ".counts"
#: more inputs than any calibration has
_MAX_INPUTS = 1 << 40


class ImportanceMatrix:
    """The calibration data that `qkernels.quantize_model` may take for GGUF's types.

    Attributes:
        means: full name of a module -> mean square of its inputs, float32 (K).
        tokens: number of tokens behind the means.
    """

    def __init__(self, means: Mapping[str, Tensor], tokens: int) -> None:
        self.means, self.tokens = dict(means), tokens

    @classmethod
    @torch.no_grad()
    def collect(cls, model: nn.Module, calibration: Any) -> ImportanceMatrix:
        """The matrix of all linear layers of `model`, over token ids (samples, tokens)."""
        sums: dict[str, Tensor] = {}
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        batches = batches_of(calibration, vocabulary)

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                square = args[0].reshape(-1, args[0].shape[-1]).double().square().sum(0)
                sums[name] = sums[name] + square if name in sums else square

            return hook

        layers = [(name, module) for name, module in model.named_modules() if is_linear(module)]
        hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers]
        training, device = model.training, next(model.parameters()).device
        model.eval()
        try:
            for batch in batches:
                model(batch.to(device))
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        tokens = sum(batch.numel() for batch in batches)
        return cls({name: (total / tokens).float() for name, total in sums.items()}, tokens)

    def of(self, name: str, features: int) -> Tensor:
        """The means of the layer `name`, float32 (features).

        Raises ValueError if there are none, or not one for each input feature.
        """
        if name not in self.means:
            raise ValueError(f"importance matrix: expected an entry for {name}, got none")
        mean = self.means[name]
        if mean.shape != (features,):
            raise ValueError(
                f"importance matrix: {name}: expected {features} values, got {tuple(mean.shape)}"
            )
        return mean

    def save(self, path: str | os.PathLike[str], model: nn.Module, chunk: int = 512) -> None:
        """Write a file for llama.cpp's `--imatrix` options, completely or not at all.

        chunk: tokens of a chunk, as the file states it.
        """
        import gguf

        from ..checkpoints.gguf.writer import write_out

        names = _stored_names(model)
        with replacing_file(Path(path)) as fresh:
            writer = gguf.GGUFWriter(str(fresh), arch="imatrix")
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", ["qkernels"])
            writer.add_uint32("imatrix.chunk_count", max(1, self.tokens // chunk))
            writer.add_uint32("imatrix.chunk_size", chunk)
            for name, mean in self.means.items():
                if name in names:
                    sums = (mean.double() * self.tokens).float().cpu()
                    writer.add_tensor(names[name] + _SUMS, sums[None].numpy())
                    writer.add_tensor(
                        names[name] + _COUNTS, torch.tensor([[float(self.tokens)]]).numpy()
                    )
            write_out(writer)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> ImportanceMatrix:
        """Read an importance matrix file for `model`.

        Entries of mixtures of experts are ignored. The entry of a layer has one row, which
        llama.cpp writes with or without a dimension for it.

        Raises ValueError naming file and tensor if the file is damaged or no importance matrix.
        """
        from ..checkpoints.files import open_regular, read_part
        from ..checkpoints.gguf.header import read_header

        path = Path(path)
        header = read_header(path)
        if (kind := header.metadata.get("general.type")) != "imatrix":
            raise ValueError(f"{path}: general.type: expected 'imatrix', got {kind!r}")
        stored = {tensor.name: tensor for tensor in header.tensors}

        def values(file: BufferedReader, name: str, columns: int) -> Tensor:
            tensor = stored.get(name)
            if (
                tensor is None
                or tensor.type != "F32"
                or tensor.shape != (1,) * (len(tensor.shape) - 1) + (columns,)
            ):
                got = "none" if tensor is None else f"{tensor.type} {tensor.shape}"
                raise ValueError(
                    f"{path}: {name}: expected float32 of shape (1, {columns}), got {got}"
                )
            raw = read_part(file, f"{path}: {name}", tensor.offset, tensor.nbytes)
            numbers = torch.frombuffer(raw, dtype=torch.float32)
            if not bool(torch.isfinite(numbers).all()) or bool((numbers < 0).any()):
                raise ValueError(f"{path}: {name}: expected finite values >= 0, got others")
            return numbers

        means, tokens = {}, 0
        with open_regular(path) as file:
            for module, name in _stored_names(model).items():
                if name + _SUMS not in stored:
                    continue
                features = linear_of(model.get_submodule(module)).in_features
                sums, count = values(file, name + _SUMS, features), values(file, name + _COUNTS, 1)
                if not 1 <= float(count) <= _MAX_INPUTS:
                    raise ValueError(
                        f"{path}: {name}{_COUNTS}: expected 1 to {_MAX_INPUTS} inputs, "
                        f"got {float(count):g}"
                    )
                means[module], tokens = sums / count, max(tokens, int(count))
        if not means:
            raise ValueError(
                f"{path}: expected entries for layers of this model, got {len(stored)} others"
            )
        return cls(means, tokens)


def _stored_names(model: nn.Module) -> dict[str, str]:
    """Full name of each linear layer -> name of its weight in GGUF."""
    import gguf

    from ..checkpoints.gguf.writer import kind_of

    kinds = {str(name): kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    config: Any = model.config
    table = gguf.get_tensor_name_map(kinds[kind_of(model)], config.num_hidden_layers)
    names = {}
    for name, module in model.named_modules():
        stored = table.get_name(name) if is_linear(module) else None
        if stored is not None:
            names[name] = stored + ".weight"
    return names
