"""Fuzzed inputs as edits of sound files, in JSON: they are short, readable, and survive new seeds.

    {"seed": "gptq", "edits": [["set", ["config.json", "quantization_config", "bits"], 1e30], ...]}

A seed is a tree: file name -> content. config.json is its JSON; a safetensors file is {"header":
JSON, "data": bytes}; a GGUF file is {"version", "metadata": {key: {"type", "item", "value"}},
"tensors": {name: {"type", "shape", "offset"}}, "data": bytes}. Edits of the tree come first, in
their order, then edits of the files' bytes:

    ["set", path, value]        replace a value, or add a key
    ["copy", path, path]        copy the value at the second path to the first
    ["rename", path, key]       give a value another key, at the same place
    ["drop", path]
    ["patch", file, at, hex]    overwrite bytes from `at` on (from the end if negative)
    ["insert", file, at, hex]
    ["cut", file, length]
    ["kind", file, kind]        not a file: "fifo", "folder", "zero" (a link to /dev/zero), "loop",
                                "broken"

An edit of something that does not exist does nothing. Some values abbreviate long ones: {"$list":
[count, item]}, {"$text": [count, text]}, {"$deep": depth}. {"$raw": text} puts the text itself into
the JSON.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Mapping
from typing import Any

KINDS = ("fifo", "folder", "zero", "loop", "broken")
_BYTES = ("patch", "insert", "cut", "kind")
#: the most items that a "$list", "$text" or "$deep" makes
MOST = 1_000_000
_GGUF_CODES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9

Tree = dict[str, Any]


class Special(str):
    """Something that lies in a file's place, one of KINDS."""


def parse(data: bytes) -> dict[str, Any] | None:
    """The case in `data`; None if it holds none."""
    try:
        case = json.loads(data)
    except (ValueError, RecursionError):
        return None
    good = (
        isinstance(case, dict)
        and isinstance(case.get("seed"), str)
        and isinstance(case.get("edits"), list)
    )
    return case if good and all(isinstance(edit, list) and edit for edit in case["edits"]) else None


def text_of(case: Mapping[str, Any]) -> bytes:
    return json.dumps(case, separators=(",", ":")).encode()


# ---------------------------------------------------------------------- edits of trees
def edited(seed: Tree, edits: list[list[Any]]) -> Tree:
    """A copy of the tree after all edits of the tree (not those of bytes)."""
    tree: Tree = copy.deepcopy(seed)
    for edit in edits:
        if edit[0] not in _BYTES:
            try:
                _apply(tree, edit)
            except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
                continue  # of what is not there
    return tree


