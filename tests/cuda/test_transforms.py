"""The CUDA transforms around QuIP's products, emulated or on the GPU, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qkernels as qk
from qkernels.backends.cuda import transforms
from qkernels.backends.cuda.launch import Compiled
from qkernels.backends.plan import Plan, Symbolic
from qkernels.formats import quip_sharp
from qkernels.formats import transforms as math_of
from qkernels.formats.incoherent import Side
from qkernels.layouts import weight_only as layout

from ..conftest import DEVICE
from ..plans import at_once
from ..reference import assert_fused_close

pytestmark = pytest.mark.usefixtures("without_wgmma", "poisoned")
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
#: unit roundoff: the emulator rounds as a GPU does
U = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Weight:
    """The parts of a packed weight that the launcher reads: shape, plans, and transform tensors."""

    def __init__(self, n: int, side: Side, factors: list[Tensor]) -> None:
        tensors = {"diagonal": side.diagonal} | {f"factor{i}": f for i, f in enumerate(factors)}
        if side.perm is not None:
            tensors["perm"] = side.perm.int()
        self.shape, self.plans = (n, n), {}
        self.storage = {
            f"{s}.{k}": t.to(DEVICE) for s in ("input", "output") for k, t in tensors.items()
        }
        self.orders = tuple(f.shape[0] for f in factors)


def hadamard(n: int) -> tuple[Side, Weight]:
    factors = math_of.hadamard_factors(n)
    side = Side(factors, math.sqrt(n), torch.randn(n).half())
    return side, Weight(n, side, [f for f in factors if len(f) & (len(f) - 1)])


def random(n: int) -> tuple[Side, Weight]:
    generator = torch.Generator().manual_seed(n)
    factors = [math_of.random_orthogonal(order, generator) for order in math_of.balanced(n)]
    factors = [-f.abs() if len(f) == 1 else f for f in factors]  # of order 1 they are signs, too
    side = Side(factors, 1.0, torch.randn(n).half(), torch.randperm(n))
    return side, Weight(n, side, factors)


def traits_of(side: Side, n: int, codebook: bool) -> layout.WeightOnlyTraits:
    whole = -(-n // 256) * 256 if codebook else n
    return layout.WeightOnlyTraits(
        2,
        "e8p" if codebook else "half_integer",
        "row_scale",
        whole,
        n,
        transform_scales=(side.scale,) * 2,
    )


def bound(side: Side, x: Tensor, n: int, after: bool) -> Tensor:
    """Of a float32 result: rounding of each operation on a path through the factors, times the
    terms' sizes.

    A factor's sum of `order` terms rounds as often at most, one of butterflies once a stage; and
    the diagonal, the norm and the bias once each.
    """
    positive = side._replace(factors=[f.abs() for f in side.factors], diagonal=side.diagonal.abs())
    size = positive.outer(x.abs()) if after else positive.inner(x.abs())
    return (sum(len(f) for f in side.factors) + 4) * 2.0**-24 * size


def before(x: Tensor, p: qk.PackedWeight, traits: layout.WeightOnlyTraits) -> Tensor:
    y: Tensor = at_once(Compiled, lambda plan, x: transforms.before(plan, x, p, traits), x)
    return y


def after(
    x: Tensor,
    p: qk.PackedWeight,
    traits: layout.WeightOnlyTraits,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype, device=x.device)

    def declare(plan: Plan, x: Symbolic, y: Symbolic, bias: Symbolic | None) -> None:
        transforms.after(plan, x, p, traits, bias, y)

    at_once(Compiled, declare, x, y, bias)
    return y


#: with and without a factor and an odd part, in one box or several, with every stage of a Hadamard
#: transform
SIZES = [1, 2, 8, 12, 36, 64, 72, 192, 256, 512, 576, 1376, 2048, 5120, 8192]
#: two factors or three, of order 1, odd, over 32 and over 64
RANDOM = [1, 7, 35, 64, 130, 469, 576, 1376]


@pytest.mark.parametrize(
    ("make", "n"), [(hadamard, n) for n in SIZES] + [(random, n) for n in RANDOM]
)
@dtypes
def test_both_sides(make: object, n: int, dtype: torch.dtype) -> None:
    side, p = make(n)  # type: ignore[operator]
    traits = traits_of(side, n, codebook=False)
    for m in (1, 3, 33) if n < 600 else (1, 3):
        x = torch.randn(m, n).to(dtype)
        result = before(x.to(DEVICE), p, traits).cpu().double()
        want = side.inner(x.double())
        error = (result - want).abs()
        assert bool(
            (error <= U[dtype] * want.abs() + bound(side, x.double(), n, False) + 2.0**-25).all()
        ), m

        y, bias = torch.randn(m, n), torch.randn(n).to(dtype)
        result = after(y.to(DEVICE), p, traits, bias.to(DEVICE), dtype).cpu().double()
        want = side.outer(y.double()) + bias.double()
        error = (result - want).abs()
        assert bool(
            (error <= U[dtype] * want.abs() + bound(side, y.double(), n, True) + 2.0**-23).all()
        ), m


@pytest.mark.parametrize("n", [8, 264, 768])
def test_vectors_are_in_their_order_with_zeros_behind_them(n: int) -> None:
    side, p = hadamard(n)
    x = torch.randn(3, n).half().to(DEVICE)
    plain = before(x, p, traits_of(side, n, codebook=False))
    p.plans.clear()
    result = before(x, p, traits_of(side, n, codebook=True))
    assert torch.equal(result[:, layout.codebook_order(n, DEVICE)], plain)
    behind = torch.ones(result.shape[1], dtype=torch.bool)
    behind[layout.codebook_order(n)] = False
    assert behind.sum() == -n % 256
    assert not result.cpu()[:, behind].any()


@pytest.mark.parametrize(("make", "n"), [(hadamard, 4096), (hadamard, 180), (random, 130)])
def test_a_row_does_not_depend_on_its_company(
    make: object, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on the block that computes it."""
    side, p = make(n)  # type: ignore[operator]
    traits = traits_of(side, n, codebook=False)
    x, y = torch.randn(9, n).half().to(DEVICE), torch.randn(9, n).to(DEVICE)
    alone = [before(x[i : i + 1].clone(), p, traits) for i in range(9)]
    alone_after = [after(y[i : i + 1].clone(), p, traits, None, torch.half) for i in range(9)]
    for blocks in (1024, 4):
        monkeypatch.setattr(transforms, "ROWS", blocks)
        assert torch.equal(before(x, p, traits), torch.cat(alone))
        assert torch.equal(after(y, p, traits, None, torch.half), torch.cat(alone_after))


