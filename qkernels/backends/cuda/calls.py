"""The structs of csrc/weight_only/arguments.h, field for field, and the numbers C++ names things by."""

from __future__ import annotations

import ctypes

import torch

#: (decoder, bits) -> csrc/weight_only/NAME.cu
CODES = {
    ("linear", 2): "linear2",
    ("linear", 3): "linear3",
    ("linear", 4): "linear4",
    ("linear", 8): "linear8",
    ("lut16", 4): "lut16",
    ("e4m3", 8): "e4m3",
    ("e5m2", 8): "e5m2",
    ("halfway", 2): "halfway2",
    ("halfway", 3): "halfway3",
    ("halfway", 4): "halfway4",
    ("e8p", 2): "e8p2",
    ("e8p", 3): "e8p3",
    ("e8p", 4): "e8p4",
}
SCALINGS = {"group": 0, "scale": 1, "scale_flat": 2, "nested": 3, "nested_flat": 4}
#: 32-bit words of codebooks, which lie in front of all else in shared memory
BOOK_WORDS = {
    "e8p2": 256,
    "e8p3": 512,
    "e8p4": 256,
}
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTERS = [
    "x", "qdata", "qhigh", "perm", "slice_group", "table", "scale", "zero",
    "nested_map", "nested_outer", "nested_offset", "bias", "y", "partial", "counter",
]  # fmt: skip
_SIZES = [
    "m", "n", "k", "kp", "tiles", "share", "group", "shift",
    "row_run", "run", "scaling", "scale_type", "x_stride", "chunk", "is_float",
]  # fmt: skip


class WeightOnlyArgs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int) for name in _SIZES]


class WeightOnlyCall(ctypes.Structure):
    #: whether it was launched before
    launched = False

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
