"""The kinds of codes and of scales of weight-only formats: one row for each.

A format names one of each (`WeightOnlyTraits`). A row says how the bits lie, and which Triton
function and which C++ class read them. Both backends, the build of the extension, the
ahead-of-time checks and the tests take these facts from here.

    a weight = scale * (value of its code - zero point)      `zero` of its kind of scales:
             = scale * value of its code - min                   "point", "min" or "none"

This file imports only the standard library, because setup.py loads it without torch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

#: 32-bit words of a tile in one row (qkernels/layouts/weight_only.py)
WORDS = 16
#: features of a slice, the smallest unit of groups
SLICE = 16


class CodeKind(NamedTuple):
    """A kind of code.

    Attributes:
        decoder: its name in `WeightOnlyTraits`, together with `bits`.
        bits: width of a code; of a codebook, bits for one weight.
        split, finish: the decoder in triton_kernels/decoders.py: the ends of the names of its two
            functions, `split_...` and `finish_...`.
        cuda: the decoder's class in csrc/decoders, for the 16-bit type T.
        offset: value = code - offset - zero point. None if the value is no such difference.
        table: whether a code indexes the weight's table of 16 values. The two codes of a pair are
            then neighbours in their word (`bit_of`).
        weights: weights that a code stands for; more than one for a codebook.
        book_words: 32-bit words of the codebook, which CUDA kernels hold in shared memory.
    """

    decoder: str
    bits: int
    split: str
    finish: str
    cuda: str
    offset: float | None = None
    table: bool = False
    weights: int = 1
    book_words: int = 0

    @property
    def name(self) -> str:
        """The kind's name in the names of CUDA kernels, such as "linear4" or "lut16"."""
        return self.decoder if self.decoder[-1].isdigit() else f"{self.decoder}{self.bits}"

    @property
    def codebook(self) -> bool:
        """Whether a code stands for several weights."""
        return self.weights > 1

    @property
    def width(self) -> int:
        """Bits of a code in a word of `qdata`. Codes of 3, 5 and 6 bits have their low bits there.

        A word of codebook codes decodes to as many weights as a word of 2-bit codes.
        """
        return 2 if self.codebook else {3: 2, 5: 4, 6: 4}.get(self.bits, self.bits)

    @property
    def tile(self) -> int:
        """Input features in one tile."""
        return WORDS * (32 // self.width)

    @property
    def high_words(self) -> int:
        """Words of `qhigh` in one tile of one row."""
        return (self.bits - self.width) * self.tile // 32

    @property
    def high_step(self) -> int:
        """Distance in bits, inside a word of `qhigh`, of the high bits of two words it serves."""
        return 16 if self.codebook else self.bits - self.width

    def bit_of(self, s: int, b: int) -> int:
        """Lowest bit of the code of (s, b) in its word: see qkernels/layouts/weight_only.py."""
        return (s // 2) * 16 + (s % 2) * 8 + b * 4 if self.table else b * 16 + s * self.width


class ScaleKind(NamedTuple):
    """A kind of scales.

    Attributes:
        tensors: names of its tensors (`WeightOnlyParts.scaler_tensors`), in the order in which the
            kernels of both languages take them.
        zero: what the scales come with: "point" (a zero point), "min" or "none".
        triton: its function in triton_kernels/scalers.py.
        cuda: the scalers that a CUDA kernel of these scales is compiled for
            (csrc/weight_only/launch.h). {groups} stands for the scale groups of a tile. A name that
            begins with "k" is a `Scaling` of csrc/weight_only/arguments.h: codes have one kernel
            for all of them.
        codes: names of the codes that have such a CUDA kernel.
        group: features that share a scale, if the kind fixes the number. None: any.
        flat: whether groups run over the flattened (N, K) matrix instead of along K.
        nested: whether the scales are codes of 8 bits of scales.
        lookup: whether the Triton function finds the group of a slice in `slice_group`.
    """

    tensors: tuple[str, ...]
    zero: Literal["point", "min", "none"]
    triton: str
    cuda: str
    codes: tuple[str, ...]
    group: int | None = None
    flat: bool = False
    nested: bool = False
    lookup: bool = False


# fmt: off
_CODES = (
    CodeKind("linear", 2, "linear", "linear", "Linear<T, 2>", 0),
    CodeKind("linear", 3, "linear", "linear", "Linear<T, 3>", 0),
    CodeKind("linear", 4, "linear", "linear", "Linear<T, 4>", 0),
    CodeKind("linear", 8, "byte", "byte", "Linear<T, 8>", 0),
    CodeKind("signed", 3, "linear", "signed", "Signed<T, 3>", 4),
    CodeKind("signed", 4, "linear", "signed", "Signed<T, 4>", 8),
    CodeKind("signed", 5, "linear", "signed", "Signed<T, 5>", 16),
    CodeKind("signed", 6, "linear", "signed", "Signed<T, 6>", 32),
    CodeKind("signed", 8, "byte", "signed", "Signed<T, 8>", 128),
    CodeKind("unsigned", 2, "linear", "unsigned", "Unsigned<T, 2>", 0),
    CodeKind("unsigned", 3, "linear", "unsigned", "Unsigned<T, 3>", 0),
    CodeKind("unsigned", 4, "linear", "unsigned", "Unsigned<T, 4>", 0),
    CodeKind("unsigned", 5, "linear", "unsigned", "Unsigned<T, 5>", 0),
    CodeKind("half_integer", 2, "linear", "half_integer", "HalfInteger<T, 2>", 1.5),
    CodeKind("half_integer", 3, "linear", "half_integer", "HalfInteger<T, 3>", 3.5),
    CodeKind("half_integer", 4, "linear", "half_integer", "HalfInteger<T, 4>", 7.5),
    CodeKind("lut16", 4, "lut16", "nothing", "Lut16<T>", table=True),
    CodeKind("e4m3", 8, "e4m3", "e4m3", "Float8<T, 4>"),
    CodeKind("e5m2", 8, "e5m2", "e5m2", "Float8<T, 5>"),
    CodeKind("e8p", 2, "e8p", "e8p", "E8p<T>", weights=8, book_words=256),
    CodeKind("e8p", 3, "e8p", "nothing", "E8pResidual<T, 3>", weights=8, book_words=512),
    CodeKind("e8p", 4, "e8p", "nothing", "E8pResidual<T, 4>", weights=8, book_words=256),
)
#: (decoder, bits) -> its row
CODES = {(kind.decoder, kind.bits): kind for kind in _CODES}

_LINEAR = ("linear2", "linear3", "linear4", "linear8")
_FLOATS = ("lut16", "e4m3", "e5m2")
_NESTED = ("absmax", "nested_map", "nested_absmax", "offset")
_TRANSFORMED = (*(f"half_integer{bits}" for bits in (2, 3, 4)), "e8p2", "e8p3", "e8p4")
#: scaler -> its row
SCALES = {
    "group": ScaleKind(("scales", "zeros"), "point", "group", "kGroup", _LINEAR, lookup=True),
    "scale": ScaleKind(("absmax",), "none", "scale", "kScale", _FLOATS),
    "scale_flat": ScaleKind(("absmax",), "none", "scale_flat", "kScaleFlat", ("lut16",), flat=True),
    "nested": ScaleKind(_NESTED, "none", "nested", "kNested", ("lut16",), nested=True),
    "nested_flat": ScaleKind(
        _NESTED, "none", "nested_flat", "kNestedFlat", ("lut16",), flat=True, nested=True
    ),
    "row_scale": ScaleKind(("absmax",), "none", "scale", "Only<Plain<1>, true>", _TRANSFORMED),
    "block_scale": ScaleKind(
        ("absmax",), "none", "scale", "Only<Blocks<{groups}, false>>",
        ("signed4", "signed5", "signed8"), 32,
    ),
    "scale_min": ScaleKind(
        ("d", "m"), "min", "scale_min", "Only<Blocks<{groups}, true>>",
        ("unsigned4", "unsigned5"), 32,
    ),
    "e8m0": ScaleKind(("scales",), "none", "e8m0", "Only<E8M0<{groups}>>", ("lut16",), 32),
    "q2_k": ScaleKind(("scales", "d", "dmin"), "min", "q2_k", "Only<Q2K>", ("unsigned2",), 16),
    "q3_k": ScaleKind(("scales", "d"), "none", "q3_k", "Only<Q3K>", ("signed3",), 16),
    "q4_k": ScaleKind(
        ("scales", "d", "dmin"), "min", "q4_k", "Only<Q4K>", ("unsigned4", "unsigned5"), 32
    ),
    "q6_k": ScaleKind(("scales", "d"), "none", "q6_k", "Only<Q6K>", ("signed6",), 16),
    "iq4_xs": ScaleKind(
        ("scales_l", "d", "scales_h"), "none", "iq4_xs", "Only<Iq4Xs>", ("lut16",), 32
    ),
    "two_level": ScaleKind(
        ("stats", "second_level"), "min", "two_level", "Only<TwoLevel<{groups}>>",
        ("unsigned2", "unsigned3", "unsigned4"), lookup=True,
    ),
}
# fmt: on


def cuda_kernel(codes: CodeKind, scaler: str) -> str | None:
    """Name of the CUDA kernels for these codes and scales, or None if there are none."""
    scales = SCALES[scaler]
    if codes.name not in scales.codes:
        return None
    return f"weight_only_{codes.name}" + ("" if scales.cuda.startswith("k") else f"_{scaler}")


def cuda_kernels() -> dict[str, tuple[CodeKind, str]]:
    """Name -> (codes, C++ scalers) of every weight-only CUDA kernel, in the order of tables."""
    kernels: dict[str, tuple[CodeKind, list[str]]] = {}
    for scaler, scales in SCALES.items():
        for codes in CODES.values():
            if name := cuda_kernel(codes, scaler):
                groups = codes.tile // (scales.group or SLICE)
                kernels.setdefault(name, (codes, []))[1].append(scales.cuda.format(groups=groups))
    return {
        name: (codes, f"AnyPlain<{', '.join(kinds)}>" if kinds[0].startswith("k") else kinds[0])
        for name, (codes, kinds) in kernels.items()
    }
