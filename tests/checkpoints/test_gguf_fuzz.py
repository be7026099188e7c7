"""Damaged GGUF headers: a ValueError, or tensors that lie inside the file; never anything else."""

from __future__ import annotations

import math
import struct
import tempfile
import tracemalloc
from pathlib import Path

import gguf as package
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.checkpoints import gguf

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
        writer.add_tensor("up.weight", package.quantize(np.ones((8, 64), np.float32), q8_0), raw_dtype=q8_0)
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
