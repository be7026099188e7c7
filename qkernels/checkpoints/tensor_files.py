"""safetensors files of one directory, whole or in shards: read by tensor, written by shard.

    u64 header length, JSON header {name: {dtype, shape, data_offsets}}, data

Headers are checked against the file's size before any tensor is read. Pickled checkpoints (.bin,
.pt, .pth, .ckpt) are refused, because unpickling runs code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import (
    MAX_JSON_BYTES,
    UnchangedFile,
    check_regular,
    is_out_of_memory,
    open_regular,
    parse_json,
    read_json,
    read_part,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

#: tensors of one model; the largest mixtures in 4 bits have 300,000
_MAX_TENSORS = 1_000_000
#: the most dimensions that torch computes with
_MAX_DIMENSIONS = 64
#: files mapped at a time, because the tensors of a layer may be in two neighbouring shards
_MAX_OPEN = 2
#: characters of a tensor's name, because looking up its module takes a step for each dot
_MAX_NAME = 500
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor.

    dtype: safetensors' name, such as "F16".
    offset: where in the file its bytes begin.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of a .safetensors file.

    Raises FileNotFoundError, or ValueError naming the file, the field, what was expected and found.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path}: header length: expected 8 bytes, got a file of {size}")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_JSON_BYTES):
            raise ValueError(
                f"{path}: header length: expected at most {min(size - 8, MAX_JSON_BYTES)} "
                f"in a file of {size} bytes, got {length}"
            )
        text = file.read(length)
    header = parse_json(f"{path}: header", text, unique=True)
    header.pop("__metadata__", None)
    infos = {name: _info(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_layout(path, header, size - 8 - length)
    return infos


def _check_layout(path: Path, header: dict[str, Any], data_bytes: int) -> None:
    """ValueError unless the tensors cover the data without holes or overlaps."""
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != expected:
            what = "overlap" if begin < expected else "hole"
            raise ValueError(
                f"{path}: tensor {name!r:.200}: data_offsets: expected data from byte {expected}, "
                f"right after the previous tensor, got {begin} ({what})"
            )
        expected = end
    if expected != data_bytes:
        raise ValueError(f"{path}: expected {expected} bytes of data, got {data_bytes}")


def _info(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    """The checked header entry of a tensor, in a file of `size` bytes with data from `start` on."""
    data_bytes = size - start
    where = f"{path}: tensor {name!r:.200}"
    if len(name) > _MAX_NAME:
        raise ValueError(
            f"{where}: expected a name of at most {_MAX_NAME} characters, got {len(name)}"
        )
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where}: dtype: expected one of {', '.join(_BITS)}; got {dtype!r:.60}")
    if not isinstance(shape, list) or not all(type(s) is int and 0 <= s < 2**63 for s in shape):
        raise ValueError(f"{where}: shape: expected a list of sizes, got {shape!r:.60}")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(
            f"{where}: shape: expected at most {_MAX_DIMENSIONS} dimensions, got {len(shape)}"
        )
    good = isinstance(offsets, list) and len(offsets) == 2
    if not good or not all(type(offset) is int and abs(offset) < 2**63 for offset in offsets):
        raise ValueError(f"{where}: data_offsets: expected [begin, end], got {offsets!r:.60}")
    begin, end = offsets
    nbytes = math.prod(shape) * _BITS[dtype] // 8
    if begin < 0 or end - begin != nbytes:
        raise ValueError(
            f"{where}: data_offsets: expected {nbytes} bytes for {dtype} {shape}, got "
            f"{begin}..{end}"
        )
    if end > data_bytes:
        raise ValueError(
            f"{where}: expected data up to byte {end}, got a file with {data_bytes} bytes of it "
            "(truncated?)"
        )
    return TensorInfo(dtype, tuple(shape), nbytes, path, start + begin)


class TensorFiles:
    """The tensors of a model directory (or of files), memory-mapped and read one at a time.

    Use as a context manager. `infos` holds what is known without reading data. Before each tensor,
    a file that was replaced, truncated or written to since its header was read is refused. If
    another process truncates a file while its bytes are copied, SIGBUS ends this process, as for
    every program that maps files.
    """

    def __init__(self, path: str | os.PathLike[str] | Sequence[Path]) -> None:
        """Raises FileNotFoundError or ValueError; see `read_header` and `locate`."""
        self.infos: dict[str, TensorInfo] = {}
        expected: dict[Path, list[str] | None]
        if isinstance(path, Sequence) and not isinstance(path, str):
            expected = dict.fromkeys(path)
        else:
            path = Path(path)
            expected = locate(path) if path.is_dir() else {path: None}
        self._unchanged: dict[Path, UnchangedFile] = {}
        for file, names in expected.items():
            self._unchanged[file] = UnchangedFile(file)
            header = read_header(file)
            missing = sorted(set(names or ()) - set(header))
            if missing:
                raise ValueError(
                    f"{file}: expected tensor {missing[0]!r}, which {INDEX} places here, "
                    f"found {len(header)} others"
                )
            for name in header:
                if name in self.infos:
                    raise ValueError(
                        f"{file}: tensor {name!r}: also in {self.infos[name].file.name}"
                    )
            self.infos.update(header)
            if len(self.infos) > _MAX_TENSORS:
                raise ValueError(
                    f"{file}: expected at most {_MAX_TENSORS} tensors in all, got more"
                )
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        while self._open:
            self._close_oldest()

    def _close_oldest(self) -> None:
        self._open.pop(next(iter(self._open))).__exit__(None, None, None)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, backed by the file until it is copied.

        Raises KeyError if there is no such tensor, ValueError if it cannot be read or the file
        changed.
        """
        from safetensors import SafetensorError, safe_open

        file = self.infos[name].file
        self._unchanged[file].check()
        try:
            if file not in self._open:
                if len(self._open) == _MAX_OPEN:
                    self._close_oldest()
                self._open[file] = safe_open(file, framework="pt").__enter__()
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError, TypeError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            # A dtype that this version of torch lacks raises TypeError or AttributeError in
            # safetensors.
            raise ValueError(f"{file}: tensor {name!r}: cannot be read: {error}") from error

    def read_as(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """As `read`, with a floating-point tensor converted to `dtype` unless that is None.

        A tensor that needs conversion is read, not mapped: pages of a mapped file count as this
        process's memory for as long as the map exists.
        """
        info = self.infos[name]
        stored = _FLOATS.get(info.dtype)
        if dtype is None or stored is None or stored == dtype:
            return self.read(name)
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        self._unchanged[info.file].check()
        with open_regular(info.file) as file:
            raw = read_part(file, f"{info.file}: tensor {name!r}", info.offset, info.nbytes)
        return torch.frombuffer(raw, dtype=stored).view(info.shape).to(dtype)


def locate(directory: Path) -> dict[Path, list[str] | None]:
    """safetensors files of a model directory -> the tensors that its index places there.

    The value is None if there is no index. Raises ValueError for a bad index, an index that names a
    missing file, pickled weights only, and a directory without weights.
    """
    index = directory / INDEX
    # even if there is an index, which may be left from an earlier save
    if check_regular(directory / SINGLE):
        return {directory / SINGLE: None}
    if not check_regular(index):
        paths = sorted(directory.glob("*.safetensors"))
        if len(paths) == 1:
            return {paths[0]: None}
        if paths:
            raise ValueError(
                f"{directory}: expected {SINGLE} or {INDEX}, got {len(paths)} other files"
            )
        pickles = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{directory}: expected safetensors weights, got only pickled ones ({pickles[0]}), "
                "which are never loaded because unpickling can run any code; convert them to "
                "safetensors"
            )
        raise ValueError(f"{directory}: expected {SINGLE} or {INDEX}, found neither")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: weight_map: expected a non-empty object, got {weight_map!r:.60}"
        )
    placed: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        # Only a bare file name, because the index must not lead out of the directory.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ValueError(
                f"{index}: weight_map[{name!r:.200}]: expected a .safetensors file name, got "
                f"{file!r:.200}"
            )
        names = placed.setdefault(directory / file, [])
        assert names is not None
        names.append(name)
    for path in placed:
        try:
            exists = check_regular(path)
        except ValueError as error:
            raise ValueError(f"{index}: weight_map: {error}") from None
        if not exists:
            raise ValueError(f"{index}: expected a file {path.name} in {directory}, found none")
    return placed


