"""Launches the kernels of mixtures of experts: the sort of slots by expert, then one product for
all experts.

A product is two launches, a whole layer five. The shapes alone determine the size of everything
they allocate, so the host never waits for the device, and a CUDA graph can hold all of it. If the
codes of quantized activations would need more than the workspace, the tokens are computed in
slices, one after another.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import formats, layouts
from ...layouts import eight_bit as codes_layout
from ..plan import Plan, Plans, Symbolic, Y
from ..weight_only import traits_of
from . import autotune, configs, eight_bit, interpreted, weight_only
from .launch import Compiled, overtakes, start

if TYPE_CHECKING:
    from ...triton_kernels.weight_only import Method
    from ...weights.experts import PackedExperts
    from ..problem import Problem

#: slots that `sort_slots` reads at a time
_CHUNK = 1024
#: features of one program of the kernels `gate` and `combine`
_BLOCK = 1024


class Sorted(NamedTuple):
    """The slots sorted by expert, in the form of triton_kernels/experts.py.

    Products with the same ids and the same block_m can use the same one.
    """

    slots: Symbolic
    experts: Symbolic
    block_m: int


def obstacle(problem: Problem, layout: str) -> str | None:
    """Why the kernel of experts cannot take a problem that the kernel for one matrix takes.

    None if it can.
    """
    fmt, params = formats.get(problem.format), dict(problem.params)
    if layout == layouts.WEIGHT_ONLY:
        traits = fmt.weight_only_traits(problem.shape, params)
        if traits.outliers:
            return "each expert has sparse outliers, another number of them"
        if traits.transform_scales is not None:
            return "x and y go through each expert's own transforms"
    else:
        codes = fmt.eight_bit_traits(problem.shape, params)
        if codes.threshold > 0:
            return (
                "the outlier columns of LLM.int8() are those of a batch,"
                " and each expert has another"
            )
        if codes.activation == "tensor":
            return "each expert has its own input scale, and x is quantized once for all of them"
    return None


@lru_cache(maxsize=4096)
def tabled(problem: Problem) -> configs.GemmConfig:
    """The table's entry for the rows that one expert gets on average; K is not split."""
    rows = -(-problem.m // problem.experts)
    family = eight_bit if _eight_bit(problem) else weight_only
    return family.tabled(problem._replace(m=rows))._replace(k_slices=1)


def _eight_bit(problem: Problem) -> bool:
    layout = formats.get(problem.format).kernel_layout(dict(problem.params))
    return layout == layouts.EIGHT_BIT


def configuration(problem: Problem) -> str:
    """The configuration, as `explain` shows it."""
    config = tabled(problem)
    source = (
        "batch-invariant" if problem.batch_invariant else "from the table; experts are not tuned"
    )
    shown = ", ".join(f"{k}={v}" for k, v in config._asdict().items())
    return f"{shown} ({source}); {autotune.first_call_words(problem, config)}"


def run(
    x: Tensor,
    experts: PackedExperts,
    ids: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    problem: Problem,
) -> Tensor:
    """The product of each slot with its expert: y (T, top_k, N).

    x (T, K) or (T, top_k, K), ids and weights (T, top_k), bias (E, N).
    """
    return Grouped(problem)(x, experts, ids, weights, bias)


class Grouped(Plans):
    """`run` for given experts and operands of one shape: a `registry.BoundExperts`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._problem = problem

    def __call__(
        self,
        x: Tensor,
        experts: PackedExperts,
        ids: Tensor,
        weights: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        problem, config = self._problem, tabled(self._problem)
        operands = (x, ids, weights, None if bias is None else bias.contiguous())

        shape = (*ids.shape, experts.shape[0])
        y: Tensor = autotune.timed_first(
            problem,
            config,
            lambda: self.add(
                Compiled, lambda plan: declare(plan, experts, config, problem), operands, shape
            )[Y],
        )
        return y

    def run(
        self, x: Tensor, ids: Tensor, weights: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """As in `registry.BoundExperts`."""
        memory = self.start(x, ids, weights, None if bias is None else bias.contiguous())
        return None if memory is None else memory[Y]


def declare(
    plan: Plan, experts: PackedExperts, config: configs.GemmConfig, problem: Problem
) -> None:
    """The product of each slot with its expert. Operands: x, ids, weights or None, bias or None."""
    *rows, bias = plan.operands

    def product(x: Symbolic, ids: Symbolic, weights: Symbolic | None, y: Symbolic) -> None:
        slots = sort(plan, ids, experts.count, config.block_m)
        _product(plan, x, experts, slots, ids, weights, bias, problem, config, y)

    plan.by_rows(product, *rows, plan.y)


class Layer(Plans):
    """`fused` for given experts, activation and operands of one shape: a `registry.BoundLayer`."""

    def __init__(self, activation: str, problems: tuple[Problem, Problem]) -> None:
        super().__init__()
        self._activation, self._problems = activation, problems

    def __call__(
        self, x: Tensor, gate_up: PackedExperts, down: PackedExperts, weights: Tensor, ids: Tensor
    ) -> Tensor:
        first, second = (tabled(problem) for problem in self._problems)
        # Both products use one order of slots. A block with fewer rows always fits.
        block_m = min(first.block_m, second.block_m)
        sizes = (first._replace(block_m=block_m), second._replace(block_m=block_m))

        def declare(plan: Plan) -> None:
            def layer(x: Symbolic, weights: Symbolic, ids: Symbolic, y: Symbolic) -> None:
                _layer(
                    plan, x, gate_up, down, weights, ids, self._activation, self._problems, sizes, y
                )

            plan.by_rows(layer, *plan.operands, plan.y)

        operands, shape = (x, weights, ids), (x.shape[0], down.shape[0])
        y: Tensor = self.add(Compiled, declare, operands, shape)[Y]
        return y

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor | None:
        """As in `registry.BoundLayer`."""
        memory = self.start(x, weights, ids)
        return None if memory is None else memory[Y]


def fused(
    x: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    problems: tuple[Problem, Problem],
) -> Tensor:
    """A whole layer: gate_up, activation, down, and the weighted sum over the choices.

    x (T, K), weights and ids (T, top_k) -> y (T, N of down).
    """
    return Layer(activation, problems)(x, gate_up, down, weights, ids)


def _layer(
    plan: Plan,
    x: Symbolic,
    gate_up: PackedExperts,
    down: PackedExperts,
    weights: Symbolic,
    ids: Symbolic,
    activation: str,
    problems: tuple[Problem, Problem],
    sizes: tuple[configs.GemmConfig, configs.GemmConfig],
    y: Symbolic,
) -> None:
    """Declare `fused` for some tokens, into y."""
    from ...triton_kernels.experts import combine, gate

    in_order = sort(plan, ids, gate_up.count, sizes[0].block_m)
    slots, inner, n = ids.numel(), down.shape[1], down.shape[0]
    # The limit of scratch memory is for codes: a layer of torch allocates these three, too.
    gated = plan.empty((*ids.shape, inner), x.dtype, limited=False)
    with plan.reused():
        h = plan.empty((*ids.shape, gate_up.shape[0]), x.dtype, limited=False)
        with plan.reused():  # the codes of x
            _product(plan, x, gate_up, in_order, ids, None, None, problems[0], sizes[0], h)
        arguments = {
            "h_ptr": h, "y_ptr": gated, "N": inner, "ACTIVATION": activation, "BLOCK": _BLOCK,
        }  # fmt: skip
        start(plan, gate, (slots, -(-inner // _BLOCK)), arguments)
    h = plan.empty((*ids.shape, n), x.dtype, limited=False)
    _product(plan, gated, down, in_order, ids, None, None, problems[1], sizes[1], h)
    arguments = {
        "h_ptr": h, "weights_ptr": weights, "y_ptr": y, "TOP_K": ids.shape[1], "N": n,
        "BLOCK": _BLOCK,
    }  # fmt: skip
    start(plan, combine, (x.shape[0], -(-n // _BLOCK)), arguments)


# ---------------------------------------------------------------------- slots
def most_blocks(slots: int, experts: int, block_m: int) -> int:
    """The most blocks of block_m slots that any distribution over experts and "not here" needs."""
    used = min(slots, experts + 1)
    return (slots + used * (block_m - 1)) // block_m


def sort(plan: Plan, ids: Symbolic, experts: int, block_m: int) -> Sorted:
    """Sort the slots of ids (T, top_k) by expert."""
    from ...triton_kernels.experts import sort_slots

    count = ids.numel()
    blocks = most_blocks(count, experts, block_m)
    slots = plan.empty((blocks * block_m,), torch.int32)
    block_experts = plan.empty((blocks,), torch.int32)
    arguments = {
        "ids_ptr": ids,
        "slots_ptr": slots,
        "experts_ptr": block_experts,
        "S": count,
        "EXPERTS": experts,
        "BLOCKS": blocks,
        "BLOCK_M": block_m,
        "BINS": _bins(experts),
        "CHUNK": _CHUNK,
    }
    start(plan, sort_slots, (experts + 1, 1), arguments)
    return Sorted(slots, block_experts, block_m)


def _bins(experts: int) -> int:
    """BINS of `sort_slots`: a power of two, at least experts + 2."""
    return max(16, 1 << (experts + 1).bit_length())


# ---------------------------------------------------------------------- products
def _product(
    plan: Plan,
    x: Symbolic,
    experts: PackedExperts,
    in_order: Sorted,
    ids: Symbolic,
    weights: Symbolic | None,
    bias: Symbolic | None,
    problem: Problem,
    config: configs.GemmConfig,
    y: Symbolic,
) -> None:
    """Declare the product of some tokens, into y. `problem` is that of all tokens."""
    from ...triton_kernels.experts import experts_eight_bit, experts_weight_only

    n, k = experts.shape
    x = x.view(-1, k)
    blocks = in_order.experts.numel()
    is_codes = experts.layout == layouts.EIGHT_BIT
    if is_codes:
        operands = _eight_bit_arguments(plan, x, experts, problem)
    else:
        upcast = x.dtype == torch.bfloat16 and interpreted()
        permuted = "perm" in experts.storage
        operands = _weight_only_arguments(experts, problem) | {
            "x_ptr": x,
            "METHOD": method(config, problem, permuted=permuted, upcast=upcast),
            "WARPS": config.num_warps,
        }
    arguments = {
        **operands,
        "bias_ptr": x if bias is None else bias,
        "weights_ptr": x if weights is None else weights,
        "y_ptr": y,
        "slots_ptr": in_order.slots,
        "experts_ptr": in_order.experts,
        "S": ids.numel(),
        "EXPERTS": experts.count,
        "BLOCKS": blocks,
        "M": x.shape[0],
        "PER_ROW": ids.numel() // x.shape[0],
        "N": n,
        "HAS_BIAS": bias is not None,
        "HAS_WEIGHTS": weights is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_N": config.group_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    kernel = experts_eight_bit if is_codes else experts_weight_only
    start(plan, kernel, (-(-n // config.block_n) * blocks, 1), arguments)


def _stride(tensor: Tensor) -> int:
    """Elements from one expert to the next."""
    return tensor.stride(0)


def method(config: configs.GemmConfig, problem: Problem, *, permuted: bool, upcast: bool) -> Method:
    """The kernel's argument METHOD. permuted, upcast: as in `Method`."""
    from ...triton_kernels.weight_only import Method

    wait = overtakes(configs.architecture(problem.capability))
    return Method(False, config.post_scale, permuted, upcast, wait)


def _weight_only_arguments(experts: PackedExperts, problem: Problem) -> dict[str, Any]:
    """The kernel's arguments that depend on the weights alone.

    They are those of the kernel for one matrix, and a stride for each tensor.
    """
    assert experts.layout == layouts.WEIGHT_ONLY
    traits = traits_of(problem)
    weight, scalers = weight_only.pointers(experts.storage, traits)
    return weight_only.arguments(experts.expert(0), traits) | {
        "weight_args": weight,
        "weight_strides": tuple(map(_stride, weight)),
        "scaler_args": scalers,
        "scaler_strides": tuple(map(_stride, scalers)),
    }


def _eight_bit_arguments(
    plan: Plan, x: Symbolic, experts: PackedExperts, problem: Problem
) -> dict[str, Any]:
    """The quantized x, once for all experts, and the arguments that depend on the weights alone."""
    one = problem._replace(m=x.shape[0], experts=0)
    a = eight_bit.quantize(plan, x, experts.expert(0), one)
    fixed = _codes_constants(experts.shape, one)
    weight, codes = experts.storage["weight"], a.codes
    if fixed["WIDEN"]:  # these GPUs have no fp8 type
        weight, codes = weight.view(torch.uint8), codes.view(torch.uint8)
    scales = experts.storage["weight_scale"]
    return {
        "x_ptr": codes,
        "weight_ptr": weight,
        "x_scale_ptr": a.scale,
        "w_scale_ptr": scales,
        "weight_stride": _stride(weight),
        "w_scale_stride": _stride(scales),
        "KP": codes_layout.padded(experts.shape[1]),
        **fixed,
    }


def _codes_constants(shape: tuple[int, int], problem: Problem) -> dict[str, Any]:
    """The compile-time arguments of `experts_eight_bit` that depend on the format and the GPU."""
    fixed = eight_bit.constants(eight_bit.traits_of(problem), shape, problem, has_zero=False)
    return {"BLOCK_SCALES": fixed["BLOCKS"], **{k: fixed[k] for k in ("KIND", "WIDEN", "EVEN_K")}}
