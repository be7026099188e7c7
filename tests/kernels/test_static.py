"""Kernels compiled ahead of time: their machine code on every architecture, and `bench.static`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.static import assembly
from bench.static.facts import ARCHITECTURES, Facts, failures, families
from bench.static.occupancy import occupancy
from qkernels.backends.triton.configs import SHARED_KIB

#: names of each architecture's tensor cores
TENSOR = {
    80: ("HMMA", "IMMA"),
    89: ("HMMA", "IMMA", "QMMA"),
    90: ("HGMMA", "IGMMA", "QGMMA"),
    100: ("UTCHMMA", "UTCIMMA", "UTCQMMA"),
    120: ("HMMA", "IMMA", "QMMA"),
}


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "bench.static", *arguments]
    # Set as in these tests without a GPU: the tool must compile for real in spite of it.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)


def compiled() -> Path:
    """Kernels that an earlier run compiled; triton finds those whose sources have not changed."""
    folder = Path(tempfile.gettempdir()) / f"qkernels-static-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else")
    return folder


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Facts of the subset's jobs, which passed the tool's own checks."""
    file = tmp_path_factory.mktemp("static") / "facts.json"
    done = tool("--subset", "--json", str(file), "--cache", str(compiled()))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert set(report["environment"]) == {"date", "python", "torch", "triton"}
    found: list[dict[str, Any]] = report["results"]
    return found


def test_subset(subset: list[dict[str, Any]]) -> None:
    assert {facts["family"] for facts in subset} == set(families())
    for arch in ARCHITECTURES:
        mine = [facts for facts in subset if facts["arch"] == arch]
        assert mine
        for facts in mine:
            name = f"{facts['kernel']} {facts['label']} sm_{arch}"
            assert facts["error"] is None, name
            # The tool has checked the spills of 256 columns.
            assert facts["spills"] == 0 or facts["columns"] == 256, name
            assert 0 < facts["shared"] <= SHARED_KIB[arch] * 1024, name
            assert 16 <= facts["registers"] <= 255, name
            assert facts["blocks"] >= 1, name
            if facts["needs_tensor_core"]:
                assert facts["tensor_core"].split(".")[0] in TENSOR[arch], name
            if facts["per_weight"] is not None:
                assert facts["weight_load"] == 16, name
                assert facts["steps"] == 1, name
                assert 0 < facts["per_weight"] < 30, name


def test_bad_arguments() -> None:
    done = tool("--kernel", "no such kernel")
    assert done.returncode == 2
    assert "no kernel or job has such a name" in done.stderr


# ---------------------------------------------------------------------- checks
GOOD = Facts(
    family="weight_only", kernel="k", label="gptq M=1", arch=90, registers=128, shared=64 * 1024,
    num_warps=4, blocks=3, warps=12, tensor_core="HGMMA.64x16x16.F32",
)  # fmt: skip


def test_good_facts_pass() -> None:
    assert failures(GOOD) == []
    assert failures(replace(GOOD, spills=8)) == []
    assert failures(replace(GOOD, columns=256, spills=512, loop_spills=18)) == []
    assert failures(replace(GOOD, arch=80, tensor_core="HMMA.16816.F32")) == []
    assert failures(replace(GOOD, arch=100, tensor_core="UTCQMMA")) == []
    assert failures(replace(GOOD, needs_tensor_core=False, tensor_core=None)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spills": 16}, "spills 16 bytes of registers per thread (none in the main loop)"),
        (
            {"spills": 8, "loop_spills": 2},
            "spills 8 bytes of registers per thread (2 loads and stores",
        ),
        ({"spills": 64, "loop_spills": 9}, "(9 loads and stores in the main loop)"),
        ({"columns": 128, "spills": 512}, "spills 512 bytes"),
        ({"columns": 256, "spills": 513}, "spills 513 bytes"),
        (
            {"columns": 256, "spills": 8, "loop_spills": 19},
            "(19 loads and stores in the main loop)",
        ),
        ({"overtaken": "MOV writes R9, which a product reads"}, "MOV writes R9"),
        ({"shared": 227 * 1024 + 1}, "a block may have 232448"),
        (
            {"arch": 120, "shared": 100 * 1024, "tensor_core": "HMMA.16816.F32"},
            "a block may have 101376",
        ),
        ({"tensor_core": None}, "no tensor-core instruction"),
        ({"tensor_core": "HMMA.16816.F32"}, "only HMMA.16816.F32"),
        ({"arch": 100}, "only HGMMA"),
        ({"arch": 80}, "only HGMMA"),
        ({"blocks": 0, "limit": "registers"}, "too many registers"),
        ({"too_early": "LDG.E"}, "starts before the last kernel is done, and then: LDG.E"),
        ({"error": "PTXASError: no"}, "does not compile: PTXASError"),
    ],
)
def test_bad_facts_fail(change: dict[str, Any], says: str) -> None:
    (line,) = failures(replace(GOOD, **change))
    assert says in line
    assert line.startswith(f"k sm_{change.get('arch', 90)} gptq M=1: ")


