"""GGUF headers, good and damaged, and dequantized loading."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch

from qkernels.checkpoints.gguf import reader as gguf
from qkernels.cli import samples
from qkernels.models.evaluate import perplexity

GPL3 = Path("/usr/share/common-licenses/GPL-3")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file by the gguf package: two tensors, and metadata of several types."""
    path = tmp_path / "tiny.gguf"
    writer = package.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_uint32("some.number", 7)
    writer.add_float64("some.real", 0.25)
    writer.add_bool("some.flag", True)
    writer.add_array("some.words", ["a", "bc", "déf"])
    writer.add_array("some.numbers", list(range(100)))
    writer.add_tensor("norm.weight", np.arange(64, dtype=np.float32))
    blocks = package.quantize(
        np.random.rand(8, 64).astype(np.float32), package.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("up.weight", blocks, raw_dtype=package.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header(file: Path) -> None:
    header = gguf.read_header(file)
    assert header.version == 3
    assert header.metadata == {
        "general.architecture": "llama", "general.name": "tiny", "some.number": 7,
        "some.real": 0.25,
        "some.flag": True, "some.words": ["a", "bc", "déf"], "some.numbers": "100 values",
    }  # fmt: skip
    norm, up = header.tensors
    assert (norm.name, norm.type, norm.shape, norm.nbytes) == ("norm.weight", "F32", (64,), 256)
    assert (up.name, up.type, up.shape, up.nbytes) == ("up.weight", "Q8_0", (8, 64), 8 * 2 * 34)
    assert (norm.bits_per_weight, up.bits_per_weight) == (32, 8.5)


def test_agrees_with_the_gguf_package_where_the_data_lies(file: Path) -> None:
    ours = {t.name: (t.offset, t.nbytes, t.type) for t in gguf.read_header(file).tensors}
    theirs = {
        t.name: (t.data_offset, t.n_bytes, t.tensor_type.name)
        for t in package.GGUFReader(file).tensors
    }
    assert ours == theirs


def test_every_truncation_is_noticed(file: Path) -> None:
    data = file.read_bytes()
    used = max(t.offset + t.nbytes for t in gguf.read_header(file).tensors)
    for length in [*range(0, 700, 7), used - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"{file.name}: .*expected .* got"):
            gguf.read_header(file)


@pytest.mark.parametrize(("offset", "value", "message"), [
    (0, b"GGML", "magic: expected b'GGUF', got b'GGML'"),
    (4, struct.pack("<I", 9), "version: expected 2 or 3, got 9"),
    (4, struct.pack(">I", 3), "version: expected 2 or 3, got .* big-endian"),
    (8, struct.pack("<Q", 2**60), "tensor count: expected at most"),
    (16, struct.pack("<Q", 2**60), "metadata count: expected at most"),
    (24, struct.pack("<Q", 2**60), "metadata key 0: length: expected at most 65535"),
    (32, b"\xff", "metadata key 0: expected UTF-8 text, got byte 0xff"),
    (52, struct.pack("<I", 13),
     "'general.architecture': type: expected a GGUF value type, 0 to 12, got 13"),
    (56, struct.pack("<Q", 2**62), "'general.architecture': expected 4611686018427387904 bytes"),
])  # fmt: skip
def test_damaged_header(offset: int, value: bytes, message: str, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[offset : offset + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        gguf.read_header(file)


@pytest.mark.parametrize(("after_name", "value", "message"), [
    (0, struct.pack("<I", 9), "'up.weight': dimensions: expected 1 to 4, got 9"),
    (4, struct.pack("<Q", 63), r"'up.weight': shape: expected rows of a multiple of 32 for Q8_0"),
    (4, struct.pack("<Q", 0), r"'up.weight': shape: expected sizes of at least 1"),
    (4, struct.pack("<Q", 2**40), r"'up.weight': data: expected bytes up to"),
    (20, struct.pack("<I", 999), "'up.weight': type: expected a ggml type, got 999"),
    (24, struct.pack("<Q", 33), "'up.weight': offset: expected a multiple of 32, got 33"),
])  # fmt: skip
def test_damaged_tensor_entry(after_name: int, value: bytes, message: str, file: Path) -> None:
    data = bytearray(file.read_bytes())
    at = data.index(b"up.weight") + len(b"up.weight") + after_name
    data[at : at + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        gguf.read_header(file)
    with pytest.raises(ValueError, match=message):
        gguf.load_dequantized(file)


def test_is_gguf(file: Path, tmp_path: Path) -> None:
    unnamed = file.rename(tmp_path / "model")
    assert gguf.is_gguf(unnamed)
    assert not gguf.is_gguf(tmp_path)
    assert not gguf.is_gguf(tmp_path / "absent")
    (tmp_path / "other").write_text("GGU")
    assert not gguf.is_gguf(tmp_path / "other")


@pytest.mark.skipif(not GPL3.is_file(), reason=f"{GPL3} is not on this machine")
@pytest.mark.slow
def test_real_model_perplexity() -> None:
    path = samples.model_path("smollm2-135m")
    header = gguf.read_header(path)
    kinds = {t.type: sum(o.type == t.type for o in header.tensors) for t in header.tensors}
    assert kinds == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
    model, tokenizer = gguf.load_dequantized(path)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer(GPL3.read_text())["input_ids"]
    assert perplexity(model, ids, window=1024, max_tokens=1024).perplexity == pytest.approx(
        19.30, abs=0.01
    )
