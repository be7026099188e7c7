"""`qkernels.pack` of every format with tensors or parameters that have been changed.

A tensor may have another dtype, shape, stride, device or value. The tree of a seed has one file,
"weight": {"format", "shape", "params", "tensors": {name: entry}}. An entry says how to change the
sound tensor `of` the same seed: {"of", "dtype", "shape", "view", "put": [[index, value], ...]}. An
accepted weight must dequantize, multiply, and keep its bytes in the kernel layout.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qkernels as qk
from qkernels import formats

from ..conftest import CASES, case_id, k_of, layout_of
from .documents import Tree
from .oracle import Finding, attempt

N, K = 16, 64
VIEWS = (
    "plain",
    "sliced",
    "transposed",
    "expanded",
    "offset",
    "sparse",
    "meta",
    "parameter",
    "grad",
    "list",
    "none",
)
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
          "bool", "complex64", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32",
          "float8_e8m0fnu")  # fmt: skip
WORDS = [*VIEWS, *DTYPES]
_MOST = 1 << 20


@cache
def _sound() -> dict[str, qk.PackedWeight]:
    torch.manual_seed(0)
    found = {}
    for case in CASES:
        name, params = case
        found[case_id(case)] = qk.quantize(torch.randn(N, k_of(name, K)) * 0.1, name, **params)
    return found


def seeds(scratch: Path) -> dict[str, Tree]:
    """One tree for each case of tests/conftest.py."""
    trees = {}
    for case, packed in _sound().items():
        entries = {
            name: {"of": name, "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape),
                   "view": "plain", "put": [[0, None]]}
            for name, t in packed.tensors.items()
        }  # fmt: skip
        weight = {
            "format": packed.format,
            "shape": list(packed.shape),
            "params": packed.params,
            "tensors": entries,
        }
        trees[case] = {"weight": {**weight, "case": case}}
    return trees


def run(tree: Tree, edits: list[list[Any]], folder: Path) -> None:
    """Pack the weight and use it."""
    weight = tree.get("weight")
    if not isinstance(weight, dict) or not isinstance(weight.get("tensors"), dict):
        return
    case = weight["case"] if isinstance(weight.get("case"), str) else ""
    tensors = {name: _tensor(case, entry) for name, entry in weight["tensors"].items()}
    params, shape, format = weight.get("params"), weight.get("shape"), weight.get("format")
    if (
        not isinstance(params, dict)
        or {"format", "tensors", "shape"} & set(params)
        or not isinstance(shape, list)
    ):
        return  # no call that Python takes
    names = (format, "format:") if isinstance(format, str) else ("format:",)
    packed = attempt("pack", names, lambda: qk.pack(format, tensors, tuple(shape), **params))
    if packed is not None and not any(t.is_meta for t in tensors.values()):
        _use(packed, any(edit[1][-1:] == ["view"] for edit in edits if isinstance(edit[1], list)))


def _tensor(case: str, entry: Any) -> Any:
    """The tensor that an entry describes; any object if the entry is nonsense."""
    if not isinstance(entry, dict) or case not in _sound():
        return entry
    tensors = _sound()[case].tensors
    made = tensors[entry["of"] if entry.get("of") in list(tensors) else next(iter(tensors))].clone()
    dtype, shape, view = (entry.get(key) for key in ("dtype", "shape", "view"))
    if isinstance(dtype, str) and dtype in DTYPES:
        made = made.to(getattr(torch, dtype))
    made = _reshaped(made, shape if isinstance(shape, list) else [])
    for pair in entry["put"] if isinstance(entry.get("put"), list) else ():
        _put(made, pair)
    return _viewed(made, view)


def _reshaped(tensor: Tensor, shape: list[Any]) -> Tensor:
    """A tensor of this shape that repeats values of `tensor`; one value if it is too large."""
    sizes = [s for s in shape if type(s) is int and 0 <= s < 2**40][:6]
    if list(tensor.shape) == sizes:
        return tensor
    count, flat = math.prod(sizes), tensor.reshape(-1)
    if count >= 2**60 or (count and not flat.numel()):
        return tensor
    if count > _MOST:
        return flat[0].expand(sizes)
    index = torch.arange(count) % max(1, flat.numel())
    return (
        flat.view(torch.uint8 if flat.element_size() == 1 else flat.dtype)[index]
        .view(flat.dtype)
        .reshape(sizes)
    )


def _put(tensor: Tensor, pair: Any) -> None:
    """Put a value at an index of the flattened tensor."""
    try:
        index, value = pair
        tensor.view(-1)[int(index) % tensor.numel()] = value
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError, OverflowError):
        return  # no value of this dtype


def _viewed(tensor: Tensor, view: Any) -> Any:
    if view == "sliced" and tensor.numel():
        wide = torch.zeros([2 * s for s in tensor.shape], dtype=tensor.dtype)
        part = wide[tuple(slice(0, None, 2) for _ in tensor.shape)]
        part.copy_(tensor)
        return part
    if view == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if view == "expanded" and tensor.numel():
        return tensor.reshape(-1)[0].expand(tensor.shape)
    if view == "offset" and tensor.numel():
        longer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        longer.copy_(tensor)
        return longer
    if view == "sparse" and tensor.is_floating_point() and tensor.element_size() > 1:
        return tensor.to_sparse()
    if view == "grad" and tensor.is_floating_point():
        return tensor.requires_grad_()
    others = {"meta": lambda: tensor.to("meta"),
              "parameter": lambda: torch.nn.Parameter(tensor, requires_grad=False),
              "list": tensor.tolist, "none": lambda: None}  # fmt: skip
    return others[view]() if isinstance(view, str) and view in others else tensor


def _use(packed: qk.PackedWeight, fused: bool) -> None:
    """Dequantize, multiply, and prepack; with `fused`, multiply by the kernel, too."""
    n, k = packed.shape
    if n * k > _MOST:
        return
    weight = packed.dequantize()
    if tuple(weight.shape) != (n, k):
        raise Finding(
            f"{packed.format}: dequantize: another shape",
            f"{tuple(weight.shape)} instead of {(n, k)}",
        )
    finite = bool(torch.isfinite(weight).all())
    if not finite and not formats.get(packed.format).dense:
        raise Finding(
            f"{packed.format}: dequantize: values that are not finite", repr(packed.params)
        )
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    y = qk.matmul(x, packed, backend="reference")
    if tuple(y.shape) != (3, n):
        raise Finding(f"{packed.format}: matmul: another shape", f"{tuple(y.shape)}")
    layout = layout_of(packed.format, packed.params)
    if layout is None or formats.get(packed.format).obstacle(packed.shape, packed.params):
        return
    before = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    packed.prepack_(layout)
    for name, tensor in packed.tensors.items():
        old = before[name]
        if tensor.dtype != old.dtype or tensor.shape != old.shape or not _same_bits(tensor, old):
            raise Finding(
                f"{packed.format}: {name}: other bytes after the kernel's layout", f"{old} {tensor}"
            )
    if fused and n * k <= 8192:
        _multiply(packed, x, y, weight)


def _multiply(packed: qk.PackedWeight, x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Compare the fused kernel's product with the reference's.

    The error may be that of float32 sums, relative to the sum of magnitudes.
    """
    product = qk.matmul(x.half(), packed, backend="triton").float()
    scale = (x.abs() @ weight.abs().T).clamp_min(1e-6)
    if not bool(((product - y).abs() <= 0.02 * scale + 0.02 * y.abs().max()).all()) and bool(
        (scale < 6e4).all()
    ):
        raise Finding(f"{packed.format}: another product by the fused kernel", f"{product} {y}")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous(), other.contiguous()
    return bool(torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)))
