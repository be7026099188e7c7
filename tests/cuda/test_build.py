"""How the CUDA extension is built and found, and the errors if it cannot be."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qkernels as qk
from bench import static_cuda
from qkernels.backends import cuda, problem, registry
from qkernels.backends.cuda import build, calls, weight_only
from qkernels.backends.problem import problem_of

from . import host

#: A100, A10, L40, H100, B200, B300, Thor, RTX 5090, GB10
GPUS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]

PTXAS = """
ptxas info    : Compiling entry function 'NAME' for 'sm_80'
ptxas info    : Function properties for NAME
    64 bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 120 registers, used 1 barriers, 64 bytes cumulative stack size
""".replace(
    "NAME",
    "_ZN2qk18weight_only_decodeINS_4HalfENS_6LinearIS1_Li4EEENS_7GroupedILi4ELi0ELi1EEELi1EEEv"
    "NS_14WeightOnlyArgsE",
)


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
def test_kernels_compile_without_spills() -> None:
    """One source for Hopper; `python -m bench.static_cuda` checks all, in minutes."""
    facts = static_cuda.compile_one("e4m3", "90a")
    assert {(f.kernel, f.dtype, f.scale_groups) for f in facts} == {
        (kernel, dtype, scale_groups)
        for kernel, all_scale_groups in (
            ("decode 1 row", (1, 2, 4)),
            ("decode 8 rows", (0, 1, 2, 4)),
            ("decode 16 rows", (0, 1, 2, 4)),
            ("gemm", (0, 1, 2, 4)),
            ("wgmma 64 rows", (0, 1, 2, 4)),
            ("wgmma 128 rows", (0, 1, 2, 4)),
        )
        for dtype in ("Half", "BFloat")
        for scale_groups in all_scale_groups
    }
    assert [f.problems for f in facts if f.problems] == []


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["100", "120"])
def test_a_source_for_blackwell_compiles_without_spills(arch: str) -> None:
    facts = static_cuda.compile_one("unsigned4_q4_k", arch)
    assert {f.kernel for f in facts} == {
        "decode 1 row", "decode 8 rows", "decode 16 rows", "gemm"
    }  # fmt: skip
    assert [f.problems for f in facts if f.problems] == []


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
def test_eight_bit_kernels_compile_without_spills() -> None:
    facts = static_cuda.compile_one("eight_bit_e4m3", "90a")
    assert {f.kernel.replace(", blocks", "") for f in facts} == {
        *(f"gemv {rows} rows" for rows in (8, 16)),
        *(f"gemm {rows} rows" for rows in (16, 32, 64, 128)),
        *(
            f"gemv {rows} rows, quantizes per {which}"
            for rows in (1, 4) for which in ("token", "group", "tensor")
        ),
        "gemv 8 rows, quantizes per token",
        "wgmma",
    }  # fmt: skip
    assert len(facts) == 14 + 2 * 7
    assert [f.problems for f in facts if f.problems] == []


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
def test_transforms_compile_without_spills() -> None:
    facts = static_cuda.compile_one("transform_rows", "90a")
    assert sorted((f.kernel, f.dtype) for f in facts) == [
        (f"transform {side}", dtype) for side in ("after", "before") for dtype in ("BFloat", "Half")
    ]
    assert [f.problems for f in facts if f.problems] == []


def test_the_static_table_sees_spills_and_missing_kernels() -> None:
    entry = re.search(r"'(\w+)'", PTXAS)
    assert entry is not None
    tensor = {entry[1]: ("HMMA.16816.F32", "")}
    good, bad = (
        static_cuda.parse(PTXAS.format(stores=n), "linear4", "80", tensor)[0] for n in (0, 8)
    )
    assert (good.registers, good.stack, good.blocks, good.problems) == (120, 64, 1, [])
    assert bad.problems == ["spills 8 bytes"]
    assert static_cuda.parse(PTXAS.format(stores=0), "linear4", "80", {})[0].problems == [
        "no MMA instruction"
    ]
    words = (
        f"ptxas info : (C7513) Potential Performance Loss: wgmma, in the function '{entry[1]}'\n"
    )
    slow = static_cuda.parse(words + PTXAS.format(stores=0), "linear4", "80", tensor)[0]
    assert slow.problems == ["its wgmma instructions are serialized"]
    hazard = {entry[1]: ("HGMMA", "MOV writes R8, which a product under way reads")}
    overtaken = static_cuda.parse(PTXAS.format(stores=0), "linear4", "80", hazard)[0]
    assert overtaken.problems == ["MOV writes R8, which a product under way reads"]
    assert "| decode 8 rows | linear4 | 4 | 120 (1) | 8 |" in static_cuda.table([good, bad])
    with pytest.raises(RuntimeError, match="ptxas said nothing of any kernel"):
        static_cuda.parse("", "linear4", "80", {})


def test_structs_are_the_same_in_both_languages() -> None:
    """A call of the wrong size is refused. Every other test here relies on the order of fields."""
    _, run = host.entry("weight_only_linear4")
    error = run(ctypes.byref(calls.WeightOnlyCall(size=8))).decode()
    assert "different versions" in error


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
def test_ninja_file_names_every_source_and_architecture(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    text = build.ninja_file(Path("/tmp/a b/_cuda.so"), ("80", "90a"), tmp_path)
    assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a" in text
    assert "-cudart static" in text
    assert "build /tmp/a$ b/_cuda.so: link " in text
    assert set(re.findall(r"build ([\w-]+)\.o", text)) == {
        "bindings-module",
        *(f"{folder}-{name}" for name, folder in static_cuda.SOURCES.items()),
    }


def test_versions() -> None:
    build.check_versions(13000, 13000)
    build.check_versions(13000, 13010)
    build.check_versions(12080, 13000)
    with pytest.raises(
        RuntimeError, match="compiled by CUDA 13.0, but the driver knows CUDA up to 12.8"
    ):
        build.check_versions(13000, 12080)
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        build.check_versions(13000, 0)


@pytest.mark.parametrize(
    ("arch", "runs"),
    [
        ("80", {(8, 0), (8, 6), (8, 9)}), ("89", {(8, 9)}), ("90a", {(9, 0)}),
        ("100", {(10, 0), (10, 3)}), ("100f", {(10, 0), (10, 3)}), ("100a", {(10, 0)}),
        ("103", {(10, 3)}), ("110", {(11, 0)}),
        ("120", {(12, 0), (12, 1)}), ("120f", {(12, 0), (12, 1)}), ("120a", {(12, 0)}),
    ],
)  # fmt: skip
def test_which_gpus_run_code_for_an_architecture(arch: str, runs: set[tuple[int, int]]) -> None:
    assert {gpu for gpu in GPUS if build.runs_on(arch, *gpu)} == runs


def test_a_build_at_the_first_call_is_for_this_gpu() -> None:
    archs = [build.native_arch(*gpu) for gpu in GPUS]
    assert archs == ["80", "86", "89", "90a", "100", "100", "110", "120", "120"]
    assert all(build.runs_on(arch, *gpu) for arch, gpu in zip(archs, GPUS, strict=True))
    build.check_archs(archs)
    # Versions of nvcc before 13.0 do not know 110 (Thor).
    missing = [g for g in GPUS if not any(build.runs_on(a, *g) for a in build.DEFAULT_ARCHS)]
    assert missing == [(11, 0)]


@pytest.mark.parametrize(
    ("archs", "why"),
    [
        (("80", "90"), "expected \"90a\" for Hopper, got '90': the kernels use wgmma"),
        (("90f",), 'expected "90a" for Hopper'),
        (("sm_80",), "from 80 on, such as .80 90a 100 120., got 'sm_80'"),
        (("9.0a",), "from 80 on"),
        (("75",), "from 80 on"),
        ((), "got none"),
    ],
)
def test_other_architectures_are_refused(
    archs: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plain 90 above all: it has no wgmma, so Hopper's kernels would do nothing."""
    monkeypatch.setattr(build, "ninja_file", lambda *_: pytest.fail("the build began"))
    with pytest.raises(ValueError, match=why):
        build.build(tmp_path / "_cuda.so", archs, tmp_path / "objects")


