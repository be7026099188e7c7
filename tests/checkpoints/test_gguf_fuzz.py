"""Damaged GGUF headers: a ValueError, or tensors that lie inside the file; never anything else."""

from __future__ import annotations

import math
import struct
import tempfile
import tracemalloc
from contextlib import suppress
from pathlib import Path

import gguf as package
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qkernels as qk
from qkernels.checkpoints.gguf import metadata
from qkernels.checkpoints.gguf import reader as gguf

from ..tiny import tiny_model
from .gguf_files import rewrite
from .test_gguf_models import bpe_tokenizer

#: lengths, counts and offsets that overflow, wrap or ask for absurd memory, besides random ones
NUMBERS = st.sampled_from([0, 1, 9, 255, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])


def _good() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "good.gguf"
        writer = package.GGUFWriter(path, "llama")
        writer.add_uint32("general.alignment", 32)
        writer.add_array("some.words", ["a", "bc"])
        writer.add_array("some.numbers", [1, 2, 3])
        q8_0 = package.GGMLQuantizationType.Q8_0
        writer.add_tensor("norm.weight", np.ones(64, dtype=np.float32))
        writer.add_tensor(
            "up.weight", package.quantize(np.ones((8, 64), np.float32), q8_0), raw_dtype=q8_0
        )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


GOOD = _good()
HEADER = len(GOOD) - 64 * 4 - 8 * 2 * 34  # where the tensors begin
PATCH = st.tuples(
    st.integers(0, HEADER - 1),
    st.one_of(st.binary(min_size=1, max_size=8), NUMBERS.map(lambda n: struct.pack("<Q", n))),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "damaged.gguf"


@settings(max_examples=400, deadline=None, database=None)
@given(patches=st.lists(PATCH, max_size=3), keep=st.integers(0, len(GOOD)) | st.just(len(GOOD)))
def test_damage_is_an_error_or_stays_inside_the_file(
    path: Path, patches: list[tuple[int, bytes]], keep: int
) -> None:
    content = bytearray(GOOD)
    for at, value in patches:
        content[at : at + len(value)] = value
    content = content[: min(keep, len(GOOD))]
    path.write_bytes(content)
    try:
        header = gguf.read_header(path)
    except ValueError:
        return
    for tensor in header.tensors:
        assert math.prod(tensor.shape) > 0
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content)


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "metadata"])
def test_absurd_counts_allocate_nothing(path: Path, at: int) -> None:
    path.write_bytes(GOOD[:at] + struct.pack("<Q", 2**62) + GOOD[at + 8 :])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="count: expected at most"):
            gguf.read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------- whole models
@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """(path for a damaged copy, bytes of a good model, offset of its tensors)."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    qk.quantize_model(model, "q8_0", progress=False)
    qk.save_model(model, folder / "good.gguf", bpe_tokenizer())
    begin = min(tensor.offset for tensor in gguf.read_header(folder / "good.gguf").tensors)
    return folder / "damaged.gguf", (folder / "good.gguf").read_bytes(), begin


def _loads_or_says_why(path: Path) -> None:
    for load in (qk.load_model, gguf.load_tokenizer):
        with suppress(ValueError):
            load(path)


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_damaged_models_are_an_error_or_load(
    data: st.DataObject, model_file: tuple[Path, bytes, int]
) -> None:
    path, good, begin = model_file
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, begin - 1))
        value = data.draw(
            st.binary(min_size=1, max_size=4) | NUMBERS.map(lambda n: struct.pack("<Q", n))
        )
        content[at : at + len(value)] = value
    path.write_bytes(content)
    _loads_or_says_why(path)


VALUES = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, 2, 3, 4, 16, 32, 64, 2**31, 2**32 - 1]), st.floats(width=32),
    st.booleans(), st.text(max_size=6),
    st.sampled_from(["llama", "qwen2", "qwen3", "falcon", "gpt2", "yarn", "linear"]),
    st.lists(st.integers(0, 2**32 - 1), max_size=70), st.lists(st.text(max_size=3), max_size=70),
)  # fmt: skip


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_odd_metadata_is_an_error_or_loads(
    data: st.DataObject, model_file: tuple[Path, bytes, int]
) -> None:
    """Any value under any key that the file has, or that it lacks and a reader looks for."""
    path = model_file[0]
    source = path.with_name("good.gguf")
    more = [f"llama.{key}" for key in (*metadata.RULES, *metadata._NEUTRAL)]
    keys = sorted(
        {*gguf.read_header(source).metadata, *more, "tokenizer.ggml.scores", "tokenizer.ggml.pre"}
    )
    changes = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3))
    rewrite(source, path, changes, data.draw(st.lists(st.sampled_from(keys), max_size=1)))
    _loads_or_says_why(path)
