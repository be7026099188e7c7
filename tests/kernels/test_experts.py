"""The grouped kernels of mixtures of experts against the float64 oracle, expert by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qkernels as qk

from ..conftest import CASES, DEVICE, case_id, k_of, layout_of
from ..plans import at_once
from ..reference import ROUNDOFF, assert_fused_close
from .test_eight_bit import assert_close as assert_eight_bit_close

pytest.importorskip("triton")
from qkernels.backends.plan import Plan, Symbolic
from qkernels.backends.problem import Problem, problem_of
from qkernels.backends.triton import configs, eight_bit, weight_only
from qkernels.backends.triton import experts as backend
from qkernels.backends.triton.launch import Compiled

from .instances import decoder_of


def obstacle_of(name: str, params: dict[str, Any]) -> str | None:
    fmt, shape = qk.formats.get(name), (72, k_of(name, 192))
    known = {k: v for k, v in params.items() if k not in fmt.quantize_only}
    items = tuple(sorted(fmt.resolve(shape, known).items()))
    problem = Problem(name, items, shape, 8, torch.float16, DEVICE, None, experts=4)
    return backend.obstacle(problem, layout_of(name, params) or "")


LAID_OUT = [case for case in CASES if layout_of(*case) is not None]
FUSED = [case for case in LAID_OUT if obstacle_of(*case) is None]
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized tensors start as NaN, or as an integer that is no slot and no expert."""
    real = torch.empty

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        made = real(*args, **kwargs)
        if made.dtype == torch.uint8:  # scratch memory for all dtypes: NaN in float16
            return made.fill_(0x7F)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poison)


def make(name: str, params: dict[str, Any], experts: int, n: int, k: int) -> qk.PackedExperts:
    scale = torch.rand(experts, 1, 1) + 0.5  # experts differ, so that mixed-up scales show
    return qk.quantize_experts(torch.randn(experts, n, k) * scale, name, **params).to(DEVICE)


def route(tokens: int, top_k: int, experts: int) -> Tensor:
    """Distinct experts for each token, as a router chooses them."""
    return torch.rand(tokens, experts).argsort(1)[:, :top_k].to(DEVICE)