#: Hopper's kernels, and each wrapper that has an instruction of Hopper alone
ONLY_HOPPER = """
#include "eight_bit/hopper.h"
#include "weight_only/hopper.h"
using namespace qk;
void (*eight_bit)(EightBitHopperArgs) = eight_bit_hopper<kInt8, false>;
void (*weight_only)(HopperArgs) = weight_only_hopper<Half, Linear<Half, 4>, Plain<0>, 64, false>;
#define KERNEL(NAME, ...) \\
    extern "C" __global__ void NAME(Barrier* b, TensorMap* map) { __VA_ARGS__; }
KERNEL(w0, barrier_init(b, 1))
KERNEL(w1, barrier_init_done())
KERNEL(w2, barrier_arrive(b))
KERNEL(w3, barrier_arrive_expect(b, 16))
KERNEL(w4, barrier_wait(b, 0))
KERNEL(w5, increase_registers<240>())
KERNEL(w6, decrease_registers<24>())
KERNEL(w7, copy_bulk(b, map, 16, b))
KERNEL(w8, copy_box(b, *map, 0, 0, b))
KERNEL(w9, uint32_t in[4] = {}; store_matrix_transposed(b, in))
KERNEL(w10, product_fence())
KERNEL(w11, product_commit())
KERNEL(w12, product_wait<0>())
KERNEL(w13, int sums[128]; ProductOfCodes<kInt8, kInt8, 256>::run(sums, {0}, {0}, false))
"""


@pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
def test_hopper_kernels_for_other_gpus_trap(tmp_path: Path) -> None:
    """And do not leave y unwritten. Plain sm_90 is another GPU, too."""
    (tmp_path / "only_hopper.cu").write_text(ONLY_HOPPER)
    traps = {}
    for arch in ("90a", "90", "100"):
        compiler, output = build.nvcc(), tmp_path / "out.ptx"
        command = [
            compiler, "-std=c++17", "-ptx", f"-arch=sm_{arch}", f"-I{build.sources()}",
            str(tmp_path / "only_hopper.cu"), "-o", str(output),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, text=True)
        kernels = re.split(r"\.visible \.entry|\.weak \.entry", output.read_text())[1:]
        assert len(kernels) == 16
        traps[arch] = sum("trap;" in kernel for kernel in kernels)
    assert traps == {"90a": 0, "90": 16, "100": 16}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "built_in", lambda: False)
    monkeypatch.setattr(build, "nvcc", lambda: None)
    build.unavailable.cache_clear()
    build.extension.cache_clear()
    assert "there is no nvcc to build it with" in str(build.unavailable())
    assert build.state().startswith("not to be had: ")
    with pytest.raises(RuntimeError, match="no CUDA kernels: the extension was not built"):
        build.extension()
    build.unavailable.cache_clear()


def test_auto_starts_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """backend="auto" takes CUDA kernels that are compiled for this GPU, or says what to do."""
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    p = qk.quantize(torch.randn(64, 128), "gptq", group_size=64)
    few = problem_of(p, 1, torch.float16, torch.device("cpu"))
    assert not build.is_built()
    assert "not compiled yet: backend='cuda' compiles it" in str(cuda._automatic(few))
    for arch, built in (("80", False), ("90a", True)):
        module = build.cached((arch,))
        module.parent.mkdir(parents=True)
        module.touch()
        assert build.is_built() is built
    assert cuda._automatic(few) is None


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H200 with a compiled extension, as far as the choice of a kernel goes."""
    for function, value in (
        ("is_available", True), ("get_device_capability", (9, 0)),
        ("get_device_name", "NVIDIA H200"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    monkeypatch.setattr(build, "unavailable", lambda: None)
    monkeypatch.setattr(build, "is_built", lambda: True)
    monkeypatch.setattr(weight_only, "sm_count", lambda device: 132)
    monkeypatch.setattr(weight_only, "device_shared_bytes", lambda device: 227 * 1024)
    problem._capability.cache_clear()
    build.obstacle.cache_clear()
    registry.choose.cache_clear()
    yield
    problem._capability.cache_clear()
    build.obstacle.cache_clear()
    registry.choose.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_auto_takes_cuda_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for NF4, for which Triton measured faster (backends/measured.py)."""
    p = qk.quantize(torch.randn(64, 128), "nf4")

    def chosen(m: int, backend: str = "auto", batch_invariant: bool = False) -> Any:
        return qk.explain(p, m, torch.bfloat16, "cuda", backend, batch_invariant)

    decode, triton = "cuda.weight_only_decode", "triton.weight_only_gemm"
    most = weight_only.MOST
    assert [chosen(m).kernel for m in (1, most, most + 1, 512)] == [decode, decode, triton, triton]
    few, why = chosen(1), "it issues fewer instructions a weight"
    assert f"taken first, because {why}" in few.reason
    assert f"{decode} is preferred: {why}" in dict(few.rejected)[triton]
    assert dict(few.rejected)["reference.dequantize"] == f"{decode} is preferred"
    assert chosen(1, "triton").kernel == triton
    assert why not in str(chosen(1, "cuda"))
    # One kernel takes all M, and this one would read the weight M / 8 times.
    assert {chosen(m, batch_invariant=True).kernel for m in (1, 512)} == {triton}
    registry.choose.cache_clear()
    monkeypatch.setattr(build, "is_built", lambda: False)
    assert chosen(1).kernel == triton
    assert dict(chosen(1).rejected)[decode].startswith("not compiled yet")


