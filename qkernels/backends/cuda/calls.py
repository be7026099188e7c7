"""The structs of csrc/weight_only/arguments.h, field for field, and the numbers of its enums."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

#: (decoder, bits) -> NAME of csrc/weight_only/NAME.cu, whose kernels take every scaler of SCALINGS
ALL_SCALINGS_KERNELS = {
    ("linear", 2): "linear2",
    ("linear", 3): "linear3",
    ("linear", 4): "linear4",
    ("linear", 8): "linear8",
    ("lut16", 4): "lut16",
    ("e4m3", 8): "e4m3",
    ("e5m2", 8): "e5m2",
}
#: scalers that one kernel distinguishes at run time, with their numbers in arguments.h
SCALINGS = {"group": 0, "scale": 1, "scale_flat": 2, "nested": 3, "nested_flat": 4}
#: (decoder, bits, scaler) -> NAME of csrc/weight_only/NAME.cu, compiled for this scaler only
ONE_SCALER_KERNELS = {
    **{("signed", bits, "scale"): f"signed{bits}" for bits in (4, 5, 8)},
    **{("half_integer", bits, "scale"): f"half_integer{bits}" for bits in (2, 3, 4)},
    **{("e8p", bits, "scale"): f"e8p{bits}" for bits in (2, 3, 4)},
    **{("unsigned", bits, "scale_min"): f"unsigned{bits}_scale_min" for bits in (4, 5)},
    ("unsigned", 2, "q2_k"): "unsigned2_q2_k",
    ("signed", 3, "q3_k"): "signed3_q3_k",
    ("unsigned", 4, "q4_k"): "unsigned4_q4_k",
    ("unsigned", 5, "q4_k"): "unsigned5_q4_k",
    ("signed", 6, "q6_k"): "signed6_q6_k",
    ("lut16", 4, "iq4_xs"): "lut16_iq4_xs",
    # A real zero point is a minimum, scale * zero, which is subtracted after scaling.
    **{("linear_real", bits, "two_level"): f"unsigned{bits}_two_level" for bits in (2, 3, 4)},
}
#: the tensors of a scaler for the fields `scale`, `second` and `third`; other scalers have only
#: `scale`: the tensor "scales" or "absmax"
SCALER_TENSORS = {
    "scale_min": ("d", "m"),
    "q2_k": ("scales", "d", "dmin"),
    "q3_k": ("scales", "d"),
    "q4_k": ("scales", "d", "dmin"),
    "q6_k": ("scales", "d"),
    "iq4_xs": ("scales_l", "d", "scales_h"),
    "two_level": ("stats", "second_level"),
}
#: (decoder, bits) -> 32-bit words of the codebook, which is at the start of shared memory
BOOK_WORDS = {
    ("e8p", 2): 256,
    ("e8p", 3): 512,
    ("e8p", 4): 256,
}
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTERS = [
    "x", "qdata", "qhigh", "perm", "slice_group", "table", "scale", "zero", "second", "third",
    "nested_map", "nested_outer", "nested_offset", "row_offsets", "col_vals", "x_columns",
    "bias", "y", "partial", "counter",
]  # fmt: skip
_SIZES = [
    "m", "n", "k", "kp", "tiles", "k_slice", "group", "shift",
    "row_group", "scale_group", "scaling", "scale_type", "x_stride", "chunk", "x_rows", "is_float",
]  # fmt: skip


def kernel_name(decoder: str, bits: int, scaler: str) -> str | None:
    """Name in csrc/bindings of the weight-only kernel for these codes and scales, or None."""
    name = ONE_SCALER_KERNELS.get((decoder, bits, scaler))
    if name is None and scaler in SCALINGS:
        name = ALL_SCALINGS_KERNELS.get((decoder, bits))
    return None if name is None else f"weight_only_{name}"


class WeightOnlyArgs(ctypes.Structure):
    __slots__ = ()  # a name that is no field is an AttributeError, not an attribute
    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [
        (name, ctypes.c_int) for name in _SIZES
    ]


class Call(ctypes.Structure):
    """The argument of the extension. A weight keeps one template per kernel.

    Calls fill in and launch copies of the template, because several threads may use one weight.
    """

    #: whether it, or a copy of it, has been launched
    launched = False
    #: the call that this one is a copy of
    template: Call | None = None

    def copy(self) -> Self:
        copied = type(self).from_buffer_copy(self)
        copied.template = self
        return copied


class WeightOnlyCall(Call):
    _fields_ = [
        ("args", WeightOnlyArgs),
        ("stream", ctypes.c_uint64),
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("kernel", ctypes.c_int),
        ("is_bfloat", ctypes.c_int),
        ("scale_groups", ctypes.c_int),
        ("pdl", ctypes.c_int),
        ("size", ctypes.c_int),
    ]
