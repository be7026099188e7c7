"""Files of a model directory that block, never end, change, or have expensive headers."""

from __future__ import annotations

import copy
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qkernels as qk
from qkernels.checkpoints import files, load_tokenizer, tensor_files
from qkernels.checkpoints.tensor_files import INDEX, TensorFiles, read_header

from ..tiny import ids, tiny_model
from .hostile import quick

# ---------------------------------------------------------------------- files that are none
_FILES = ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
 "tokenizer_config.json",
          INDEX, "quantize_config.json", "quant_config.json", "chat_template.jinja",
          "additional_chat_templates/x.jinja")  # fmt: skip


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a directory", "a socket"])
@pytest.mark.parametrize("name", _FILES)
def test_what_is_no_regular_file(
    name: str, kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if name == INDEX:
        (directory / "model.safetensors").unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a directory":
        path.mkdir()
    else:
        monkeypatch.chdir(path.parent)  # a socket's path is short
        server = socket.socket(socket.AF_UNIX)
        server.bind(path.name)
        server.close()
    load = load_tokenizer if "token" in name or "template" in name else qk.load_model
    with (
        quick(20),
        pytest.raises(ValueError, match=f"{path.name}: expected a regular file, got {kind}"),
    ):
        load(directory)


@pytest.mark.parametrize("load", [qk.load_model, load_tokenizer])
def test_gguf_files_that_are_none(load: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    (tmp_path / "folder.gguf").mkdir()
    for name in ("fifo.gguf", "device.gguf", "folder.gguf"):
        with quick(2), pytest.raises(ValueError, match=f"{name}: expected"):
            load(tmp_path / name)


def test_links_to_regular_files_work(directory: Path, tmp_path: Path) -> None:
    """Hugging Face's cache has such links."""
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for i, file in enumerate(directory.iterdir()):
        (cache / file.name).symlink_to(os.path.relpath(file, cache))
        assert i < 20
    expected = qk.load_model(directory)(ids(4)[None]).logits
    assert torch.equal(qk.load_model(cache)(ids(4)[None]).logits, expected)
    assert load_tokenizer(cache).vocab_size == load_tokenizer(directory).vocab_size


def test_a_file_that_is_longer_than_its_size_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grows.json"
    path.write_bytes(b"x" * 1000)
    real = os.fstat

    def small(descriptor: int) -> os.stat_result:
        values = list(real(descriptor))
        values[6] = 0  # as /proc has it
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", small)
    with pytest.raises(
        ValueError, match="grows.json: expected 0 bytes, as its directory entry says"
    ):
        files.read_bytes(path, 100)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    loop = tmp_path / "config.json"
    loop.symlink_to(loop)
    with pytest.raises(ValueError, match="config.json: expected a file that can be read, got: "):
        files.read_json(loop)
    with pytest.raises(FileNotFoundError, match="expected a file none.json, found none"):
        files.read_json(tmp_path / "none.json")


# ---------------------------------------------------------------------- headers
def _safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_duplicate_keys_take_no_time(tmp_path: Path) -> None:
    header = "{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":0}'
    with (
        quick(2),
        pytest.raises(
            ValueError, match="x.safetensors: header: expected JSON, .*'99999' is there twice"
        ),
    ):
        read_header(_safetensors(tmp_path / "x.safetensors", header.encode()))


@pytest.mark.parametrize("count", [65, 400_000])
def test_shapes_of_many_dimensions(count: int, tmp_path: Path) -> None:
    header = '{"a":{"dtype":"U8","shape":[' + ",".join(["9"] * count) + '],"data_offsets":[0,0]}}'
    expected = f"x.safetensors: tensor 'a': shape: expected at most 64 dimensions, got {count}"
    with quick(1), pytest.raises(ValueError, match=expected):
        read_header(_safetensors(tmp_path / "x.safetensors", header.encode()))


@pytest.mark.parametrize("entry", [
    {"dtype": "U8", "shape": [10**4000, 10**4000], "data_offsets": [0, 1]},
    {"dtype": "U8", "shape": [2**63], "data_offsets": [0, 1]},
    {"dtype": "U8", "shape": [1], "data_offsets": [0, 10**4000]},
    {"dtype": "U8", "shape": [2**62] * 64, "data_offsets": [0, 1]},
])  # fmt: skip
def test_sizes_beyond_any_file(entry: dict[str, Any], tmp_path: Path) -> None:
    """Numbers with more digits than Python prints are named with the file, too."""
    path = _safetensors(tmp_path / "x.safetensors", json.dumps({"t" * 500: entry}).encode(), b"1")
    with pytest.raises(ValueError, match="x.safetensors: tensor 'ttt.*expected") as caught:
        read_header(path)
    assert len(str(caught.value)) < 4000


def test_names_of_many_components(directory: Path) -> None:
    """The module of a tensor is looked up component by component."""
    for name in ("." * 501, "model." * 1_000_000):
        header = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
        _safetensors(directory / "model.safetensors", header)
        expected = (
            "model.safetensors: tensor '.*: expected a name of at most 500 characters, got "
            f"{len(name)}"
        )
        with quick(2), pytest.raises(ValueError, match=expected):
            qk.load_model(directory)


@pytest.mark.parametrize("item", ["{}", "[]", "0", '{"":{}}', '""'])
def test_headers_of_many_items(item: str, tmp_path: Path) -> None:
    header = ('{"a":[' + ",".join([item] * 3_000_000) + "]}").encode()
    with (
        quick(1),
        pytest.raises(ValueError, match="header: expected JSON of at most 2000000 items, got"),
    ):
        read_header(_safetensors(tmp_path / "x.safetensors", header))


def test_real_headers_are_far_below(tmp_path: Path) -> None:
    """A header of 50,000 tensors in one file."""
    entry = (
        '"model.layers.{0}.mlp.experts.{0}.w.weight_packed":'
        '{{"dtype":"I32","shape":[0,8],"data_offsets":[0,0]}}'
    )
    header = "{" + ",".join(entry.format(i) for i in range(50_000)) + "}"
    assert len(read_header(_safetensors(tmp_path / "x.safetensors", header.encode()))) == 50_000


def test_more_tensors_than_a_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkernels.checkpoints.tensor_files._MAX_TENSORS", 3)
    entry = '"{}":{{"dtype":"I32","shape":[0],"data_offsets":[0,0]}}'
    shards = [
        _safetensors(tmp_path / f"{s}.safetensors",
         ("{" + ",".join(entry.format(f"{s}{i}") for i in range(2)) + "}").encode())
        for s in "ab"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="b.safetensors: expected at most 3 tensors in all"):
        TensorFiles(shards)


# ---------------------------------------------------------------------- files that change
def test_a_file_that_changes_while_it_is_loaded(directory: Path) -> None:
    path = directory / "model.safetensors"
    good = path.read_bytes()
    with TensorFiles(directory) as open_files:
        open_files.read("model.norm.weight")
        os.truncate(path, len(good) // 2)
        with pytest.raises(
            ValueError,
            match="model.safetensors: expected the file whose header was read, got one changed",
        ):
            open_files.read("model.norm.weight")
    path.write_bytes(good)
    with TensorFiles(directory) as open_files:
        os.replace(_copy(path, good), path)  # another save: half of each would be no model
        with pytest.raises(ValueError, match="expected the file whose header was read"):
            open_files.read("model.norm.weight")
    with TensorFiles(directory) as open_files:
        path.unlink()
        with pytest.raises(ValueError, match="expected the file whose header was read"):
            open_files.read("model.norm.weight")


def test_a_file_replaced_while_its_header_is_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, path = tensor_files.read_header, directory / "model.safetensors"

    def replaced(file: Path) -> Any:
        header = real(file)
        os.replace(_copy(path, path.read_bytes()), path)
        return header

    monkeypatch.setattr(tensor_files, "read_header", replaced)
    with (
        TensorFiles(directory) as open_files,
        pytest.raises(ValueError, match="expected the file whose header was read"),
    ):
        open_files.read("model.norm.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, None])
def test_tensors_that_are_converted(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Each tensor is read from its own place without a map; the others stay as they are."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).half(), "c": torch.randn(2, 0),
     "d": torch.arange(4),
               "e": torch.tensor(2.5), "f": torch.randn(2, 3).bfloat16()}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    with TensorFiles(tmp_path) as open_files:
        for name, tensor in tensors.items():
            expected = (
                tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
            )
            got = open_files.read_as(name, dtype)
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(ValueError, match="expected a valid path, got: File name too long"):
        qk.load_model("a" * 300)


def _copy(path: Path, data: bytes) -> Path:
    other = path.with_suffix(".new")
    other.write_bytes(data)
    return other


def test_a_model_outlives_a_save_over_its_files(directory: Path) -> None:
    """A model maps its tensors, so a save writes a new file and the old one stays mapped."""
    model = qk.load_model(directory)
    before = model(ids(8)[None]).logits
    qk.save_model(tiny_model(seed=5), directory)
    assert torch.equal(model(ids(8)[None]).logits, before)
    assert not torch.equal(qk.load_model(directory)(ids(8)[None]).logits, before)


def test_a_copy_of_a_model_does_not_need_its_file(directory: Path) -> None:
    loaded = qk.load_model(directory)
    copied, before = copy.deepcopy(loaded), loaded(ids(8)[None]).logits
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-20_000, os.SEEK_END)
        file.write(bytes(20_000))
    assert torch.equal(copied(ids(8)[None]).logits, before)
    assert not torch.equal(loaded(ids(8)[None]).logits, before)  # as load_model says
