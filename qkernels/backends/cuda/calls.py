"""The structs of csrc/weight_only/arguments.h, field for field."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

#: (zero, flat, nested) of the row of `Plain` scales -> their number in arguments.h
SCALINGS = {
    ("point", False, False): 0,
    ("none", False, False): 1,
    ("none", True, False): 2,
    ("none", False, True): 3,
    ("none", True, True): 4,
}
#: dtype of scales -> its number in arguments.h
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTERS = [
    "x", "qdata", "qhigh", "perm", "slice_group", "table",
    "scaler0", "scaler1", "scaler2", "scaler3", "row_offsets", "col_vals", "x_columns",
    "bias", "y", "partial", "counter",
]  # fmt: skip
_SIZES = [
    "m", "n", "k", "kp", "tiles", "k_slice", "group", "shift",
    "row_group", "scale_group", "scaling", "scale_type",
    "x_stride", "whole", "x_chunks", "x_tail", "stage_bytes",
    "scale_stride", "scale_row_bytes", "last_group", "group_divisor", "row_divisor",
    "x_rows", "is_float",
]  # fmt: skip


def divisor(number: int, count: int) -> int:
    """`number` as `divided` of csrc/weight_only/scalers.h takes it, to divide 0 .. count - 1."""
    return 0 if number >= count else -(-(2**31) // number)


class WeightOnlyArgs(ctypes.Structure):
    __slots__ = ()  # a name that is no field is an AttributeError, not an attribute
    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [
        (name, ctypes.c_int) for name in _SIZES
    ]


class Call(ctypes.Structure):
    """The argument of the extension. A weight keeps one template per kernel.

    Calls fill in and launch copies of the template, because several threads may use one weight.
    """

    def copy(self) -> Self:
        return type(self).from_buffer_copy(self)


class WeightOnlyCall(Call):
    _fields_ = [
        ("args", WeightOnlyArgs),
        ("stream", ctypes.c_uint64),
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("kernel", ctypes.c_int),
        ("is_bfloat", ctypes.c_int),
        ("scale_groups", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("pdl", ctypes.c_int),
        ("size", ctypes.c_int),
    ]
