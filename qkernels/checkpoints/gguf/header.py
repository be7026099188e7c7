"""A strict reader of a GGUF file's header, which checks each length against the file's size.

    "GGUF"  u32 version  u64 tensors  u64 entries
    entries:  string key, u32 type, value          string = u64 length, bytes
    tensors:  string name, u32 dimensions, u64 ne[], u32 type, u64 offset
    padding to general.alignment (32), then the data; tensor offsets count from there

ne[0] is the fastest dimension, so a weight's shape (N, K) is ne reversed.
Source: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: struct codes of the scalar value types; 8 is a string, 9 an array
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_NAME = 65535
_MAX_DIMENSIONS = 4
#: longer arrays (token lists) are skipped, and only their length is kept
_MAX_KEPT = 64


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ggml's type name ("Q4_K"), shape (N, K), bytes, and its offset in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a file.

    Metadata holds scalars, strings and short arrays; of a long array it holds the length as text.
    """

    version: int
    metadata: dict[str, Any]
    tensors: list[GgufTensor]


def read_header(path: str | os.PathLike[str], keep: str | None = None) -> GgufHeader:
    """Read and check the header, without the tensors' data.

    keep: arrays whose keys begin with this text are kept whole.
    Raises FileNotFoundError, or ValueError naming the file, the field, what was expected and found.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise ValueError(
                f"{path}: expected a GGUF header of at least 24 bytes, got a file of {size}"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, keep).header()


class _Reader:
    """Reads a header piece by piece; `at` is the current offset."""

    def __init__(self, path: Path, data: mmap.mmap, keep: str | None) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0
        self.keep = keep

    def fail(self, field: str, expected: str, got: Any) -> ValueError:
        """The error for a field."""
        return ValueError(f"{self.path}: {field}: expected {expected}, got {got}")

    def take(self, count: int, field: str) -> bytes:
        """The next `count` bytes."""
        if count > self.size - self.at:
            raise self.fail(
                field, f"{count} bytes at offset {self.at}", f"the end of the file at {self.size}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, field: str) -> Any:
        """The next number, of a type given by its struct code."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), field))[0]

    def string(self, field: str, limit: int | None = None) -> str:
        """The next string, of at most `limit` bytes."""
        length = self.number("Q", f"{field}: length")
        if limit is not None and length > limit:
            raise self.fail(f"{field}: length", f"at most {limit} bytes", length)
        try:
            return self.take(length, field).decode()
        except UnicodeDecodeError as error:
            raise self.fail(field, "UTF-8 text", f"byte {error.object[error.start]:#x}") from None

    # ------------------------------------------------------------------ the parts
    def header(self) -> GgufHeader:
        """The whole header."""
        magic = self.take(4, "magic")
        if magic != MAGIC:
            raise self.fail("magic", repr(MAGIC), repr(magic))
        version = self.number("I", "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            hint = " (a big-endian file)" if swapped in VERSIONS else ""
            raise self.fail("version", "2 or 3", f"{version}{hint}")
        tensor_count = self.number("Q", "tensor count")
        entry_count = self.number("Q", "metadata count")
        # Least bytes of a tensor and of an entry, so that a false count causes no long loop and no
        # allocation.
        for field, count, least in (("tensor", tensor_count, 32), ("metadata", entry_count, 13)):
            if count * least > self.size:
                raise self.fail(
                    f"{field} count", f"at most {self.size // least} in {self.size} bytes", count
                )
        metadata: dict[str, Any] = {}
        for i in range(entry_count):
            key = self.string(f"metadata key {i}", _MAX_NAME)
            if key in metadata:
                raise self.fail("metadata", "each key once", f"{key!r} twice")
            most = self.size if self.keep is not None and key.startswith(self.keep) else _MAX_KEPT
            kind = self.number("I", f"metadata {key!r}: type")
            metadata[key] = self.value(f"metadata {key!r}", kind, most)
        infos = [self.info(i) for i in range(tensor_count)]
        return GgufHeader(version, metadata, self.place(infos, metadata))

    def value(self, field: str, kind: int, most: int, depth: int = 0) -> Any:
        """The next value; of an array with more than `most` items only its length, as text."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], field)
        if kind == _STRING:
            return self.string(field)
        if kind != _ARRAY or depth > 3:
            raise self.fail(f"{field}: type", "a GGUF value type, 0 to 12", kind)
        item_type, count = (
            self.number("I", f"{field}: item type"),
            self.number("Q", f"{field}: length"),
        )
        if item_type in _SCALARS:
            raw = self.take(count * struct.calcsize("<" + _SCALARS[item_type]), field)
            if count > most:
                return f"{count} values"
            return list(struct.unpack(f"<{count}{_SCALARS[item_type]}", raw))
        if item_type not in (_STRING, _ARRAY):
            raise self.fail(f"{field}: item type", "a GGUF value type, 0 to 12", item_type)
        if count * 8 > self.size:
            raise self.fail(f"{field}: length", f"at most {self.size // 8} items", count)
        items = []
        for i in range(count):
            item_value = self.value(f"{field}[{i}]", item_type, most, depth + 1)
            if i < most:
                items.append(item_value)
        return items if count <= most else f"{count} values"

    def info(self, i: int) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type number, offset) of tensor `i`."""
        name = self.string(f"tensor {i}: name", _MAX_NAME)
        field = f"tensor {name!r}"
        dimensions = self.number("I", f"{field}: dimensions")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fail(f"{field}: dimensions", f"1 to {_MAX_DIMENSIONS}", dimensions)
        shape = tuple(self.number("Q", f"{field}: shape") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self.fail(f"{field}: shape", "sizes of at least 1", shape)
        return name, shape, self.number("I", f"{field}: type"), self.number("Q", f"{field}: offset")

    def place(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> list[GgufTensor]:
        """The tensors with their bytes and offsets, checked against the file and each other."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.fail("metadata 'general.alignment'", "a power of two", repr(alignment))
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            field = f"tensor {name!r}"
            if name in tensors:
                raise self.fail("tensors", "each name once", f"{name!r} twice")
            try:
                ggml_type = GGMLQuantizationType(kind)
            except ValueError:
                raise self.fail(f"{field}: type", "a ggml type", kind) from None
            block, block_bytes = GGML_QUANT_SIZES[ggml_type]
            if shape[-1] % block:
                raise self.fail(
                    f"{field}: shape", f"rows of a multiple of {block} for {ggml_type.name}", shape
                )
            if offset % alignment:
                raise self.fail(f"{field}: offset", f"a multiple of {alignment}", offset)
            nbytes = math.prod(shape) // block * block_bytes
            if start + offset + nbytes > self.size:
                raise self.fail(
                    f"{field}: data",
                    f"bytes up to {start + offset + nbytes}",
                    f"a file of {self.size}",
                )
            tensors[name] = GgufTensor(name, ggml_type.name, shape, nbytes, start + offset)
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self.fail(
                    f"tensor {tensor.name!r}: data",
                    f"bytes from {end} on, after {before!r}",
                    tensor.offset,
                )
            end, before = tensor.offset + tensor.nbytes, tensor.name
        return list(tensors.values())