def at(tree: Any, path: list[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _apply(tree: Tree, edit: list[Any]) -> None:
    action, path = edit[0], edit[1]
    parent, key = at(tree, path[:-1]), path[-1]
    if action == "set":
        if isinstance(parent, list) and key == len(parent):
            parent.append(None)
        parent[key] = expanded(edit[2])
    elif action == "copy":
        parent[key] = copy.deepcopy(at(tree, edit[2]))
    elif action == "rename":
        items = [(edit[2] if name == key else name, value) for name, value in parent.items()]
        parent.clear()
        parent.update(items)
    elif action == "drop":
        del parent[key]


def expanded(value: Any) -> Any:
    """`value` with the long values in place of their abbreviations."""
    if isinstance(value, list):
        return [expanded(item) for item in value]
    if not isinstance(value, dict):
        return value
    for name, make in (("$list", _list), ("$text", _text), ("$deep", _deep)):
        if set(value) == {name}:
            try:
                return make(value[name])
            except (TypeError, ValueError):
                return None
    return {key: expanded(item) for key, item in value.items()}


def _list(given: Any) -> list[Any]:
    count, item = given
    return [expanded(item)] * min(int(count), MOST)


def _text(given: Any) -> str:
    count, text = given
    return str(text) * min(int(count), MOST // max(1, len(str(text))))


def _deep(given: Any) -> Any:
    found: list[Any] = []
    for _ in range(min(int(given), 100_000)):
        found = [found]
    return found


# ---------------------------------------------------------------------- trees as files
def files_of(tree: Tree, edits: list[list[Any]]) -> dict[str, bytes | Special]:
    """File name -> its bytes, after the edits of bytes."""
    files: dict[str, bytes | Special] = {
        name: _encoded(name, value) for name, value in tree.items()
    }
    for edit in edits:
        if edit[0] in _BYTES and len(edit) > 2 and isinstance(edit[1], str) and edit[1] in files:
            try:
                files[edit[1]] = _rewritten(files[edit[1]], edit)
            except (LookupError, TypeError, ValueError):
                continue
    return files


def _rewritten(content: bytes | Special, edit: list[Any]) -> bytes | Special:
    if edit[0] == "kind":
        return Special(edit[2]) if edit[2] in KINDS else content
    if isinstance(content, Special):
        return content
    place = int(edit[2])
    if edit[0] == "cut":
        return content[:place]
    new = bytes.fromhex(edit[3])
    place = max(0, min(place if place >= 0 else len(content) + place, len(content)))
    return content[:place] + new + content[place + (len(new) if edit[0] == "patch" else 0) :]


def _encoded(name: str, value: Any) -> bytes:
    if isinstance(value, dict) and "data" in value and isinstance(value["data"], bytes):
        if "header" in value:
            header = _json(value["header"])
            return struct.pack("<Q", len(header)) + header + value["data"]
        return _gguf(value)
    return _json(value)


def _json(value: Any) -> bytes:
    try:
        text = _Encoder().encode(value)
    except RecursionError:  # what is deep is made of lists alone: see _deep
        text = "[" * 100_000 + "]" * 100_000
    return text.encode("utf-8", "surrogatepass")


class _Encoder(json.JSONEncoder):
    """Writes JSON in which {"$raw": text} becomes the text itself."""

    def default(self, o: Any) -> Any:
        return None  # a file's data, copied to where JSON is

    def encode(self, o: Any) -> str:
        raw: list[str] = []

        def marked(value: Any) -> Any:
            if isinstance(value, dict):
                if set(value) == {"$raw"}:
                    raw.append(str(value["$raw"]))
                    return f"$raw:{len(raw) - 1}$"
                return {key: marked(item) for key, item in value.items()}
            return [marked(item) for item in value] if isinstance(value, list) else value

        text = super().encode(marked(o))
        for i, inserted in enumerate(raw):
            text = text.replace(f'"$raw:{i}$"', inserted)
        return text


# ---------------------------------------------------------------------- GGUF
def gguf_tree(content: bytes, path: str) -> Tree:
    """The tree of a sound GGUF file with these bytes, which is also at `path`."""
    import gguf

    reader = gguf.GGUFReader(path)
    metadata = {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            item = int(field.types[-1]) if field.types[0] == _ARRAY else None
            metadata[key] = {"type": int(field.types[0]), "item": item, "value": field.contents()}
    tensors = {
        t.name: {
            "type": int(t.tensor_type),
            "shape": [int(s) for s in t.shape],
            "offset": int(t.field.parts[5][0]),
        }
        for t in reader.tensors
    }
    return {
        "version": 3,
        "metadata": metadata,
        "tensors": tensors,
        "data": content[reader.data_offset :],
    }


def _gguf(tree: Tree) -> bytes:
    """The bytes of a GGUF file with anything that the tree says."""
    metadata, tensors = _items(tree.get("metadata")), _items(tree.get("tensors"))
    out = [
        b"GGUF",
        _number(tree.get("version"), "I"),
        struct.pack("<QQ", len(tensors), len(metadata)),
    ]
    for key, entry in metadata:
        entry = entry if isinstance(entry, dict) else {"type": _STRING, "value": entry}
        kind = entry.get("type")
        out += [
            _string(key),
            _number(kind, "I"),
            _value(kind, entry.get("item"), entry.get("value")),
        ]
    for name, info in tensors:
        info = info if isinstance(info, dict) else {}
        shape = info.get("shape")
        shape = shape if isinstance(shape, list) else [shape]
        out += [_string(name), struct.pack("<I", len(shape)), *(_number(s, "Q") for s in shape)]
        out += [_number(info.get("type"), "I"), _number(info.get("offset"), "Q")]
    header = b"".join(out)
    return header + bytes(-len(header) % 32) + tree["data"]


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _value(kind: Any, item: Any, value: Any) -> bytes:
    if kind == _ARRAY:
        values = value if isinstance(value, list) else [value]
        return (
            _number(item, "I")
            + struct.pack("<Q", len(values))
            + b"".join(_value(item, 4, v) for v in values)
        )
    if kind == _STRING or not isinstance(kind, int) or kind not in _GGUF_CODES:
        return _string(value)
    return _number(value, _GGUF_CODES[kind])


def _string(value: Any) -> bytes:
    text = (value if isinstance(value, str) else json.dumps(type(value).__name__)).encode(
        "utf-8", "surrogatepass"
    )
    return struct.pack("<Q", len(text)) + text


def _number(value: Any, code: str) -> bytes:
    size = struct.calcsize("<" + code)
    value = value if isinstance(value, (int, float)) else 0
    if code in "fd":
        try:
            return struct.pack("<" + code, value)
        except OverflowError:
            return struct.pack("<" + code, float("inf"))
    value = int(value) if abs(value) < 1e300 else 0  # which NaN and infinity are not
    return (value % (1 << 8 * size)).to_bytes(size, "little")
