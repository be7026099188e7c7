"""Importance matrices: `ImportanceMatrix.load` for a model, and rounding with the result."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qkernels as qk
from qkernels.checkpoints.gguf.header import read_header
from qkernels.quantizers.importance import _stored_names

from ..tiny import ids, tiny_model
from . import documents
from .documents import Tree
from .oracle import Finding, attempt
from .work import place

FILE = "imatrix.gguf"
WORDS = [
    "imatrix.chunk_count",
    "imatrix.datasets",
    "blk.0.ffn_up_exps.weight.in_sum2",
    "blk.9.ffn_up.weight.counts",
]


@cache
def _model() -> Any:
    return tiny_model(num_hidden_layers=1, hidden_size=32, intermediate_size=64)


def seeds(scratch: Path) -> dict[str, Tree]:
    """One file that we write."""
    path = scratch / FILE
    qk.ImportanceMatrix.collect(_model(), ids(60).view(3, 20)).save(path, _model())
    return {"plain": {FILE: documents.gguf_tree(path.read_bytes(), str(path))}}


def run(tree: Tree, edits: list[list[Any]], folder: Path) -> None:
    """Load the file and use one of its entries."""
    place(folder, documents.files_of(tree, edits))
    path, model = folder / FILE, _model()
    matrix = attempt(
        "ImportanceMatrix.load", (str(folder),), lambda: qk.ImportanceMatrix.load(path, model)
    )
    if matrix is None:
        return
    if type(matrix.tokens) is not int or matrix.tokens < 1:
        raise Finding("ImportanceMatrix.load: tokens is no positive int", repr(matrix.tokens))
    _compare(path, matrix, model)
    for name, mean in matrix.means.items():
        linear = model.get_submodule(name)
        good = mean.shape == (linear.in_features,) and mean.dtype == torch.float32
        if not good or not bool(torch.isfinite(mean).all()) or bool((mean < 0).any()):
            raise Finding(
                "ImportanceMatrix.load: means that are none", f"{name}: {mean.shape} {mean}"
            )
    name = next(iter(matrix.means))
    linear = model.get_submodule(name)
    packed = qk.quantize(linear.weight, "q4_0", importance=matrix.of(name, linear.in_features))
    if not bool(torch.isfinite(packed.dequantize()).all()):
        raise Finding("quantize with importance: values that are not finite", name)


def _compare(path: Path, matrix: qk.ImportanceMatrix, model: Any) -> None:
    """Compare with the sums in the file, divided by the count."""
    content = path.read_bytes()
    stored = {tensor.name: tensor for tensor in read_header(path).tensors}
    names = _stored_names(model)
    for name, mean in matrix.means.items():
        sums, counts = (
            np.frombuffer(content[t.offset :][: t.nbytes], np.float32)
            for t in (stored[f"{names[name]}.in_sum2"], stored[f"{names[name]}.counts"])
        )
        if counts.size != 1 or not np.array_equal(mean.numpy(), sums / counts):
            raise Finding(
                "ImportanceMatrix.load: other means than the file's", f"{name}: {counts} {mean}"
            )
