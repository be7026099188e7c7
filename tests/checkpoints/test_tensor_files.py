"""False safetensors headers and indexes, and shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkernels.checkpoints import tensor_files
from qkernels.checkpoints.tensor_files import INDEX, TensorFiles, read_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.int8)}, path)
    return path


def _raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_header_and_tensors(file: Path) -> None:
    infos = read_header(file)
    assert (infos["a"].dtype, infos["a"].shape, infos["a"].nbytes) == ("F32", (2, 3), 24)
    assert (infos["b"].dtype, infos["b"].shape, infos["b"].nbytes) == ("I8", (5,), 5)
    with TensorFiles(file) as files:
        assert torch.equal(files.read("a"), torch.arange(6.0).view(2, 3))
        with pytest.raises(KeyError):
            files.read("c")


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -5, -1])
def test_truncated_at_any_point(keep: int, file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: .*expected .* got"):
        TensorFiles(file)


@pytest.mark.parametrize(("entry", "message"), [
    ({"dtype": "Q4", "shape": [4], "data_offsets": [0, 4]},
     "'t': dtype: expected one of .* got 'Q4'"),
    ({"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]},
     r"shape: expected a list of sizes, got \[-4\]"),
    ({"dtype": "U8", "shape": "x", "data_offsets": [0, 4]},
     "shape: expected a list of sizes, got 'x'"),
    ({"dtype": "U8", "shape": [4]}, r"data_offsets: expected \[begin, end\], got None"),
    ({"dtype": "U8", "shape": [5], "data_offsets": [0, 4]},
     r"expected 5 bytes for U8 \[5\], got 0..4"),
    ({"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}, "got -4..0"),
    ({"dtype": "U8", "shape": [4], "data_offsets": [1, 5]},
     "expected data up to byte 5, .* 4 bytes"),
    (3, "dtype: expected one of .* got None"),
])  # fmt: skip
def test_entries_that_lie(entry: Any, message: str, tmp_path: Path) -> None:
    _raw(tmp_path / "x.safetensors", {"t": entry}, b"1234")
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("header", "message"), [
    (b"{", "header: expected JSON"), (b"[]", "header: expected a JSON object, got list"),
])  # fmt: skip
def test_header_that_is_none(header: bytes, message: str, tmp_path: Path) -> None:
    _raw(tmp_path / "x.safetensors", header, b"")
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "x.safetensors")


# ---------------------------------------------------------------------- shards
def _shards(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    directory.mkdir()
    tensor_files.write(tensors.items(), directory, max_shard_bytes=90)
    return tensors


def test_shards_hold_at_most_the_limit(tmp_path: Path) -> None:
    tensors = _shards(tmp_path / "m")
    names = sorted(f.name for f in (tmp_path / "m").iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    assert json.loads((tmp_path / "m" / INDEX).read_text())["metadata"] == {"total_size": 200}
    with TensorFiles(tmp_path / "m") as files:
        assert all(torch.equal(files.read(name), tensor) for name, tensor in tensors.items())


def test_views_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensor_files.write([("rows", base[1:]), ("transposed", base.T), ("all", base)], tmp_path, 10**9)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["rows"], base[1:])
    assert torch.equal(stored["transposed"], base.T)
    assert torch.equal(stored["all"], base)


@pytest.mark.parametrize(("edit", "message"), [
    (lambda m: m.update(t9=m["t0"]),
     "model-00001-of-00003.safetensors: expected tensor 't9', which"),
    (lambda m: m.update(t0="model-00009-of-00003.safetensors"),
     "expected a file model-00009-of-00003"),
    (lambda m: m.update(t0="../model.safetensors"),
     r"weight_map\['t0'\]: expected a .safetensors file name"),
    (lambda m: m.update(t0="weights.bin"), r"weight_map\['t0'\]: .* got 'weights.bin'"),
    (lambda m: m.update(t0=3), r"weight_map\['t0'\]: .* got 3"),
    (lambda m: m.clear(), "weight_map: expected a non-empty object"),
])  # fmt: skip
def test_index_that_lies(edit: Any, message: str, tmp_path: Path) -> None:
    _shards(tmp_path / "m")
    path = tmp_path / "m" / INDEX
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        TensorFiles(tmp_path / "m")


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    _shards(tmp_path / "m")
    save_file({"t0": torch.ones(10)}, tmp_path / "m/model-00003-of-00003.safetensors")
    index = {
        "weight_map": {
            "t0": "model-00003-of-00003.safetensors",
            "t1": "model-00001-of-00003.safetensors",
        }
    }
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="tensor 't0': also in model-0000[13]-of-00003"):
        TensorFiles(tmp_path / "m")
