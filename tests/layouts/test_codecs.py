"""The rows of layouts/codecs.py: complete, used, and readable without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qkernels as qk
from qkernels.layouts import codecs
from qkernels.layouts import weight_only as layout
from qkernels.layouts.codecs import CODES, SCALES, CodeKind

from ..conftest import CASES, k_of, layout_of

ROOT = Path(__file__).parents[2]
KINDS = pytest.mark.parametrize("kind", CODES.values(), ids=lambda kind: kind.name)


def case_traits() -> list[layout.WeightOnlyTraits]:
    """The traits of every weight-only case, also with groups that cross the ends of rows."""
    traits = []
    for name, params in CASES:
        if layout_of(name, params) == layout.WEIGHT_ONLY:
            fmt = qk.formats.get(name)
            stored = {key: v for key, v in params.items() if key not in fmt.quantize_only}
            sizes = {k_of(name, 576), 608} if name in ("nf4", "fp4") else {k_of(name, 576)}
            for k in sizes:
                shape = (64, k)
                traits.append(fmt.weight_only_traits(shape, fmt.resolve(shape, stored)))
    return traits


def test_rows_name_functions_and_classes_that_exist() -> None:
    triton = {file: (ROOT / f"triton_kernels/{file}.py").read_text() for file in
              ("decoders", "scalers")}  # fmt: skip
    headers = "".join(file.read_text() for file in (ROOT / "csrc").glob("*/*.h"))
    classes = set(re.findall(r"^(?:struct|class) (\w+)", headers, flags=re.M))
    for kind in CODES.values():
        for name in (f"split_{kind.split}", f"finish_{kind.finish}"):
            assert f"def {name}(" in triton["decoders"], kind
        assert kind.cuda.split("<")[0] in classes, kind
    for scaler, scales in SCALES.items():
        assert f"def {scales.triton}(" in triton["scalers"], scaler
        kinds = re.findall(r"\bk[A-Z]\w+", scales.cuda)  # of `Scaling`, for `Plain` and `Grouped`
        assert all(kind in headers for kind in kinds), scaler
        names = re.findall(r"\b[A-Z]\w+", scales.cuda)
        assert set(names) <= classes, scaler
        assert names or kinds, scaler


def test_every_row_is_used_by_a_format() -> None:
    """And a kind of scales has CUDA kernels for the codes that it comes with, and for no others."""
    traits = case_traits()
    assert {(t.decoder, t.bits) for t in traits} == set(CODES)
    assert {t.scaler for t in traits} == set(SCALES)
    for scaler, scales in SCALES.items():
        used = {t.codes.name for t in traits if t.scaler == scaler}
        assert used == set(scales.codes), scaler
        sizes = {t.group_size for t in traits if t.scaler == scaler}
        assert scales.group is None or sizes == {scales.group}, scaler


def test_names_of_cuda_kernels_are_unique() -> None:
    pairs = {
        (codecs.cuda_kernel(kind, scaler), scales.cuda, kind.name)
        for kind in CODES.values()
        for scaler, scales in SCALES.items()
        if codecs.cuda_kernel(kind, scaler)
    }
    # Codes have one kernel for all kinds of `Plain` scales.
    pairs = {(name, cuda[0] if cuda[0] == "k" else cuda, codes) for name, cuda, codes in pairs}
    assert len(pairs) == len(codecs.cuda_kernels()) == len({name for name, _, _ in pairs})


@KINDS
def test_codes_of_a_word_do_not_overlap(kind: CodeKind) -> None:
    places = [kind.bit_of(s, b) for s in range(16 // kind.width) for b in range(2)]
    bits = {place + i for place in places for i in range(kind.width)}
    assert bits == set(range(32))
    assert len(places) * kind.width == 32


@KINDS
def test_packed_codes_are_unpacked(kind: CodeKind) -> None:
    """With rows that end in the middle of a tile."""
    n, k = 5, 2 * kind.tile - 24
    if kind.codebook:
        codes = torch.randint(1 << (8 * kind.bits - 1), (n, k // 8), dtype=torch.int32)
        packed = layout.pack_codebook(codes, kind)
        assert torch.equal(layout.unpack_codebook(packed, kind, n, k), codes)
    else:
        codes = torch.randint(1 << kind.bits, (n, k), dtype=torch.uint8)
        packed = layout.pack_codes(codes, kind)
        assert torch.equal(layout.unpack_codes(packed, kind, n, k), codes)
    shapes = {name: tuple(t.shape[2:]) for name, t in packed.items()}
    high = {"qhigh": (kind.high_words,)} if kind.high_words else {}
    assert shapes == {"qdata": (16,), **high}


def test_the_build_needs_no_torch() -> None:
    """setup.py loads build.py by its path, in an environment with setuptools alone."""
    script = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('build_cuda', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(len(module.generated()), 'torch' in sys.modules, 'qkernels' in sys.modules)\n"
    )
    file = ROOT / "qkernels/backends/cuda/build.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(file)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{len(codecs.cuda_kernels())} False False\n"


def test_unknown_kinds_are_named() -> None:
    traits = layout.WeightOnlyTraits(7, "linear", "groups", 32)
    with pytest.raises(ValueError, match=r"decoder, bits: expected .*linear4.*; got 'linear', 7"):
        _ = traits.codes
    with pytest.raises(ValueError, match=r"scaler: expected one of group, .*; got 'groups'"):
        _ = traits.scales


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaler_tensors": {}}, r"scaler_tensors: expected \['absmax'\] of 'scale', got \[\]"),
        ({"table": None}, "table: expected a tensor of 'lut16' codes, got None"),
        ({"codebook": torch.zeros(256)}, "codebook: expected None of 'lut16' codes, got a tensor"),
    ],
)
def test_parts_that_do_not_fit_their_kinds(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    """A new format that hands over the wrong tensors learns it at the first prepack."""
    p = qk.quantize(torch.randn(8, 64), "nf4")
    fmt = qk.formats.get("nf4")
    parts = fmt.weight_only(p.tensors, p.shape, p.params)
    for name, value in change.items():
        setattr(parts, name, value)
    monkeypatch.setattr(type(fmt), "weight_only", lambda *args: parts)
    with pytest.raises(ValueError, match=message):
        p.prepack_(layout.WEIGHT_ONLY)
