"""The support matrix that `qkernels info --matrix` prints. Each cell asks the code itself."""

from __future__ import annotations

from typing import Any

import torch

from .. import formats, layouts
from ..backends import registry
from ..backends.problem import Problem
from ..formats import Format, GgufFormat
from ..formats.base import OWN_METHOD

COLUMNS = [
    "format", "kernels", "reference", "Triton", "CUDA", "experts", "tensor parallel", "checkpoint",
    "quantizers",
]  # fmt: skip
#: a weight that every format can hold, and a GPU that every kernel runs on
_SHAPE, _CAPABILITY = (512, 512), (9, 0)
_FAMILIES = {layouts.WEIGHT_ONLY: "weight-only", layouts.EIGHT_BIT: "8-bit", None: "torch"}


def rows() -> list[dict[str, Any]]:
    """One row a format, with its default parameters. Keys are COLUMNS; cells are text or bools."""
    return [_row(formats.get(name)) for name in formats.names()]


def text_rows() -> list[list[str]]:
    """`rows` as text: yes, or a dash for no."""
    return [
        [{True: "yes", False: "-"}.get(cell, cell) for cell in (row[column] for column in COLUMNS)]
        for row in rows()
    ]


def _row(fmt: Format) -> dict[str, Any]:
    params = fmt.resolve(_SHAPE, {})
    problem = Problem(
        fmt.name, tuple(sorted(params.items())), _SHAPE, 1, torch.float16, "cuda", _CAPABILITY
    )
    if fmt.dense and fmt.name == "bf16":
        problem = problem._replace(dtype=torch.bfloat16)
    cuts = fmt.cuts(_SHAPE, params)
    parallel = [
        word
        for word, cut, size in zip(("rows", "columns"), cuts, _SHAPE, strict=True)
        if cut < size
    ]
    cells = (
        fmt.name,
        _FAMILIES[fmt.kernel_layout(params)],
        True,
        _runs(problem, "triton"),
        _runs(problem, "cuda"),
        _runs(problem._replace(experts=8), "triton"),
        ", ".join(parallel) or False,
        _checkpoint(fmt, params),
        ", ".join(dict.fromkeys(("rounding", *fmt.algorithms))),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _runs(problem: Problem, backend: str) -> bool:
    """Whether a kernel of `backend` takes the problem, on a machine that has all it needs."""
    return any(
        kernel.backend == backend and kernel.rejects(problem) is None
        for kernel in registry.kernels_for(problem)
    )


def _checkpoint(fmt: Format, params: dict[str, Any]) -> str:
    """The `quant_method` that a saved directory names, and GGUF where such files have the type."""
    config = fmt.to_hf_config(params, [])
    method = "plain" if config is None else str(config["quant_method"])
    method = "our own" if method == OWN_METHOD else method
    return f"GGUF, {method}" if isinstance(fmt, GgufFormat) else method
