"""The structs of csrc/weight_only/arguments.h, field for field, and the numbers C++ names things by."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

#: (decoder, bits) -> csrc/weight_only/NAME.cu
CODES = {
    ("linear", 2): "linear2",
    ("linear", 3): "linear3",
    ("linear", 4): "linear4",
    ("linear", 8): "linear8",
    ("lut16", 4): "lut16",
    ("e4m3", 8): "e4m3",
    ("e5m2", 8): "e5m2",
}
SCALINGS = {"group": 0, "scale": 1, "scale_flat": 2, "nested": 3, "nested_flat": 4}
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTERS = [
    "x", "qdata", "qhigh", "perm", "slice_group", "table", "scale", "zero",
    "nested_map", "nested_outer", "nested_offset", "bias", "y", "partial", "counter",
]  # fmt: skip
_SIZES = [
    "m", "n", "k", "kp", "tiles", "share", "group", "shift",
    "row_run", "run", "scaling", "scale_type", "x_stride", "chunk",
]  # fmt: skip


class WeightOnlyArgs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int) for name in _SIZES]


class Call(ctypes.Structure):
    """What the extension is called with. A weight keeps one a kernel; calls fill in and launch copies of it,
    for several threads may use one weight."""

    #: whether it, or a copy of it, was launched before
    launched = False
    #: what it is a copy of
    kept: Call | None = None

    def copy(self) -> Self:
        made = type(self).from_buffer_copy(self)
        made.kept = self
        return made


class WeightOnlyCall(Call):
    _fields_ = [
        ("args", WeightOnlyArgs),
        ("stream", ctypes.c_uint64),
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("kernel", ctypes.c_int),
        ("is_bfloat", ctypes.c_int),
        ("runs", ctypes.c_int),
        ("early", ctypes.c_int),
        ("size", ctypes.c_int),
    ]
