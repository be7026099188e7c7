"""Instructions per weight of decoding: how they are counted, and the figures that bound them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from bench.static import assembly, constants, cuda_kernels, decode, dynamic
from qkernels.backends.cuda import build
from qkernels.layouts import codecs
from qkernels.quantizers.specs import parse_specs

from .test_static import compiled


def program(*lines: str) -> assembly.Program:
    """Lines of SASS; those that end with a colon are labels."""
    text = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/  {line} ;"
        for i, line in enumerate(lines)
    ]
    return assembly.sass("\n".join(text))


#: two ways in the loop: with a product, 3 instructions more than the 4 that each pass has, and
#: without, 6 more. c[0x0][0x2c0] decides of 5 more at the end.
LOOP = (
    "LDC R9, c[0x0][0x2c0]",
    "ISETP.NE.AND P3, PT, R9, 0x2, PT",
    ".head:",
    "@P0 BRA `(.without)",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "HMMA.16816.F32 R12, R4, R8, R12",
    "BRA `(.both)",
    ".without:",
    *["IADD3 R1, R1, 0x1, RZ"] * 6,
    ".both:",
    "@P3 BRA `(.end)",
    *["IADD3 R1, R1, 0x1, RZ"] * 5,
    ".end:",
    "ISETP.NE.AND P1, PT, R1, R2, PT",
    "@P1 BRA `(.head)",
    "EXIT",
)


def test_a_pass_goes_through_the_products_and_then_the_longest_way() -> None:
    assert dynamic.main_pass(program(*LOOP)) == (1, 1, 4 + 3 + 5)
    # As text, the loop has both ways.
    assert len(assembly.main_loop(program(*LOOP))) == 4 + 3 + 6 + 5
    # Ways with the load come before longer ones.
    loads = [line.replace("IADD3 R1, R1, 0x1, RZ", "HMMA.16816.F32 R12, R4, R8, R12", 1)
             for line in LOOP]  # fmt: skip
    assert dynamic.main_pass(program(*LOOP)).wide_loads == 1
    assert dynamic.main_pass(program(*loads)).tensor == 6 + 5


def test_arguments_rule_out_ways() -> None:
    short, long = ({0x2C0: value} for value in (1, 2))
    assert dynamic.main_pass(program(*LOOP), short).instructions == 4 + 3
    assert dynamic.main_pass(program(*LOOP), long).instructions == 4 + 3 + 5
    # A register that changes in the loop is not known, whatever it is at first.
    changed = [line.replace("IADD3 R1, R1", "IADD3 R9, R9") for line in LOOP]
    again = (*changed[:2], changed[2], changed[1], *changed[3:])
    assert dynamic.main_pass(program(*again), short).instructions == 4 + 3 + 5 + 1


def test_a_subroutine_counts_with_its_body_and_an_inner_loop_once() -> None:
    lines = (
        ".head:",
        "HMMA.16816.F32 R12, R4, R8, R12",
        "CALL.REL.NOINC `(.divide)",
        ".wait:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7], R8",
        "@!P0 BRA `(.wait)",
        ".copy:",  # its test is at the head
        "ISETP.GE.AND P2, PT, R3, R4, PT",
        "@P2 BRA `(.copied)",
        *["STS [R3], R5"] * 7,
        "BRA `(.copy)",
        ".copied:",
        "BRA.DIV UR4, `(.apart)",
        "@P1 BRA `(.head)",
        "EXIT",
        ".divide:",
        "@P4 BRA `(.short)",
        *["MUFU.RCP R1, R1"] * 9,
        ".short:",
        "RET.REL.NODEC R20 `(kernel)",
        ".apart:",
        *["NOP"] * 20,
        "BRA `(.head)",
    )
    assert dynamic.main_pass(program(*lines)) == (1, 0, 2 + 11 + 2 + (2 + 7 + 1) + 2)


def test_instructions_per_weight() -> None:
    twice = [*LOOP[:3], "HMMA.16816.F32 R12, R4, R8, R12", *LOOP[3:]]
    # One product for a tile of 8 weights a lane: 2 tiles of 13 instructions.
    assert dynamic.per_weight(program(*twice), mma_per_tile=1, weights=8) == 13 / 16
    with pytest.raises(ValueError, match="mma_per_tile: expected a divisor of .* 2 .*, got 3"):
        dynamic.per_weight(program(*twice), 3, 8)
    with pytest.raises(ValueError, match="expected a loop, got none"):
        dynamic.per_weight(program("EXIT"), 1, 8)
    with pytest.raises(ValueError, match="expected jumps to labels, got BRX"):
        dynamic.main_pass(program(*LOOP[:-4], "BRX R4", *LOOP[-4:]))


@pytest.mark.parametrize(
    ("lines", "jumps"),
    [
        (["MOV R1, 0x3", "ISETP.GE.U32.AND P0, PT, R1, 0x2, PT"], True),
        (["MOV R1, -0x1", "ISETP.GE.AND P0, PT, R1, RZ, PT"], False),
        (["MOV R1, -0x1", "ISETP.GE.U32.AND P0, PT, R1, RZ, PT"], True),
        (["VIADD R1, RZ, 0x2", "IMAD.MOV.U32 R2, RZ, RZ, R1", "ISETP.EQ.AND P0, PT, R2, 0x2, PT"],
         True),
        # 64 bits: a null pointer, and another
        (["LDC.64 R2, c[0x0][0x210]", "ISETP.NE.U32.AND P1, PT, R2, RZ, PT",
          "ISETP.NE.AND.EX P0, PT, R3, RZ, PT, P1"], False),
        (["ULDC.64 UR2, c[0x0][0x218]", "ISETP.NE.U32.AND P1, PT, RZ, UR2, PT",
          "ISETP.NE.AND.EX P0, PT, RZ, UR3, PT, P1"], True),
        (["ISETP.NE.AND P1, PT, R7, 0x1, PT", "ISETP.NE.AND P0, PT, RZ, RZ, P1"], False),
        (["ISETP.EQ.OR P0, PT, RZ, RZ, P1"], True),
        (["PLOP3.LUT P0, PT, P1, PT, PT, 0xfe, 0x0"], True),  # or
        (["PLOP3.LUT P0, PT, P1, PT, PT, 0x80, 0x0"], None),  # and
        (["MOV R1, 0x3", "LDG.E R1, desc[UR4][R2.64]", "ISETP.GE.AND P0, PT, R1, 0x2, PT"], None),
        (["MOV R1, 0x3", "LDG.E.128 R0, desc[UR4][R2.64]", "ISETP.EQ.AND P0, PT, R1, 0x3, PT"],
         None),
        (["MOV R1, 0x3", "@P1 MOV R1, 0x4", "ISETP.EQ.AND P0, PT, R1, 0x3, PT"], None),
        (["MOV R1, 0x3", "@!PT MOV R1, 0x4", "ISETP.EQ.AND P0, PT, R1, 0x3, PT"], True),
        (["LDC R1, c[0x0][0x220]", "ISETP.EQ.AND P0, PT, R1, 0x3, PT"], None),
    ],
)  # fmt: skip
def test_known_conditions(lines: list[str], jumps: bool | None) -> None:
    known = {0x210: 0, 0x214: 0, 0x218: 0, 0x21C: 1}
    code = program(*lines, "@P0 BRA `(.there)", "EXIT", ".there:", "EXIT")
    after = constants.feasible(code, known)[0]
    assert after == {True: [2], False: [1], None: [2, 1]}[jumps]


def test_a_conditional_branch_with_two_predicates() -> None:
    code = program("@P0 BRA P1, `(.there)", "EXIT", ".there:", "EXIT")
    assert constants.feasible(code, {})[0] == [2, 1]
    never = "ISETP.NE.AND P1, PT, RZ, RZ, PT"
    code = program(never, "@P0 BRA P1, `(.there)", "EXIT", ".there:", "EXIT")
    assert constants.feasible(code, {})[0] == [1]


@pytest.mark.parametrize("other", [1, 2])
def test_where_ways_meet_only_what_both_say_is_known(other: int) -> None:
    code = program(
        "@P5 BRA `(.left)", "MOV R1, 0x1", "BRA `(.both)",
        ".left:", f"MOV R1, {other:#x}",
        ".both:", "ISETP.EQ.AND P0, PT, R1, 0x1, PT", "@P0 BRA `(.there)", "EXIT",
        ".there:", "EXIT",
    )  # fmt: skip
    assert constants.feasible(code, {})[3] == ([5] if other == 1 else [5, 4])


def test_counts_above_a_figure_are_named() -> None:
    format, figures = next(iter(decode.CEILINGS.items()))
    eight = figures["fp16"][1]
    assert decode.too_many(format, {("fp16", 8): eight, ("fp16", 16): 0.0}) == []
    (line,) = decode.too_many(format, {("fp16", 8): eight + 0.02, ("bf16", 1): 0.0})
    assert f"{format} fp16 M=8: expected at most {eight} instructions a weight" in line


def test_the_codes_of_a_weight_give_its_products() -> None:
    codes = codecs.CODES["linear", 4]
    assert cuda_kernels.Decoder("", 16, 8).mma_per_tile(codes) == 8
    assert cuda_kernels.Decoder("", 32, 16, sums=1).mma_per_tile(codes) == 8 * (2 + 1) * 2
    assert cuda_kernels.Decoder("", 64, 1, sums=1).mma_per_tile(codes) == 8 * (4 + 1)
    assert cuda_kernels.Decoder("", 16, 128, hopper=True).mma_per_tile(codes) == 8


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("format", decode.CEILINGS)
def test_cuda_kernels_keep_their_figures(format: str) -> None:
    """Fewer instructions than a figure by a twentieth: write the new figure down."""
    (spec,) = parse_specs(format)
    counts = cuda_kernels.counts(spec.name, spec.params, decode.ROWS, compiled())
    assert decode.too_many(format, counts) == []
    figures = {
        (dtype, m): figure
        for dtype, of_dtype in decode.CEILINGS[format].items()
        for m, figure in zip(decode.ROWS, of_dtype, strict=True)
    }
    assert {key: counts[key] for key in figures if counts[key] < 0.95 * figures[key]} == {}