def write(tensors: Iterable[tuple[str, Tensor]], directory: Path, max_shard_bytes: int) -> None:
    """Write tensors in the order they come: one file, or an index and shards.

    A shard has at most `max_shard_bytes`, but a larger tensor gets a shard for itself. Memory holds
    one shard at a time.
    """
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        total += sum(t.numel() * t.element_size() for t in shard.values())
        _write_file(shard, directory / _temporary_name(len(shards)))
        shards.append(list(shard))
    if len(shards) == 1:
        os.replace(directory / _temporary_name(0), directory / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(directory / _temporary_name(i), directory / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _temporary_name(i: int) -> str:
    """Temporary name of a shard, because the number of shards is known only at the end."""
    return f"part-{i}.safetensors"


def _shards(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Group tensors into shards of at most `limit` bytes, on the CPU."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += nbytes
    yield shard


def _write_file(shard: dict[str, Tensor], path: Path) -> None:
    """Write one shard, with the permissions that other new files get."""
    storages: set[int] = set()
    for name, tensor in shard.items():
        # safetensors refuses tensors that share memory, as two views of one parameter would.
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in storages:
            shard[name] = tensor.clone()
        storages.add(pointer)
    write_tensors(shard, path, {"format": "pt"})
    # save_file makes the file readable by its owner only. Use the permissions that the umask gave
    # to its directory.
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file. OSError if that fails, e.g. because the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