def test_occupancy_by_hand() -> None:
    # 168 registers x 32 lanes = 5376 = 21 x 256; 16384 // 5376 = 3 warps on each of 4 partitions:
    # 12 warps, one block of 8. Shared memory: 228 // (100 + 1) = 2 blocks.
    assert occupancy(90, registers=168, shared=100 * 1024, warps=8) == (1, 8, "registers")
    # 40 x 32 = 1280 = 5 x 256; 16384 // 1280 = 12 warps, 48 on the SM, 12 blocks of 4; shared
    # memory: 100 // (20 + 1) = 4 blocks of 4 warps.
    assert occupancy(89, registers=40, shared=20 * 1024, warps=4) == (4, 16, "shared memory")
    # 33 x 32 = 1056 takes 5 x 256 registers, as 40 would; one warp takes a partition's turn for
    # four.
    assert occupancy(80, registers=33, shared=0, warps=1) == (12, 12, "registers")
    assert occupancy(100, 64, 16 * 1024, 4, tensor_columns=256) == (2, 8, "tensor memory")


# ---------------------------------------------------------------------- main loop
#: a pipelined loop as ptxas writes it: the loop's wait is out of line at the end, and its branch
#: back (to .L_x_3) is no loop of the kernel. The exit at 0100 is a call, as on sm_80
SASS = """
	.section	.text.kernel,"ax",@progbits
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, RZ ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   BRA.U UP0, `(.L_x_4) ;
.L_x_1:
        /*0050*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
.L_x_2:
        /*0060*/                   IADD3 R20, R20, -0x1, RZ ;
        /*0070*/                   ISETP.NE.AND P1, PT, R20, RZ, PT ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7], R8 ;
        /*00a0*/              @!P0 BRA `(.L_x_5) ;
.L_x_3:
        /*00b0*/                   LOP3.LUT R8, R9, 0xf000f, RZ, 0xc0, !PT ;
        /*00c0*/              @!P3 HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00d0*/                   ISETP.GE.AND P2, PT, R19, R18, PT ;
        /*00e0*/               @P2 CALL.REL.NOINC `(.L_x_4) ;
        /*00f0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0100*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0110*/                   EXIT ;
.L_x_5:
        /*0120*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R7], R8 ;
        /*0130*/              @!P0 BRA `(.L_x_5) ;
        /*0140*/                   BRA `(.L_x_3) ;
.L_x_6:
        /*0150*/                   BRA `(.L_x_6);
        /*0160*/                   NOP;
.L_x_7:
"""


def test_main_loop_of_sass() -> None:
    program = assembly.sass(SASS)
    assert len(program.instructions) == 0x170 // 16
    sizes = sorted(len(body) for body in assembly.loops(program))
    assert sizes == [2, 3, 14]  # wait, count down, main
    opcodes = [found.opcode for found in assembly.main_loop(program)]
    assert len(opcodes) == 14
    assert opcodes.count("HMMA.16816.F32") == 1
    assert "STG.E" not in opcodes
    assert assembly.tensor_core(program.instructions) == "HMMA.16816.F32"


def test_main_loop_without_tensor_cores_loads_most() -> None:
    text = SASS.replace("HMMA.16816.F32", "FFMA")
    assert len(assembly.main_loop(assembly.sass(text))) == 14
    assert assembly.tensor_core(assembly.sass(text).instructions) is None
    assert assembly.main_loop(assembly.sass(text.replace("LDGSTS", "LDS"))) == []
    assert assembly.main_loop(assembly.sass("")) == []


PTX = """
// %bb.0:
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mad.wide.s32 	%rd3, %r5, 4, %rd1;
	ld.global.b64 	%rd9, [%rd2+8];
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	// begin inline asm
	cp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, %r3;
	// end inline asm
	cp.async.commit_group;
	@%p1 ld.global.L1::evict_last.v2.b32 { %r7, %r8 }, [ %rd4 + 0 ];
	ld.global.b8 	%r9, [%rd9];
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r10 }, { %r11 }, { %r12 }, { %r13 };
	add.s64 	%rd3, %rd3, 64;
	add.s64 	%rd4, %rd2, %rd8;
	@%p2 bra 	$L__BB0_1;
	st.global.b32 	[%rd1], %r10;
	ret;
"""


def test_loads_of_ptx() -> None:
    program = assembly.ptx(PTX)
    assert assembly.load_bytes(program) == {0: 16, 1: 8}
    assert len(assembly.main_loop(program)) == 8


def test_what_comes_before_the_wait() -> None:
    def code(*opcodes: str) -> assembly.Program:
        return assembly.sass(
            "\n".join(f"        /*{i:04x}*/ {opcode} R0, R2 ;" for i, opcode in enumerate(opcodes))
        )

    assert assembly.too_early(code("S2R", "CCTL.E.PF2", "LDC", "ACQBULK", "LDG.E", "STG.E")) is None
    for opcode in ("LDG.E.128", "STG.E", "ATOMG.E.ADD", "LDGSTS.E.BYPASS.128", "UTMALDG.2D"):
        assert assembly.too_early(code("S2R", opcode, "ACQBULK", "LDG.E")) == opcode
    assert assembly.too_early(code("S2R", "LDG.E")) == "no wait for the kernel before"


def test_unrolled_steps() -> None:
    once = assembly.main_loop(assembly.ptx(PTX))
    twice = assembly.sass(SASS.replace("LOP3.LUT R8", "HMMA.16816.F32 R4"))
    assert assembly.steps(assembly.main_loop(twice), once) == 2
    assert assembly.steps(assembly.main_loop(assembly.sass(SASS)), once) == 1
    assert assembly.steps([], []) == 1