@pytest.mark.usefixtures("hopper")
def test_an_extension_for_other_gpus_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = SimpleNamespace(
        archs=["80", "90a"], toolkit_version=lambda: 13000, driver_version=lambda: 13000
    )
    monkeypatch.setattr(build, "built_in", lambda: True)
    monkeypatch.setitem(sys.modules, "qkernels._cuda", extension)
    assert build.state() == "compiled with the package for sm_80, sm_90a"
    assert [build.obstacle(*gpu) for gpu in ((8, 0), (8, 9), (9, 0))] == [None] * 3
    for major, minor, needs in ((7, 5, "75"), (10, 0, "100"), (10, 3, "100"), (12, 1, "120")):
        assert build.obstacle(major, minor) == (
            "the extension was built with the package for sm_80, sm_90a, "
            f"and this GPU is sm_{major}{minor}, which needs '{needs}' in QKERNELS_CUDA_ARCHS"
        )
    p = qk.quantize(torch.randn(64, 128), "nf4")
    assert qk.explain(p, 1, device="cuda").backend == "cuda"
    del extension.archs
    build.obstacle.cache_clear()
    assert "for unknown GPUs, and this GPU is sm_90" in str(build.obstacle(9, 0))
    extension.driver_version = lambda: 12080
    build.obstacle.cache_clear()
    registry.choose.cache_clear()
    old = qk.explain(p, 1, device="cuda")
    assert old.backend == "triton"
    assert "the driver knows CUDA up to 12.8" in dict(old.rejected)["cuda.weight_only_decode"]


def test_code_is_loaded_only_from_where_nobody_else_can_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another user could otherwise put a module or a link at the place of this user's."""
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "build", lambda target, archs, folder: target.touch())
    module = build.build_cached(("80",))
    assert (module.parent.stat().st_mode & 0o777, module.stat().st_mode & 0o022) == (0o700, 0)
    for part, mode in (
        (module, 0o775),
        (module, 0o757),
        (module.parent, 0o770),
        (module.parents[2], 0o777),
    ):
        before = part.stat().st_mode & 0o7777
        part.chmod(mode)
        with pytest.raises(
            RuntimeError, match="expected what only this user can write to, because code"
        ):
            build.build_cached(("80",))
        part.chmod(before)
    module.parents[2].chmod(0o1777)  # as /tmp
    assert build.build_cached(("80",)) == module
    if os.getuid() == 0:
        os.chown(module, 12345, 12345)
    else:
        monkeypatch.setattr(build.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RuntimeError, match=r"_cuda.*got .* of user \d+. Remove it"):
        build.build_cached(("80",))
    monkeypatch.undo()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(RuntimeError, match="link: expected what only this user can write to"):
        build.private_folder(tmp_path / "link")


def test_another_compiler_at_the_same_path_builds_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "nvcc"
    monkeypatch.setattr(build, "nvcc", lambda: str(compiler))
    places = set()
    for version in ("12.9", "13.0"):
        compiler.write_text(version)
        build.compiler_digest.cache_clear()
        places.add(build.cached(("80",)))
    assert len(places) == 2


def test_failed_build_shows_the_compilers_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "nvcc", lambda: str(compiler))
    with pytest.raises(RuntimeError, match="compiling the CUDA kernels failed:[^$]*no such option"):
        build.build(tmp_path / "_cuda.so", ("80",), tmp_path / "objects")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_the_backend_says_so() -> None:
    p = qk.quantize(torch.randn(16, 64), "gptq", group_size=32)
    with pytest.raises(ValueError, match="cuda.weight_only_decode: no CUDA device is visible"):
        qk.matmul(torch.randn(1, 64).half(), p, backend="cuda")