@dtypes
def test_x_that_starts_anywhere(dtype: torch.dtype) -> None:
    """16-byte loads are used only for aligned rows; the bits are the same without them."""
    side, p = hadamard(576)
    traits = traits_of(side, 576, codebook=False)
    x = torch.randn(2 * 576 + 1).to(dtype).to(DEVICE)[1:].view(2, 576)
    assert x.data_ptr() % 16
    assert torch.equal(before(x, p, traits), before(x.clone(), p, traits))


def test_boxes() -> None:
    """For every size the box fits in the shared memory of every architecture."""
    limit = 99 * 1024
    for n in range(1, 20000, 7):
        odd = n // (n & -n)
        if odd <= math_of.LARGEST_FACTOR:
            orders = tuple(o for o in math_of.hadamard_orders(n) if o & (o - 1))
            box = transforms.box_of(n, orders)
            assert box.a0 * box.c * box.b == n
            assert box.a0 * box.b <= transforms.DENSE_BOX
            assert transforms.shared_bytes(box, orders) <= transforms.LARGEST_SHARED
    for orders in ((64, 128), (128, 64), (64, 64, 128), (64, 1, 127), (28, 16, 32), (1, 128)):
        box = transforms.box_of(math.prod(orders), orders)
        assert transforms.shared_bytes(box, orders) <= transforms.LARGEST_SHARED <= limit
    assert transforms.box_of(28672, (28,)) == (28, 8, 128, True)
    assert transforms.box_of(8192, ()) == (1, 4, 2048, True)


ODD = [
    ("quip_sharp", {"bits": 2}, 24, 8),
    ("quip_sharp", {"bits": 3}, 1, 24),
    ("quip_sharp", {"bits": 4}, 20, 264),
    ("quip_sharp", {"bits": 2}, 172, 56),
    ("quip_sharp", {"bits": 2, "checkpoint_format": "quip_sharp"}, 48, 320),
    ("quip", {"bits": 2}, 1, 1),
    ("quip", {"bits": 3}, 35, 70),
    ("quip", {"bits": 4}, 22, 130),
]


def any_weight(name: str, n: int, k: int, params: dict[str, object]) -> qk.PackedWeight:
    """A weight; random codes for QuIP#, which is faster than the search for the best codes."""
    if name == "quip":
        return qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    fmt = qk.formats.get(name)
    resolved = fmt.resolve((n, k), params)
    tensors = {}
    for key, spec in fmt.specs((n, k), resolved).items():
        dtype = spec.dtypes[0]
        if key.startswith("Qidxs"):
            limits = torch.iinfo(dtype)
            tensors[key] = torch.randint(limits.min, limits.max, spec.shape, dtype=dtype)
        else:
            tensors[key] = torch.randn(spec.shape).to(dtype)
    tensors["codebook_id"] = torch.tensor(quip_sharp.CODEBOOKS[resolved["bits"]])
    return qk.pack(name, tensors, (n, k), **params).to(DEVICE)


@pytest.mark.parametrize(("name", "params", "n", "k"), ODD, ids=str)
@dtypes
def test_odd_shapes(
    name: str, params: dict[str, object], n: int, k: int, dtype: torch.dtype
) -> None:
    p = any_weight(name, n, k, params)
    bias = torch.randn(n).to(dtype).to(DEVICE)
    # one output alone may be near zero, far below what it is a sum of
    for m in (1, 5, 19) if n > 8 else (64,):
        x = torch.randn(m, k).to(dtype).to(DEVICE)
        assert_fused_close(qk.matmul(x, p, bias, backend="cuda"), x, p, bias)
        assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("m", [2, 9])
def test_split_k(bits: int, m: int) -> None:
    """Split-K with float32 results."""
    p = any_weight("quip_sharp", 20, 4096, {"bits": bits})
    x = torch.randn(m, 4096).half().to(DEVICE)
    assert "K in 1 slices" not in str(qk.explain(p, m, backend="cuda"))
    assert_fused_close(qk.matmul(x, p, backend="cuda"), x, p)


def test_too_large_a_factor_says_so() -> None:
    p = qk.quantize(torch.randn(2, 4 * 131), "quip").to(DEVICE)
    with pytest.raises(ValueError, match=r"factors of .*131\), too large for one program"):
        qk.matmul(torch.randn(1, 4 * 131).half().to(DEVICE), p, backend="cuda")