def activations(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def assert_experts_close(
    y: Tensor, x: Tensor, experts: qk.PackedExperts, ids: Tensor, bias: Tensor | None = None
) -> None:
    """Each expert's rows against the oracle of that expert; zeros where it is not here."""
    close = assert_eight_bit_close if experts.layout == "eight_bit" else assert_fused_close
    assert y.shape == (*ids.shape, experts.shape[0])
    assert y.dtype == x.dtype
    rows = x if x.dim() == 3 else x[:, None].expand(-1, ids.shape[1], -1)
    for e, p in enumerate(experts):
        if bool((ids == e).any()):
            close(y[ids == e], rows[ids == e], p, None if bias is None else bias[e])
    elsewhere = y[(ids < 0) | (ids >= experts.count)]
    assert torch.equal(elsewhere, torch.zeros_like(elsewhere))


# ---------------------------------------------------------------------- products
def with_dtypes(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Cases of one decoder alternate between float16 and bfloat16; a single case has both."""
    found, both = [], (torch.float16, torch.bfloat16)
    decoders = [decoder_of(case) for case in cases]
    for i, (case, decoder) in enumerate(zip(cases, decoders, strict=True)):
        turn = decoders[:i].count(decoder) % 2
        dtypes = both if decoders.count(decoder) == 1 else both[turn : turn + 1]
        found.append(pytest.param(*case, dtypes, id=case_id(case)))
    return found


@pytest.mark.parametrize(("name", "params", "dtypes"), with_dtypes(FUSED))
def test_every_format(name: str, params: dict[str, Any], dtypes: tuple[torch.dtype, ...]) -> None:
    # Whole tiles and a part of one, less than a block of N. test_odd_shapes has two blocks.
    k, n = k_of(name, 192), 40
    experts = make(name, params, 3, n, k)
    ids = torch.tensor([[2, 0], [-1, 2], [2, 3], [0, 2]], device=DEVICE)  # expert 1 has no token
    for dtype in dtypes:
        x, bias = activations(4, k, dtype=dtype), activations(3, n, dtype=dtype)
        y = qk.grouped_matmul(x, experts, ids, bias=bias, backend="triton")
        assert experts.layout == layout_of(name, params)
        assert_experts_close(y, x, experts, ids, bias)


@dtypes
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(1, 1, 1), (1, 4, 5), (3, 2, 4), (17, 4, 4), (33, 1, 2), (70, 2, 2)],
)
@pytest.mark.parametrize(
    "case", [("awq", {"group_size": 64}), ("fp8", {"activation": "dynamic"})], ids=case_id
)
def test_tokens_choices_experts(
    case: tuple[str, dict[str, Any]], tokens: int, top_k: int, experts: int, dtype: torch.dtype
) -> None:
    packed = make(*case, experts, 40, 64)
    ids = route(tokens, top_k, experts).to(torch.int32)
    x = activations(tokens, 64, dtype=dtype)
    assert_experts_close(qk.grouped_matmul(x, packed, ids, backend="triton"), x, packed, ids)


ODD = [
    # K that ends inside a tile, N that ends inside a block, experts whose parts begin at odd
    # addresses
    ("gptq", {"bits": 3, "group_size": 10}, 33, 70),
    ("gptq", {"bits": 4, "group_size": 8, "act_order": True}, 24, 40),
    ("gptq", {"bits": 4, "group_size": 64, "symmetric": False}, 24, 160),
    ("pack_quantized", {"bits": 4, "group_size": 24, "symmetric": False}, 24, 80),
    ("nf4", {"block_size": 64}, 7, 9),
    ("nf4", {"block_size": 64, "double_quant": True}, 3, 17),
    ("q6_k", {}, 65, 256),
    ("fp8", {"activation": "dynamic", "granularity": "block"}, 131, 150),
    ("w8a8", {}, 1, 1),
]


@dtypes
@pytest.mark.parametrize(("name", "params", "n", "k"), ODD, ids=str)
def test_odd_shapes(name: str, params: dict[str, Any], n: int, k: int, dtype: torch.dtype) -> None:
    experts = make(name, params, 3, n, k)
    ids = route(5, 2, 3)
    x = activations(5, k, dtype=dtype)
    assert_experts_close(qk.grouped_matmul(x, experts, ids, backend="triton"), x, experts, ids)


@pytest.mark.parametrize("case", [("gptq", {"group_size": 32}), ("w8a8", {})], ids=case_id)
def test_a_row_for_each_slot_and_weights(case: tuple[str, dict[str, Any]]) -> None:
    experts = make(*case, 4, 40, 64)
    ids = route(6, 2, 4)
    x = activations(6, 2, 64)
    y = qk.grouped_matmul(x, experts, ids, backend="triton")
    assert_experts_close(y, x, experts, ids)
    weights = torch.rand(6, 2, device=DEVICE)
    bias = torch.randn(4, 40, device=DEVICE)
    weighted = qk.grouped_matmul(x, experts, ids, weights, bias, backend="triton").double()
    want = (y.double() + bias[ids].double()) * weights[..., None].double()
    # y is rounded once, and so is the result
    bound = ROUNDOFF[torch.float16] * (y.double().abs() * weights[..., None] + want.abs()) + 1e-6
    assert bool(((weighted - want).abs() <= bound).all())


@pytest.mark.parametrize("lost", [-1, 3, 2**31 - 1, -(2**31)])
def test_only_experts_of_other_processes(lost: int) -> None:
    experts = make("nf4", {}, 3, 24, 64)
    ids = torch.full((3, 2), lost, device=DEVICE)
    y = qk.grouped_matmul(
        activations(3, 64), experts, ids, backend="triton", bias=activations(3, 24)
    )
    assert torch.equal(y, torch.zeros_like(y))
    weights = torch.full((3, 2), float("nan"), device=DEVICE)
    y = qk.grouped_matmul(activations(3, 64), experts, ids, weights, backend="triton")
    assert torch.equal(y, torch.zeros_like(y))


def test_all_tokens_to_one_expert_of_many() -> None:
    experts = make("awq", {"group_size": 32}, 20, 40, 64)
    ids = torch.full((40, 1), 13, device=DEVICE)
    x = activations(40, 64)
    assert_experts_close(qk.grouped_matmul(x, experts, ids, backend="triton"), x, experts, ids)


def test_configurations_met_here() -> None:
    """The tests of this file use blocks of M of every class of the table: 16, 64 and 128 rows."""
    experts = make("awq", {"group_size": 64}, 2, 40, 64)
    x, ids = activations(160, 64), route(160, 2, 2)
    assert_experts_close(qk.grouped_matmul(x, experts, ids, backend="triton"), x, experts, ids)
    met = [backend.tabled(problem_of(experts, m, x.dtype, x.device)).block_m for m in (4, 140, 320)]
    if DEVICE == "cpu":
        assert met == [
            configs.TABLE["weight_only", 0, c].block_m for c in ("decode", "middle", "prefill")
        ]


def test_entries_of_their_own() -> None:
    """EXPERTS replaces the table's entry of one architecture and class of M, but never an entry of
    batch-invariant mode.
    """
    block = {"granularity": "block", "activation": "dynamic"}
    for name, params, capability, m, key in [
        ("gptq", {"bits": 2}, (9, 0), 1200, ("weight_only.wide", 90, "prefill")),
        ("gptq", {"bits": 3}, (8, 6), 200, ("weight_only.wide", 80, "middle")),
        ("q4_1", {}, (12, 1), 8, ("weight_only", 120, "decode")),
        ("fp8", block, (8, 9), 1200, ("eight_bit.block", 80, "prefill")),
        ("fp8", block, (9, 0), 200, None),
        ("fp8", {"activation": "dynamic"}, (9, 0), 1200, ("eight_bit.fp8", 90, "prefill")),
        ("fp8", {"activation": "dynamic"}, (8, 9), 1200, None),
    ]:
        items = tuple(sorted(qk.formats.get(name).resolve((64, 256), params).items()))
        four = Problem(name, items, (64, 256), m, torch.float16, "cuda", capability, experts=4)
        one = four._replace(m=m // 4, experts=0)
        family = weight_only if name in ("gptq", "q4_1") else eight_bit
        found, theirs = backend.tabled(four), family.tabled(one)._replace(k_slices=1)
        if key is None:
            assert found == theirs
        else:
            assert found[:2] == configs.EXPERTS[key][:2], key  # stages may be fewer
            assert found != theirs, key
        same = four._replace(batch_invariant=True)
        invariant = family.tabled(one._replace(batch_invariant=True))._replace(k_slices=1)
        assert backend.tabled(same) == invariant


# ---------------------------------------------------------------------- slots
@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize(("slots", "experts"), [(1, 1), (5, 40), (200, 3), (2500, 12)])
def test_sorted_slots(slots: int, experts: int, block_m: int) -> None:
    """Every slot occurs once, in order, in a block of its expert; the rest is padding. The bound on
    the number of blocks holds.
    """
    spread = torch.randint(-2, experts + 2, (slots, 1), device=DEVICE)
    one = torch.full((slots, 1), experts - 1, device=DEVICE)
    each = torch.arange(slots, device=DEVICE)[:, None] % (experts + 1)
    for ids in (spread, one, each):
        found = at_once(Compiled, lambda plan, ids: backend.sort(plan, ids, experts, block_m), ids)
        owners = found.experts.tolist()
        rows = found.slots.view(-1, block_m)
        assert len(owners) == rows.shape[0] == backend.most_blocks(slots, experts, block_m)
        used = len(owners) - owners.count(-1)
        assert owners[:used] == sorted(owners[:used])
        bucket = torch.where((ids >= 0) & (ids < experts), ids, experts).flatten()
        for e in set(bucket.tolist()):
            mine = rows[:used][
                torch.tensor([o == e for o in owners[:used]], device=DEVICE)
            ].flatten()
            want = (bucket == e).nonzero()[:, 0]
            assert torch.equal(mine[: want.numel()].long(), want)
            assert bool((mine[want.numel() :] == slots).all())
            assert mine.numel() == -(-want.numel() // block_m) * block_m
        assert set(owners[:used]) == set(bucket.tolist())


# ---------------------------------------------------------------------- whole layers
LAYERS = [
    ("gptq", {"group_size": 32}, "silu"),
    ("q8_0", {}, "gelu"),
    ("fp8", {"activation": "dynamic", "granularity": "block"}, "silu"),
]


@dtypes
@pytest.mark.parametrize(("name", "params", "activation"), LAYERS, ids=str)
def test_whole_layer(
    name: str, params: dict[str, Any], activation: str, dtype: torch.dtype
) -> None:
    gate_up, down = make(name, params, 4, 128, 96), make(name, params, 4, 40, 64)
    ids, weights = route(7, 2, 4), torch.rand(7, 2, device=DEVICE)
    ids[3, 1], ids[5] = -1, 4
    x = activations(7, gate_up.shape[1], dtype=dtype) / 4
    y = qk.fused_moe(x, gate_up, down, weights, ids, activation, backend="triton")
    want = qk.fused_moe(x.double(), gate_up, down, weights, ids, activation, backend="reference")
    # W, h, the gated h and y are rounded to dtype, each with an error of u times its terms.
    bound = 4 * ROUNDOFF[dtype]
    one_code = 0.0
    if gate_up.layout == "eight_bit":
        # The gated h is off by up to 4 u, so some codes become their neighbours: the fraction that
        # 4 u is of the distance between codes, which is at most 1/8. These errors have either sign.
        bound += (bound * 8) ** 0.5 / 8
        # That holds for many terms of about one size. The largest terms may dominate the sum, and
        # the code of one of them may change by 1/8 of the term.
        one_code = largest_term(x, gate_up, down, weights, ids) / 8
    assert y.shape == want.shape == (7, 40)
    assert bool(torch.isfinite(y).all())
    assert (y.double() - want).norm() <= bound * want.norm() + one_code + 1e-6
    assert torch.equal(y[5], torch.zeros_like(y[5]))


@pytest.mark.parametrize("sizes", [(64, 32), (32, 64)])
def test_both_products_of_a_layer_take_the_smaller_block(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share one order of slots, and a block of more rows might not fit in shared memory."""
    gate_up, down = (make("gptq", {"group_size": 32}, 3, *shape) for shape in ((128, 32), (96, 64)))
    block_m = {gate_up.shape: sizes[0], down.shape: sizes[1]}
    tabled, sort = backend.tabled, backend.sort
    sorted_by: list[int] = []

    def tabled_by_shape(problem: Problem) -> configs.GemmConfig:
        return tabled(problem)._replace(block_m=block_m[problem.shape])

    def observed_sort(plan: Plan, ids: Symbolic, experts: int, rows: int) -> Any:
        sorted_by.append(rows)
        return sort(plan, ids, experts, rows)

    monkeypatch.setattr(backend, "tabled", tabled_by_shape)
    monkeypatch.setattr(backend, "sort", observed_sort)
    x, ids, weights = activations(5, 32), route(5, 2, 3), torch.rand(5, 2, device=DEVICE)
    y = qk.fused_moe(x, gate_up, down, weights, ids, backend="triton")
    want = qk.fused_moe(x.double(), gate_up, down, weights, ids, backend="reference")
    assert sorted_by == [32]
    assert (y.double() - want).norm() <= 4 * ROUNDOFF[torch.float16] * want.norm()


def largest_term(
    x: Tensor, gate_up: qk.PackedExperts, down: qk.PackedExperts, weights: Tensor, ids: Tensor
) -> float:
    """The largest norm of what one feature of the gated h adds to one row of y."""
    products = qk.grouped_matmul(x.double(), gate_up, ids, backend="reference")
    gate, up = products.chunk(2, -1)
    h = (torch.nn.functional.silu(gate) * up).abs()
    columns = torch.stack([p.dequantize(torch.float64).norm(dim=0) for p in down])
    local = (ids >= 0) & (ids < down.count)
    terms = h * columns[ids.where(local, 0)] * (weights * local)[..., None]
    return float(terms.max())


def test_processes_with_an_expert_each_add_up() -> None:
    weight = torch.randn(4, 128, 64), torch.randn(4, 40, 64)
    ids, weights = route(5, 2, 4), torch.rand(5, 2, device=DEVICE)
    x = activations(5, 64)
    parts = []
    for first in range(4):
        own = [qk.quantize_experts(w[first : first + 1], "nf4").to(DEVICE) for w in weight]
        parts.append(
            qk.fused_moe(x, own[0], own[1], weights, ids - first, backend="triton").double()
        )
    gate_up, down = (qk.quantize_experts(w, "nf4").to(DEVICE) for w in weight)
    whole = qk.fused_moe(x, gate_up, down, weights, ids, backend="triton").double()
    assert (sum(parts) - whole).norm() <= 2 * ROUNDOFF[torch.float16] * whole.norm()


# ---------------------------------------------------------------------- same bits
INVARIANT = [
    ("gptq", {"bits": 3, "group_size": 32, "act_order": True}),
    ("nf4", {"block_size": 32, "double_quant": True}),
    ("fp8", {"granularity": "block"}),
    ("fp8", {"activation": "dynamic"}),
    ("fp8", {"activation": "dynamic", "granularity": "block"}),
]


@pytest.mark.parametrize("case", INVARIANT, ids=case_id)
@pytest.mark.usefixtures("dots_in_one_order")
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rows_do_not_depend_on_the_batch(case: tuple[str, dict[str, Any]], backend: str) -> None:
    k = 320
    experts = make(*case, 2, 24, k)
    x, ids = activations(40, k), route(40, 2, 2)
    full = qk.grouped_matmul(x, experts, ids, backend=backend, batch_invariant=True)
    for tokens in (1, 9):
        part = qk.grouped_matmul(
            x[:tokens], experts, ids[:tokens], backend=backend, batch_invariant=True
        )
        assert torch.equal(part, full[:tokens])
    moved = ids.clone()
    moved[9:] = 0  # where the others go does not matter either
    again = qk.grouped_matmul(x, experts, moved, backend=backend, batch_invariant=True)
    assert torch.equal(again[:9], full[:9])


@pytest.mark.usefixtures("dots_in_one_order")
def test_layer_does_not_depend_on_the_batch_and_repeats_itself() -> None:
    gate_up, down = (
        make("awq", {"group_size": 32}, 3, 128, 64),
        make("awq", {"group_size": 32}, 3, 40, 64),
    )
    x, ids, weights = activations(30, 64), route(30, 2, 3), torch.rand(30, 2, device=DEVICE)

    def layer(m: int) -> Tensor:
        own = (x[:m], gate_up, down, weights[:m], ids[:m])
        return qk.fused_moe(*own, backend="triton", batch_invariant=True)

    full = layer(30)
    assert torch.equal(layer(1), full[:1])
    assert torch.equal(layer(30), full)
    plain = [qk.fused_moe(x, gate_up, down, weights, ids, backend="triton") for _ in range(3)]
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(plain[0], plain[2])


# ---------------------------------------------------------------------- graphs
@pytest.mark.parametrize("case", [("gptq", {"group_size": 32}), ("w8a8", {})], ids=case_id)
def test_allocations_do_not_depend_on_the_data(
    case: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph needs. That nothing waits for the device, tests/gpu sees."""
    gate_up, down = make(*case, 4, 128, 64), make(*case, 4, 40, 64)
    x, weights = activations(8, 64), torch.rand(8, 2, device=DEVICE)
    spread, one = route(8, 2, 4), torch.zeros(8, 2, dtype=torch.int64, device=DEVICE)
    for _ in range(3):  # the plan is kept
        qk.fused_moe(x, gate_up, down, weights, spread, backend="triton")
    sizes: list[tuple[object, ...]] = []
    real = torch.empty

    def record(*args: Any, **kwargs: Any) -> Tensor:
        made = real(*args, **kwargs)
        sizes.append((tuple(made.shape), made.dtype))
        return made

    monkeypatch.setattr(torch, "empty", record)
    for name in ("nonzero", "item", "tolist", "cpu"):  # each would wait for the device
        monkeypatch.setattr(Tensor, name, None)
    qk.fused_moe(x, gate_up, down, weights, spread, backend="triton")
    first = list(sizes)
    sizes.clear()
    qk.fused_moe(x, gate_up, down, weights, one, backend="triton")
    assert first == sizes
    assert len(first) == 2, "the result, and all else in one piece"


def test_compiles_whole_and_equals_eager() -> None:
    gate_up, down = (
        make("awq", {"group_size": 32}, 3, *shape).prepack() for shape in ((64, 32), (40, 32))
    )
    x, ids, weights = activations(4, 32), route(4, 2, 3), torch.rand(4, 2, device=DEVICE)
    torch._dynamo.reset()

    def layer(x: Tensor, ids: Tensor) -> Tensor:
        y = qk.grouped_matmul(x, gate_up, ids, backend="triton").sum(1)[:, :40]
        return y + qk.fused_moe(x, gate_up, down, weights[: x.shape[0]], ids, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, ids), layer(x, ids))
    assert torch.equal(compiled(x[:2], ids[:2]), layer(x[:2], ids[:2]))


# ---------------------------------------------------------------------- what does not fit
@pytest.mark.parametrize(
    ("name", "params", "why"),
    [
        ("spqr", {}, "each expert has sparse outliers"),
        ("quip", {"bits": 2}, "each expert's own transforms"),
        ("quip_sharp", {"bits": 2}, "each expert's own transforms"),
        ("int8", {}, "outlier columns of LLM.int8()"),
        ("w8a8", {"activation": "static", "input_scale": 0.03}, "its own input scale"),
        ("bf16", {}, "not in the weight-only family"),
    ],
)
def test_reference_only_and_says_why(name: str, params: dict[str, Any], why: str) -> None:
    experts = make(name, params, 2, 16, k_of(name, 64))
    x, ids = activations(2, experts.shape[1]), route(2, 1, 2)
    found = qk.explain(experts, m=2, device="cpu")
    assert found.kernel == "reference.experts"
    assert why in str(found)
    with pytest.raises(ValueError, match="backend: expected one that runs"):
        qk.grouped_matmul(x, experts, ids, backend="triton")
    if DEVICE == "cpu":
        assert bool(torch.isfinite(qk.grouped_matmul(x, experts, ids)).all())


def test_explain_says_what_runs() -> None:
    experts = make("gptq", {"group_size": 32}, 4, 40, 64)
    text = str(qk.explain(experts, m=8, backend="triton"))
    assert "4 experts of gptq (40, 64), M=8, float16" in text
    assert "triton.experts_weight_only: fused" in text
    assert "moves the weight to the 'weight_only' layout" in text
    assert "block_m=16" in text
    assert (
        "not triton.experts_eight_bit: gptq with these parameters is not in the eight-bit family"
        in text
    )


def test_irregular_groups_are_an_error() -> None:
    experts = []
    for e in range(2):
        p = qk.quantize(torch.randn(32, 64), "gptq", group_size=32, act_order=True)
        tensors = dict(p.tensors)
        if e:
            tensors["g_idx"] = (torch.arange(64) % 5 == 0).to(torch.int32)
        experts.append(qk.pack("gptq", tensors, shape=(32, 64), group_size=32, act_order=True))
    packed = qk.PackedExperts(experts).to(DEVICE)
    with pytest.raises(ValueError, match="experts.*: (perm|qdata|slice_group): expected"):
        qk.grouped_matmul(activations(2, 64), packed, route(2, 1, 2), backend="triton")
    x = activations(2, 64).float()
    ids = torch.tensor([[1], [0]], device=DEVICE)
    y = qk.grouped_matmul(x, packed, ids, backend="reference")
    torch.testing.assert_close(y[0, 0], x[0] @ packed.expert(1).dequantize().T)
