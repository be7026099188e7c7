"""The mutator: adds, changes and removes edits (see documents.py); inputs stay nearly sound.

An edit puts in a number at a limit, a text that means something to the code (any name in its
source), a value from elsewhere in the same seed or from the same place in another, or a slightly
changed old value.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from . import documents
from .documents import Tree

_MOST_EDITS = 6
_NUMBERS = [
    0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129,
    255, 256, 257, 1000, 4096, 65535, 65536, 10**6, 10**7, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
    0.0, -0.0, 0.5, 1.0, 1.5, 1e-45, 1e-5, 1e5, 1e38, 1e39, 1e300, float("inf"), float("-inf"),
    float("nan"),
]  # fmt: skip
_ODD: list[Any] = [
    None, True, False, "", " ", "a", "\0", "\ud800", "é", "../x", "/etc/passwd", ".", "..",
    "x.safetensors", "re:", "re:.*", "re:(", ".*", "-:.*", "re:(a|a|[a-z_.0-9]+)+!",
    "(?:[a-z0-9_.]+)+!", "-1", "1", "NaN", "Infinity", "float16", "bfloat16", "float8_e4m3fn",
    "cuda", "meta", "auto", "flash_attention_2", "sdpa", "kernels-community/flash-attn",
    [], {}, [[]], [None], [1], [-1], ["a"], {"a": 1}, {"": {}}, {"__float__": "Infinity"},
    {"__float__": "x"},
    {"$list": [100_000, 0]}, {"$list": [1000, "a"]}, {"$text": [300, "a"]},
    {"$text": [100_000, "("]}, {"$deep": 50}, {"$deep": 900}, {"$deep": 960}, {"$deep": 100_000},
    {"$raw": ""}, {"$raw": "1e999"}, {"$raw": "-"}, {"$raw": '1, "model_type": "gpt2"'},
    {"$raw": "9" * 5000}, {"$raw": "[" * 2000},
]  # fmt: skip


@cache
def words() -> list[str]:
    """All texts that look like names in the sources that read files."""
    root, found = Path(__file__).parents[2] / "qkernels", set()
    for path in sorted(
        [
            *(root / "checkpoints").glob("*.py"),
            *(root / "formats").glob("**/*.py"),
            root / "quantizers/importance.py",
        ]
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.fullmatch(r"[\w.\-]{2,40}", node.value)
            ):
                found.add(node.value)
    return sorted(found)


class Mutator:
    """Mutates cases of a target with these seeds.

    more: names that may become keys, beside those in the seeds and in the sources.
    """

    def __init__(self, seeds: dict[str, Tree], more: list[str]) -> None:
        self.seeds, self.names = seeds, sorted(seeds)
        keys = {key for tree in seeds.values() for key in _keys(tree)}
        self.keys = sorted(keys) + words() + more
        self.sizes = {name: _sizes(tree) for name, tree in seeds.items()}

    def __call__(
        self, data: bytes, most: int, seed: int, change: Callable[[bytes], bytes] | None = None
    ) -> bytes:
        """A mutation of `data` of at most `most` bytes.

        change: libFuzzer's own mutator, for the bytes of a text.
        """
        rng = random.Random(seed)
        case = documents.parse(data)
        if case is None or case["seed"] not in self.seeds:
            case = {"seed": rng.choice(self.names), "edits": []}
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            self._once(rng, case, change)
        case["edits"] = case["edits"][-_MOST_EDITS:]
        while len(text := documents.text_of(case)) > most and case["edits"]:
            case["edits"].pop(rng.randrange(len(case["edits"])))
        return text

    def cross(self, one: bytes, other: bytes, most: int, seed: int) -> bytes:
        """A case with edits of both."""
        rng = random.Random(seed)
        first, second = documents.parse(one), documents.parse(other)
        if first is None or second is None:
            return one
        edits = [edit for edit in first["edits"] + second["edits"] if rng.random() < 0.6]
        text = documents.text_of({**first, "edits": edits[-_MOST_EDITS:]})
        return text if len(text) <= most else one

    def _once(
        self, rng: random.Random, case: dict[str, Any], change: Callable[[bytes], bytes] | None
    ) -> None:
        edits, dice = case["edits"], rng.random()
        if dice < 0.04:
            case["seed"] = rng.choice(self.names)
        elif dice < 0.14 and edits:
            edits.pop(rng.randrange(len(edits)))
        elif dice < 0.28 and edits:
            edit = rng.choice(edits)
            if edit[0] == "set" and len(edit) == 3:
                edit[2] = self._value(rng, edit[2], self._last(edit[1]), change)
        else:
            edits.append(self._edit(rng, case["seed"], change))

    def _last(self, path: Any) -> Any:
        return path[-1] if isinstance(path, list) and path else None

    def _edit(
        self, rng: random.Random, name: str, change: Callable[[bytes], bytes] | None
    ) -> list[Any]:
        seed = self.seeds[name]
        path = _descend(rng, seed)
        value = documents.at(seed, path)
        dice = rng.random()
        if isinstance(value, dict) and "data" not in value and dice < 0.6:
            path, value = [*path, rng.choice(self.keys)], None
        elif isinstance(value, list) and dice < 0.3:
            path, value = [*path, len(value)], rng.choice(value) if value else None
        dice = rng.random()
        if dice < 0.62:
            return ["set", path, self._value(rng, value, path[-1], change)]
        if dice < 0.70:
            return ["copy", path, _descend(rng, seed)]
        if dice < 0.75:
            return ["rename", path, rng.choice(self.keys)]
        if dice < 0.83:
            return ["drop", path]
        file = rng.choice(sorted(seed))
        size, header = self.sizes[name][file]
        place = rng.randrange(min(size, header + 64) if rng.random() < 0.85 else size)
        if dice < 0.85:
            return ["kind", file, rng.choice(documents.KINDS)]
        if dice < 0.87:
            return ["cut", file, place]
        wide = rng.choice((1, 1, 2, 4, 8))
        content = (
            rng.randbytes(wide)
            if rng.random() < 0.6
            else (int(rng.choice(_NUMBERS[:44])) % (1 << 8 * wide)).to_bytes(wide, "little")
        )
        return ["patch" if dice < 0.97 else "insert", file, place, content.hex()]

    def _value(
        self, rng: random.Random, old: Any, key: Any, change: Callable[[bytes], bytes] | None
    ) -> Any:
        dice = rng.random()
        if isinstance(old, bool) and dice < 0.3:
            return not old
        if isinstance(old, (int, float)) and dice < 0.4:
            return rng.choice(
                (
                    old + 1,
                    old - 1,
                    old * 2,
                    old // 2 if old == old and abs(old) < 1e308 else 0,
                    -old,
                    old + 0.5,
                    float(old) if abs(old) < 1e300 else 0.0,
                    old * 10**9,
                    str(old),
                )
            )
        if isinstance(old, str) and dice < 0.25 and change is not None and old:
            return change(old.encode("utf-8", "surrogatepass")[:200]).decode("utf-8", "replace")
        if isinstance(old, list) and old and dice < 0.4:
            return rng.choice(
                (old[:-1], old[1:], old * 2, old[::-1], [*old, old[0]], [*old, rng.choice(_ODD)])
            )[:200]
        if dice < 0.55:
            others = [v for v in self._elsewhere(key) if _small(v)]
            if others:
                return rng.choice(others)
        if dice < 0.72:
            return rng.choice(_NUMBERS) * rng.choice((1, 1, 1, -1))
        if dice < 0.82:
            return rng.choice(self.keys)
        if dice < 0.86:
            return [self._value(rng, old, key, change) for _ in range(rng.randrange(4))]
        if dice < 0.89:
            return {
                rng.choice(self.keys): self._value(rng, None, None, change)
                for _ in range(rng.randrange(3))
            }
        return rng.choice(_ODD)

    @cache  # noqa: B019  # a mutator lives as long as its process
    def _elsewhere(self, key: Any) -> list[Any]:
        """The values under this key in all seeds."""
        found: list[Any] = []

        def visit(node: Any) -> None:
            for name, value in node.items() if isinstance(node, dict) else enumerate(node):
                if name == key and value not in found:
                    found.append(value)
                if isinstance(value, (dict, list)):
                    visit(value)

        if isinstance(key, str):
            for tree in self.seeds.values():
                visit(tree)
        return found


def _small(value: Any) -> bool:
    return not isinstance(value, bytes) and len(str(value)) < 1000


def _keys(node: Any) -> set[str]:
    if isinstance(node, dict):
        return {k for k in node if len(k) < 60} | {
            key for value in node.values() for key in _keys(value)
        }
    return {key for value in node for key in _keys(value)} if isinstance(node, list) else set()


def _sizes(tree: Tree) -> dict[str, tuple[int, int]]:
    """File -> (bytes, bytes before the tensors' data)."""
    found = {}
    for name, content in documents.files_of(tree, []).items():
        value = tree[name]
        data = (
            len(value["data"])
            if isinstance(value, dict) and isinstance(value.get("data"), bytes)
            else 0
        )
        found[name] = max(1, len(content)), len(content) - data
    return found


def _descend(rng: random.Random, tree: Tree) -> list[Any]:
    """A path to any node but the root; at the least, the name of a file."""
    path: list[Any] = [rng.choice(sorted(tree))]
    node = tree[path[0]]
    while isinstance(node, (dict, list)) and node and rng.random() < 0.87:
        keys = [k for k in node if k != "data"] if isinstance(node, dict) else range(len(node))
        if not keys:
            break
        key = rng.choice(keys)
        path.append(key)
        node = node[key]
    return path
