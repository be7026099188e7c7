"""bench.static.hazards on loops of a few instructions, and on code that triton 3.6 made of ours."""

from __future__ import annotations

import pytest

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
