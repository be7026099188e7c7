"""The kernel of transforms, and QuIP's fused products, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

import qkernels as qk
from qkernels.backends.plan import Plan, Symbolic
from qkernels.backends.problem import problem_of
from qkernels.formats import transforms
from qkernels.formats.incoherent import Side
from qkernels.layouts import weight_only as layout
from qkernels.layouts.codecs import CODES

from ..conftest import DEVICE
from ..plans import at_once
from ..reference import ROUNDOFF, assert_fused_close

pytest.importorskip("triton")
from qkernels.backends.triton.launch import Compiled

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
#: sizes whose Hadamard matrix has one factor or several, with and without an odd part, split or not
SIZES = [8, 36, 64, 72, 192, 256, 2048, 4096, 5120, 1376]


def of_hadamard(n: int) -> tuple[Side, dict[str, torch.Tensor]]:
    factors, diagonal = transforms.hadamard_factors(n), torch.randn(n).half()
    kept = [f for f in factors if len(f) & (len(f) - 1)]
    storage = {"diagonal": diagonal} | {f"factor{i}": f for i, f in enumerate(kept)}
    return Side(factors, math.sqrt(n), diagonal), storage


def of_random(n: int) -> tuple[Side, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    factors = [transforms.random_orthogonal(order, generator) for order in transforms.balanced(n)]
    factors = [-f.abs() if len(f) == 1 else f for f in factors]  # of order 1 they are signs, too
    diagonal, perm = torch.randn(n).half(), torch.randperm(n)
    storage = {"diagonal": diagonal, "perm": perm.int()} | {
        f"factor{i}": f for i, f in enumerate(factors)
    }
    return Side(factors, 1.0, diagonal, perm), storage


CASES = [(of_hadamard, n) for n in SIZES] + [
    (of_random, n) for n in (7, 35, 64, 469, 576, 4224, 8192)
]
HALF, BRAIN = torch.float16, torch.bfloat16


def rows_and_dtypes() -> list[tuple[object, int, int, torch.dtype]]:
    """All pairs of rows and dtype on a GPU. In the interpreter dtypes take turns, and the largest
    sizes of three factors, each row of which is a program and takes seconds, have two rows.
    """
    cases = []
    for number, (make, n) in enumerate(CASES):
        rows = (2,) if DEVICE == "cpu" and make is of_random and n > 4096 else (1, 5, 18)
        for i, m in enumerate(rows):
            one = (HALF, BRAIN)[(number + i) % 2]
            cases += [
                (make, n, m, dtype) for dtype in ([one] if DEVICE == "cpu" else [HALF, BRAIN])
            ]
    return cases


@pytest.mark.parametrize(
    ("make", "n", "m", "dtype"),
    rows_and_dtypes(),
    ids=lambda v: getattr(v, "__name__", str(v).removeprefix("torch.")),
)
def test_transforms(make: object, n: int, m: int, dtype: torch.dtype) -> None:
    """Each output is a sum of n terms: rounded once, and summed in float32 from two tf32 halves."""
    from qkernels.backends.triton import transforms as launcher

    side, storage = make(n)
    u = ROUNDOFF[dtype]
    x = torch.randn(m, n).to(dtype)
    stored = on_device(storage, "input")
    found = at_once(
        Compiled,
        lambda plan, x: launcher.before(plan, x, stored, side.scale, False, m <= 16),
        x.to(DEVICE),
    )
    want = side.inner(x.double())
    # an upper bound of every output
    size = (x.double() * side.diagonal.double()).norm(dim=1, keepdim=True)
    assert bool(
        ((found.cpu().double() - want).abs() <= u * want.abs() + 2.0**-18 * size + 2.0**-24).all()
    )

    y, bias = torch.randn(m, n), torch.randn(n).to(dtype)
    out = torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)
    stored = on_device(storage, "output")
    at_once(Compiled, 
        lambda plan, y, out, bias: launcher.after(
            plan, y, out, stored, side.scale, bias, m <= 16
        ),
        y.to(DEVICE), out, bias.to(DEVICE),
    )  # fmt: skip
    want = side.outer(y.double()) + bias.double()
    size = y.double().norm(dim=1, keepdim=True) * side.diagonal.double().abs()
    assert bool(
        ((out.cpu().double() - want).abs() <= u * want.abs() + 2.0**-18 * size + 2.0**-24).all()
    )


def on_device(storage: dict[str, torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    return {f"{side}.{key}": tensor.to(DEVICE) for key, tensor in storage.items()}


def test_rows_do_not_depend_on_their_company() -> None:
    from qkernels.backends.triton import transforms as launcher

    side, storage = of_hadamard(192)
    x = torch.randn(40, 192).half().to(DEVICE)
    storage = on_device(storage, "input")

    def before(plan: Plan, x: Symbolic) -> Symbolic:
        return launcher.before(plan, x, storage, side.scale, False, True)

    assert torch.equal(at_once(Compiled, before, x[7:8])[0], at_once(Compiled, before, x)[7])


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


@pytest.mark.parametrize(("name", "params", "n", "k"), ODD, ids=str)
@pytest.mark.parametrize("m", [1, 19])
@dtypes
def test_odd_shapes(
    name: str,
    params: dict[str, object],
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
    poisoned_outputs: None,
) -> None:
    p = qk.quantize(torch.randn(n, k), name, **params).to(DEVICE)
    m = m if n > 8 else 64  # a single output may be near zero, far below the terms of its sum
    x, bias = torch.randn(m, k).to(dtype).to(DEVICE), torch.randn(n).to(dtype).to(DEVICE)
    before = {key: tensor.clone() for key, tensor in p.tensors.items()}
    assert_fused_close(qk.matmul(x, p, bias, backend="triton"), x, p, bias)
    assert p.layout == "weight_only"
    for key, tensor in before.items():
        assert torch.equal(tensor, p.tensors[key]), key


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook_codes_are_packed_and_unpacked(bits: int) -> None:
    codes = torch.randint(0, 1 << {2: 16, 3: 24, 4: 31}[bits], (5, 75), dtype=torch.int32)
    packed = layout.pack_codebook(codes, CODES["e8p", bits])
    assert packed["qdata"].shape == (3, 5, 16)
    assert torch.equal(layout.unpack_codebook(packed, CODES["e8p", bits], 5, 600), codes)


def test_codebook_order_is_a_permutation_of_each_tile() -> None:
    order = layout.codebook_order(512)
    assert torch.equal(order.sort().values, torch.arange(512))
    assert torch.equal(order[256:], order[:256] + 256)
    # word 6 is thread j = 1, p = 1, h = 0; its second code starts at s = 4
    assert order[6 * 16].item() == 16 + 2
    assert order[6 * 16 + 8].item() == 4 * 32 + 16 + 2


@dtypes
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code(bits: int, dtype: torch.dtype) -> None:
    """All 65536 codes and all residual codes: the kernel's product without the transforms."""
    from qkernels.formats import e8p

    n, k = 2048, 256
    codes = torch.arange(n * k // 8).int().view(n, k // 8)
    if bits > 2:
        codes = codes | (codes * 40503 % (256 if bits == 3 else 1 << 15) << 16)
    p = qk.quantize(torch.ones(n, k), "quip_sharp", bits=bits)
    tensors = p.tensors | qk.formats.get("quip_sharp")._stored(codes, p.params)
    tensors["Wscale"] = torch.tensor(1.0)
    p = qk.pack("quip_sharp", tensors, (n, k), bits=bits).to(DEVICE).prepack_("weight_only")
    rows = torch.arange(k // 8) * 8 + torch.arange(k // 8) * 5 % 8  # a weight of every code
    x = torch.zeros(len(rows), k, dtype=dtype)
    x[torch.arange(len(rows)), layout.codebook_order(k)[rows]] = 1
    found = inner_product(x.to(DEVICE), p).cpu()
    want = e8p.decode(codes, bits).view(n, k)[:, rows].T
    if bits == 2:
        assert torch.equal(found, want)
    else:
        assert bool(((found - want).abs() <= ROUNDOFF[dtype] * want.abs()).all())


def inner_product(x: torch.Tensor, p: qk.PackedWeight) -> torch.Tensor:
    """The kernel's result for x in kernel order, float32, before the output's transform."""
    from qkernels.backends.triton import weight_only

    problem = problem_of(p, x.shape[0], x.dtype, x.device)
    weight = weight_only.arguments(p, weight_only.traits_of(problem))
    config = weight_only.tabled(problem)
    y = torch.empty(x.shape[0], p.shape[0], dtype=torch.float32, device=x.device)
    at_once(
        Compiled,
        lambda plan, x, y: weight_only._launch(plan, x, x, y, None, weight, config, problem),
        x,
        y,
    )
    return y


def test_what_is_too_large_says_so() -> None:
    p = qk.quantize(torch.randn(2, 4 * 131), "quip")
    with pytest.raises(ValueError, match=r"factors of .*131\), too large for one program") as error:
        qk.matmul(torch.randn(1, 4 * 131).half().to(DEVICE), p.to(DEVICE), backend="triton")
    assert "triton" in str(error.value)
