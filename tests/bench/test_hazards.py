"""bench.static.hazards on loops of a few instructions, and on code that triton 3.6 made of ours."""

from __future__ import annotations

import pytest

from bench import static_cuda
from bench.static.assembly import Instruction
from bench.static.hazards import overtaken


def code(*lines: str) -> list[Instruction]:
    return [Instruction(*line.split(None, 1), None, False) for line in lines]


PRODUCT, ONE_LEFT, NONE_LEFT = (
    "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR16], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
)


@pytest.mark.parametrize(
    ("loop", "register"),
    [
        (code("LEA.HI R89, R1, R2, RZ", PRODUCT, ONE_LEFT), 89),  # the next round overtakes
        (code(PRODUCT, "LDS.128 R86, [R3]", NONE_LEFT), 88),  # four registers from R86 on
        (code(PRODUCT, "IMAD.WIDE R90, R1, R2, R4", NONE_LEFT), 90),
        (code(PRODUCT, "LOP3.LUT P1, R91, R1, R2, RZ, 0x3c, !PT"), 91),
        # a group not committed yet
        (
            code(PRODUCT.replace(", gsb0", ""), "MOV R88, R5", PRODUCT, NONE_LEFT),
            88,
        ),
    ],
)
def test_writes_to_operands_under_way(loop: list[Instruction], register: int) -> None:
    assert f"writes R{register}, which a product under way reads" in (overtaken(loop) or "")


@pytest.mark.parametrize(
    "loop",
    [
        code("MOV R89, R5", PRODUCT, NONE_LEFT),
        code("MOV R92, R5", PRODUCT, ONE_LEFT),  # another register
        code("STG.E.128 [R4], R88", PRODUCT, ONE_LEFT),  # reads it
        # the operand lies in shared memory
        code(PRODUCT.replace("R88", "gdesc[UR4]"), "MOV R88, R5"),
        code("ISETP.GE.AND P0, PT, R88, R1, PT", PRODUCT, ONE_LEFT),
        # two products, each waited for by the time its operand is written again
        code(
            "MOV R88, R1", PRODUCT, ONE_LEFT, "MOV R96, R1", PRODUCT.replace("R88", "R96"), ONE_LEFT
        ),
    ],
)
def test_what_overtakes_nothing(loop: list[Instruction]) -> None:
    assert overtaken(loop) is None


#: what cuobjdump prints of a kernel: a loop, a smaller one inside it with the products, and the
#: store of the sums
SASS = """
\t\tFunction : one
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
        /*0010*/                   MOV R88, R4 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR16], R24, gsb0 ;
        /*0030*/                   MOV R92, R5 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR16], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/                   {BEFORE} ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   {AFTER} ;
        /*00a0*/               @P1 BRA 0x0 ;
        /*00b0*/                   EXIT ;
\t\tFunction : two
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0010*/                   EXIT ;
"""
LAST = "HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR16], R24, gsb0"


@pytest.mark.parametrize(
    ("before", "after", "register"),
    [
        ("NOP", "MOV R96, R5", None),
        (LAST, "MOV R96, R5", None),
        (LAST, LAST, None),
        ("MOV R96, R5", LAST.replace("R96", "R1"), 1),  # the outer loop overtakes
    ],
)
def test_cuda_kernels_are_searched_as_a_whole(
    before: str, after: str, register: int | None
) -> None:
    text = SASS.replace("{BEFORE}", before).replace("{AFTER}", after)
    found = static_cuda.tensor_instructions(text)
    assert found["two"] == ("HMMA.16816.F32", "")
    instruction, hazard = found["one"]
    assert instruction == "HGMMA.64x128x16.F32.BF16"
    want = "" if register is None else f"MOV writes R{register}, which a product under way reads"
    assert hazard == want


def test_a_bad_cuda_kernel_fails_the_run() -> None:
    """A write between two products, one in the next round of their loop, and one after it."""
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    again = SASS.replace(wait, "NOP", 1).replace("{BEFORE}", "NOP")
    inner = SASS.replace("MOV R92, R5", "MOV R91, R5").replace("{BEFORE}", "NOP")
    later = SASS.replace(wait, "NOP").replace("{BEFORE}", "MOV R94, R2")
    for text in (inner, again, later):
        hazard = static_cuda.tensor_instructions(text.replace("{AFTER}", "NOP"))["one"]
        facts = static_cuda.Facts("s", "wgmma", "", -1, "90a", 168, 0, 0, 0, 384, False, *hazard)
        assert [why for why in facts.problems if "writes R" in why] == facts.problems != []
