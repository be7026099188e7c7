"""Infinite activations: every format and backend does what `qkernels.matmul` documents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.formats.incoherent import IncoherentFormat

from ..conftest import CASES, DEVICE, case_id, k_of, layout_of

pytest.importorskip("triton")

#: formats of the two kernel families
FAMILIES = [case for case in CASES if layout_of(*case) is not None]
family_cases = pytest.mark.parametrize(("name", "params"), FAMILIES, ids=map(case_id, FAMILIES))
N, INFINITY, NAN = 40, float("inf"), float("nan")

#: row -> the infinities in it, (column, value)
Infinities = dict[int, list[tuple[int, float]]]


def planted(m: int, k: int) -> Infinities:
    """Infinities for some of m rows: one of either sign, two of one sign, and a NaN.

    For m > 2 some rows have none.
    """
    a, b, c = torch.randperm(k)[:3].tolist()
    rows: Infinities = {0: [(a, INFINITY)]}
    if m > 1:
        rows[m - 1] = [(b, -INFINITY)]
    if m > 3:
        rows[2] = [(a, INFINITY), (c, INFINITY)]
        rows[1] = [(b, NAN)]
    return rows


def put_in(x: Tensor, rows: Infinities, most: float = INFINITY) -> Tensor:
    """x with infinities, or with `most` in their places."""
    x = x.clone()
    for m, row in rows.items():
        for k, value in row:
            x[m, k] = value if most == INFINITY else math.copysign(most, value)
    return x


def classes(y: Tensor) -> Tensor:
    """0: finite; 1, -1: infinite; 2: not a number."""
    return torch.where(y.isnan(), 2, torch.where(y.isinf(), y.sign(), 0).to(torch.int64))


def outliers(p: qk.PackedWeight) -> Tensor:
    """bool (N, K): where SpQR has a sparse weight."""
    tensors = dict(p.tensors)
    tensors |= {
        "row_offsets": torch.zeros_like(tensors["row_offsets"]),
        "col_vals": tensors["col_vals"][:0],
    }
    dense = qk.pack("spqr", tensors, shape=p.shape, **p.params)
    return dense.dequantize(torch.float64) != p.dequantize(torch.float64)


def assert_as_weights_say(
    y: Tensor, x: Tensor, rows: Infinities, p: qk.PackedWeight, decode: bool
) -> None:
    """Compare rows with infinities to the dequantized weight in x's dtype (0 * infinity is NaN).

    NaN is allowed where a min or a sparse weight is multiplied separately, and, for few rows, a
    zero point. CUDA's decode kernel also does that with what it adds to integer codes. Very small
    weights are left out, because two ways to compute them may round only one
    of them to 0.
    """
    traits = qk.formats.get(p.format).weight_only_traits(p.shape, p.params)
    exact = p.dequantize(torch.float64)
    weight = exact.to(x.dtype).double()
    zeros = ("min", "point") if x.shape[0] <= 8 else ("min",)
    separate = traits.scales.zero in zeros or (decode and traits.codes.offset is not None)
    apart = torch.full(p.shape, separate, device=x.device)
    if traits.outliers:
        apart |= outliers(p)
    for m, row in rows.items():
        columns = [k for k, _ in row]
        want = classes((x[m, columns].double() * weight[:, columns]).sum(1))
        found = classes(y[m])
        tiny = (exact[:, columns].abs() < 1e-6) & (exact[:, columns] != 0)
        right = (found == want) | (apart[:, columns].any(1) & (found == 2)) | tiny.any(1)
        assert bool(right.all()), f"row {m}: {found[~right].tolist()}, not {want[~right].tolist()}"
        assert not bool(y[m].isfinite().any())


def check(
    name: str, params: dict[str, object], backend: str, m: int, invariant: bool = False
) -> None:
    p = qk.quantize(torch.randn(N, k_of(name, 192)), name, **params).to(DEVICE)
    fmt = qk.formats.get(name)
    for dtype in (torch.float16, torch.bfloat16):

        def product(x: Tensor) -> Tensor:
            return qk.matmul(x, p, backend=backend, batch_invariant=invariant)

        x = torch.randn(m, p.shape[1]).to(dtype).to(DEVICE)
        rows = planted(m, p.shape[1])
        infinite = put_in(x, rows)
        y = product(infinite)
        others, touched = [i for i in range(m) if i not in rows], list(rows)
        shared = name == "int8" and not invariant
        # In LLM.int8() a column with an outlier in any row is multiplied in 16 bits for all rows.
        same = product(put_in(x, rows, 1000) if shared else x)
        assert torch.equal(y[others], same[others]), "rows without infinities"
        if layout_of(name, params) == "weight_only" and not isinstance(fmt, IncoherentFormat):
            decode = backend == "cuda" and (m <= 16 or invariant)
            assert_as_weights_say(y, infinite, rows, p, decode)
        elif p.params.get("activation") == "static":
            saturated = product(put_in(x, rows, torch.finfo(dtype).max))
            numbers = [i for i in range(m) if not infinite[i].isnan().any()]  # no code is a NaN's
            assert torch.equal(y[numbers], saturated[numbers]), "it saturates"
        else:
            assert not bool(y[touched].isfinite().any())


@family_cases
@pytest.mark.parametrize("m", [1, 17])
def test_triton(name: str, params: dict[str, object], m: int) -> None:
    check(name, params, "triton", m)


@family_cases
def test_triton_batch_invariant(name: str, params: dict[str, object]) -> None:
    check(name, params, "triton", 5, True)


@family_cases
def test_reference(name: str, params: dict[str, object]) -> None:
    check(name, params, "reference", 5, True)
