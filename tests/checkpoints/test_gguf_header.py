"""GGUF headers written byte by byte, which no writer would write."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qkernels.checkpoints.gguf import header as gguf_header

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def write(
    path: Path,
    entries: list[bytes],
    tensors: list[tuple[str, int, int]],
    data: int,
    alignment: int = 32,
) -> Path:
    """tensors: float32 vectors: (name, numbers, offset). data: bytes behind the header."""
    infos = [
        text(name) + struct.pack("<IQIQ", 1, count, 0, offset) for name, count, offset in tensors
    ]
    header = (
        b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries + infos)
    )
    path.write_bytes(header + bytes(-len(header) % alignment) + bytes(data))
    return path


def aligned(alignment: int) -> list[bytes]:
    return [entry("general.alignment", UINT32, struct.pack("<I", alignment))]


@pytest.mark.parametrize(
    ("alignment", "second"),
    [(32, 96), (32, 64), (32, 0), (32, 32), (1, 127), (1, 125), (4, 124), (64, 64)],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_tensors_that_overlap(tmp_path: Path, alignment: int, second: int, swapped: bool) -> None:
    """Overlaps by the alignment or by everything, in either order of the names."""
    path = tmp_path / "x.gguf"
    tensors = [("a", 32, 0), ("b", 32, second)]
    write(path, aligned(alignment), tensors[::-1] if swapped else tensors, 512, alignment)
    with pytest.raises(
        ValueError, match=r"x.gguf: tensor '[ab]': data: expected bytes from \d+ on, after"
    ):
        gguf_header.read_header(path)
    tensors = [("a", 32, 0), ("b", 32, 128)]
    write(path, aligned(alignment), tensors[::-1] if swapped else tensors, 256, alignment)
    found = {t.name: t.offset for t in gguf_header.read_header(path).tensors}
    assert found["b"] - found["a"] == 128


def test_a_small_tensor_inside_another(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.gguf", aligned(4), [("a", 32, 0), ("b", 1, 64), ("c", 1, 128)], 256, 4
    )
    with pytest.raises(
        ValueError, match=r"tensor 'b': data: expected bytes from \d+ on, after 'a'"
    ):
        gguf_header.read_header(path)


def test_no_tensor_lies_in_the_header(tmp_path: Path) -> None:
    """Offsets count from the end of the header, and none wraps around to a place before it."""
    path = write(tmp_path / "x.gguf", [], [("a", 1, 0)], 4)
    header = path.stat().st_size - 4
    assert gguf_header.read_header(path).tensors[0].offset == header
    for offset in (2**64 - 32, 2**63, 2**64 - header, 32):
        write(path, [], [("a", 1, offset)], 4)
        with pytest.raises(ValueError, match=r"tensor 'a': (data|offset): expected"):
            gguf_header.read_header(path)


def test_the_end_of_the_file(tmp_path: Path) -> None:
    """The last byte is a tensor's, so one byte less is too few, also for tensors of 2^64 bytes."""
    path = write(tmp_path / "x.gguf", [], [("a", 8, 0)], 32)
    assert gguf_header.read_header(path).tensors[0].nbytes == 32
    for count, data in ((8, 31), (9, 32), (2**62, 32), (2**64 - 1, 32), (0, 32)):
        write(path, [], [("a", count, 0)], data)
        with pytest.raises(ValueError, match=r"tensor 'a': (data|shape): expected"):
            gguf_header.read_header(path)


@pytest.mark.parametrize("value", [b"\x01", b"\x00"])
def test_a_bool_is_no_alignment(tmp_path: Path, value: bytes) -> None:
    path = write(
        tmp_path / "x.gguf", [entry("general.alignment", BOOL, value)], [("a", 1, 0)], 4, 1
    )
    with pytest.raises(
        ValueError, match=r"'general.alignment': expected a power of two, got (True|False)"
    ):
        gguf_header.read_header(path)


@pytest.mark.parametrize("alignment", [0, 3, 48, 2**31 + 1])
def test_alignments(tmp_path: Path, alignment: int) -> None:
    path = write(tmp_path / "x.gguf", aligned(alignment), [("a", 1, 0)], 4)
    with pytest.raises(ValueError, match=r"'general.alignment': expected a power of two"):
        gguf_header.read_header(path)


@pytest.mark.parametrize("item", [13, 14, 255, 2**31, 2**32 - 1])
@pytest.mark.parametrize("count", [0, 1, 2**63])
def test_arrays_of_no_type(tmp_path: Path, item: int, count: int) -> None:
    value = struct.pack("<IQ", item, count) + bytes(8)
    path = write(tmp_path / "x.gguf", [entry("some.array", ARRAY, value[:12])], [("a", 1, 0)], 64)
    with pytest.raises(
        ValueError, match=rf"'some.array': item type: expected a GGUF value type.*, got {item}"
    ):
        gguf_header.read_header(path)
    nested = struct.pack("<IQIQ", ARRAY, 1, item, count)
    path = write(tmp_path / "x.gguf", [entry("some.array", ARRAY, nested)], [("a", 1, 0)], 64)
    with pytest.raises(ValueError, match=r"item type: expected a GGUF value type"):
        gguf_header.read_header(path)


@pytest.mark.parametrize("item", [*range(8), STRING, ARRAY, 10, 11, 12])
def test_empty_arrays(tmp_path: Path, item: int) -> None:
    value = entry("some.array", ARRAY, struct.pack("<IQ", item, 0))
    path = write(tmp_path / "x.gguf", [value], [("a", 1, 0)], 64)
    assert gguf_header.read_header(path).metadata["some.array"] == []
