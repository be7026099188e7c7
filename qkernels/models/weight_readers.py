"""Finds layers that a model never calls, because its own code reads their weight.

Mamba multiplies with `self.dt_proj.weight`, torch's MultiheadAttention with `self.out_proj.weight`.
Such a layer cannot be packed. They are found in the source code, which is not run: attribute chains
`self.<path>.weight` in the methods of each class. Queries (`.weight.dtype`) do not count. Code
under a condition that is false in inference does not count either (`if self.training and ...`,
`if self.pretraining_tp > 1`).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn

#: attributes of a weight that a StandIn (nn/stand_in.py) also has
_QUERIES = {
    "dtype",
    "device",
    "shape",
    "size",
    "ndim",
    "dim",
    "numel",
    "is_meta",
    "is_cuda",
    "requires_grad",
}
_QUERIES |= {"is_floating_point", "is_complex"}
#: functions that only query their argument
_QUERY_FUNCTIONS = {"isinstance", "hasattr", "getattr", "type", "id"}
#: methods that run before the weights are loaded
_SETUP = {
    "__init__",
    "reset_parameters",
    "_reset_parameters",
    "_init_weights",
    "init_weights",
    "tie_weights",
}
#: modules with a fast path that reads weights, which is not taken for a weight with a
#: __torch_function__, as a StandIn has
_SAFE_MODULES = (nn.TransformerEncoderLayer,)


class _Read(NamedTuple):
    """One place where code reads a weight.

    Attributes:
        path: name of the layer, relative to the module that reads.
        conditions: (test, outcome that it must have) of every branch around the place.
    """

    path: str
    conditions: tuple[tuple[ast.expr, bool], ...]


def layers_read_by(module: nn.Module) -> set[str]:
    """Names, relative to `module`, of the layers whose weight its own methods compute with."""
    if isinstance(module, _SAFE_MODULES):
        return set()
    return {
        read.path
        for read in _reads(type(module))  # type: ignore[arg-type]
        if all(_value(test, module) in (None, outcome) for test, outcome in read.conditions)
    }


@lru_cache(maxsize=4096)
def _reads(kind: type) -> tuple[_Read, ...]:
    """All reads in the methods of a class, except those that run before the weights are loaded."""
    reads: list[_Read] = []
    names = {
        name for base in kind.__mro__ if base not in (nn.Module, object) for name in vars(base)
    }
    for name in names - _SETUP:
        method = inspect.unwrap(getattr(kind, name, None))  # type: ignore[arg-type]
        if not inspect.isfunction(method) or "weight" not in method.__code__.co_names:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):  # no source code
            continue
        reads += _reads_in(tree, ())
    return tuple(reads)


def _reads_in(node: ast.AST, conditions: tuple[tuple[ast.expr, bool], ...]) -> Iterator[_Read]:
    """The reads in a syntax tree; `conditions` are those of the branches around it."""
    if isinstance(node, (ast.If, ast.IfExp)):
        yield from _reads_in(node.test, conditions)
        branches: Any = ((node.body, True), (node.orelse, False))
        for branch, outcome in branches:
            for child in branch if isinstance(branch, list) else [branch]:
                yield from _reads_in(child, (*conditions, (node.test, outcome)))
        return
    if isinstance(node, ast.Attribute) and node.attr in _QUERIES and _path(node.value):
        return
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Name) and function.id in _QUERY_FUNCTIONS:
        return
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and (path := _path(node)):
        yield _Read(path, conditions)
        return
    for child in ast.iter_child_nodes(node):
        yield from _reads_in(child, conditions)


def _path(node: ast.AST) -> str | None:
    """ "a.b" for the expression self.a.b.weight, None for any other expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if (
        not isinstance(node, ast.Name)
        or node.id != "self"
        or names[0:1] != ["weight"]
        or len(names) < 2
    ):
        return None
    return ".".join(reversed(names[1:]))


def _value(test: ast.AST, module: nn.Module) -> bool | None:
    """Whether a condition holds for `module` in inference; None if that is known only in a call."""
    value = _evaluated(test, module)
    return None if value is _UNKNOWN else bool(value)


_UNKNOWN = object()
_COMPARISONS: dict[type, Any] = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b, ast.Lt: lambda a, b: a < b, ast.LtE: lambda a, b: a <= b,
    ast.Is: lambda a, b: a is b, ast.IsNot: lambda a, b: a is not b,
}  # fmt: skip


def _evaluated(node: ast.AST, module: nn.Module) -> Any:
    """The value of an expression over attributes of `module`, or _UNKNOWN."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if isinstance(node, ast.Attribute):
        base = _evaluated(node.value, module)
        if base is module and node.attr == "training":
            return False
        value = _UNKNOWN if base is _UNKNOWN else inspect.getattr_static(base, node.attr, _UNKNOWN)
        return value if isinstance(value, (bool, int, float, str, type(None))) else _UNKNOWN
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _evaluated(node.operand, module)
        return _UNKNOWN if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [_evaluated(value, module) for value in node.values]
        decides = isinstance(node.op, ast.Or)  # True decides an "or", False an "and"
        if any(value is not _UNKNOWN and bool(value) == decides for value in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        left, right = (_evaluated(side, module) for side in (node.left, node.comparators[0]))
        try:
            return (
                _UNKNOWN
                if _UNKNOWN in (left, right)
                else _COMPARISONS[type(node.ops[0])](left, right)
            )
        except TypeError:
            return _UNKNOWN
    return _UNKNOWN
