"""Small GGUF files with any metadata."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPE = gguf.GGUFValueType


class _Writer(gguf.GGUFWriter):
    """gguf's writer, which can also write empty arrays."""

    def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
        if vtype == TYPE.ARRAY and len(val) == 0:
            return struct.pack("<IIQ", TYPE.ARRAY, TYPE.STRING, 0)
        packed: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
        return packed


def entry(value: Any) -> tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]:
    """(value, its GGUF type, its items' type); numbers outside 32 bits take 64."""
    if isinstance(value, list):
        return value, TYPE.ARRAY, entry(value[0])[1] if value else TYPE.STRING
    if isinstance(value, bool):
        return value, TYPE.BOOL, None
    if isinstance(value, int):
        small = TYPE.INT32 if value < 0 else TYPE.UINT32
        return (
            value,
            small if -(2**31) <= value < 2**32 else TYPE.UINT64 if value > 0 else TYPE.INT64,
            None,
        )
    return value, TYPE.FLOAT32 if isinstance(value, float) else TYPE.STRING, None


def rewrite(
    source: Path,
    target: Path,
    changes: Mapping[str, Any] | None = None,
    drop: Iterable[str] = (),
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, Any]] | None = None,
) -> Path:
    """A copy of a GGUF file with other metadata and tensors; `drop` names keys and tensors.

    tensors: values, or the bytes of blocks and their type.
    """
    reader = gguf.GGUFReader(source)
    writer = _Writer(target, "llama")
    writer.kv_data = [{}]
    changes, left = dict(changes or {}), set(drop)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in left or key in changes:
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == TYPE.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    for key, value in changes.items():
        value, kind, sub = entry(value)
        writer.add_key_value(key, value, kind, sub_type=sub)
    for tensor in reader.tensors:
        if tensor.name not in left:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in (tensors or {}).items():
        data, kind = values if isinstance(values, tuple) else (values, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
