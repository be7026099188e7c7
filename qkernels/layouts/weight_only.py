"""WEIGHT_ONLY, the kernel layout of all weight-only formats: codes of 2 to 8 bits that kernels
decode, scale and multiply.

The input features are stored in *kernel order* kk = 0..KP-1. Kernel order is k itself, unless the
groups need another one (see "Groups" below). A *tile* is 16 words of 32 bits in each output row,
which hold 16*32/bits features. The rows of a tile are contiguous, so a kernel reads a block of rows
as contiguous bytes, 16 at a time:

    qdata[tile, n, word]                                  int32 (T, N, 16)

A word holds the codes of pairs of features in its two halves. One shift and one mask then give two
codes that are neighbours along K, each in 16 bits. The word and the shift of each code follow from
the fragments of the tensor cores, whose 16-wide operand gives thread j of four the columns 2j,
2j+1, 2j+8 and 2j+9 of a row. A thread loads four words (16 bytes), and after decoding they
are exactly its registers of that operand:

    feature within the tile = s*32 + p*16 + h*8 + j*2 + b         word = j*4 + p*2 + h
                                                                  bits [b*16 + s*width, +width)
    word (4 bits):    31..28 27..24 23..20 19..16 | 15..12 11..8  7..4   3..0
                       s=3    s=2    s=1    s=0      s=3    s=2    s=1    s=0
                      '------- b = 1: k odd ----'   '------- b = 0: k even ---'

Codes that index a table of 16 values are looked up four at a time. The two codes of a pair are
therefore adjacent: the code of (s, b) is at bits (s//2)*16 + (s%2)*8 + b*4.

Codes of 3, 5 and 6 bits are split into two planes. `qdata` holds the low 2 or 4 bits as above.
qhigh[tile, n, word] holds the high bits; one word of it serves several words of `qdata`. `u`
numbers those words, and the high bits of (s, b) are at bit b*16 + s*width + u*(number of high
bits):

    3 = 2 + 1   word j*2 + h   u = p        5 = 4 + 1   word j   u = p*2 + h
    6 = 4 + 2   word j*2 + h   u = p

Codebook codes (QuIP#) stand for eight weights each. They are 16 bits wide, two in a word, and a
tile has 256 features. Word w holds the codes of features w*16 .. w*16 + 15 of the tile, in the
checkpoint's order. It decodes to the values of (s, b), as a word of 2-bit codes does: code s//4,
weights 2*(s%4) + b. Kernel order is therefore not the checkpoint's order here (`codebook_order`).
That costs nothing, because x goes through a transform anyway, which writes x in kernel order. The
second code of the same eight weights (3 and 4 bits a weight) is in `qhigh`: with 16 bits in word w,
with 8 bits in word j*2 + h, as for 3 bits above, at bits u*16 + 8*(number of the code in its word).

Groups: features are sorted by group if the checkpoint has `g_idx` (act-order) or if group_size is
no multiple of 16. Each group is padded to whole slices of 16 features. `perm[kk]` is the input
feature at kk, -1 for padding. `slice_group[kk // 16]` is the group of a slice; it is stored only if
the group is not simply kk // group_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codecs import CODES, SCALES, SLICE, WORDS, CodeKind, ScaleKind

WEIGHT_ONLY = "weight_only"

#: codebook codes, of eight weights each, in one tile of one row
CODEBOOK_CODES = 32


class WeightOnlyTraits(NamedTuple):
    """How the weight-only kernels treat a format with given parameters.

    decoder, bits: the kind of codes, a row of codecs.CODES.
        "linear"        code - zero point, or the code itself
        "signed"        code - 2^(bits-1)
        "unsigned"      the code itself
        "half_integer"  code - (2^bits - 1) / 2
        "lut16"         the code indexes `table`
        "e4m3", "e5m2"  the code is a float of 8 bits
        "e8p"           the code indexes the E8P codebook and stands for eight weights
    scaler: the kind of scales, a row of codecs.SCALES.
    group_size: features along K that share a scale; for the flat scalers, weights of the flattened
        matrix.
    row_group: neighbouring output rows that share a scale.
    outliers: whether sparse weights are added to the decoded ones.
    transform_scales: the divisors of the transforms of input and output (`input.*`, `output.*`);
        None without transforms.
    """

    bits: int
    decoder: str
    scaler: str
    group_size: int
    row_group: int = 1
    outliers: bool = False
    transform_scales: tuple[float, float] | None = None

    @property
    def codes(self) -> CodeKind:
        """The kind of codes. Raises ValueError if there is no such kind."""
        try:
            return CODES[self.decoder, self.bits]
        except KeyError:
            names = ", ".join(kind.name for kind in CODES.values())
            raise ValueError(
                f"decoder, bits: expected those of one of {names}; got {self.decoder!r}, "
                f"{self.bits!r}"
            ) from None

    @property
    def scales(self) -> ScaleKind:
        """The kind of scales. Raises ValueError if there is no such kind."""
        try:
            return SCALES[self.scaler]
        except KeyError:
            raise ValueError(
                f"scaler: expected one of {', '.join(SCALES)}; got {self.scaler!r}"
            ) from None


@dataclass
class WeightOnlyParts:
    """A weight's tensors, as a format hands them over before `pack` puts the codes in kernel order.

    codes: uint8 (N, K), in the checkpoint's feature order. Codebook codes are int32 (N, K / 8):
        the code in the low 16 bits, the code of its residual in the high 16 bits.
    scaler_tensors: the tensors that the scaler reads, by name.
    group_index: int32 (K), the group of each feature, if the checkpoint stores it (`g_idx`).
    table: float32 (16), the value of each code, for the decoder "lut16".
    codebook: int32, the codebook of the decoder "e8p".
    outliers: `row_offsets` int32 (N + 1), and `col_vals` int32, float16 value << 16 | input
        feature.
    sides: the transforms of both sides of the weight, with the prefix "input." or "output.":
        diagonal           float16, the factor of each outer feature
        perm               int32, the outer feature of each inner feature
        factor0 .. factor2 float16 square matrices. Their Kronecker product is the transform. If it
                           has fewer rows than there are features, its last factor is a Hadamard
                           matrix whose order is the missing power of two (transforms.py).
    extra: tensors that no kernel reads, kept so that the checkpoint can be restored.
    """

    codes: Tensor
    scaler_tensors: dict[str, Tensor]
    group_index: Tensor | None = None
    table: Tensor | None = None
    codebook: Tensor | None = None
    outliers: dict[str, Tensor] = field(default_factory=dict)
    sides: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)


def lut(table: Tensor) -> Tensor:
    """float32 (16) -> int32 (16): the table in float16, then in bfloat16, cut into bytes.

    Each of the two takes eight words: four with the low bytes of entries 0-3, 4-7, 8-11 and 12-15,
    then four with their high bytes.
    """
    words = []
    for dtype in (torch.float16, torch.bfloat16):
        entries = table.to(dtype).view(torch.int16).to(torch.int32).view(4, 4)
        for shift in (0, 8):
            part = (entries >> shift) & 0xFF
            words.append(part[:, 0] | part[:, 1] << 8 | part[:, 2] << 16 | part[:, 3] << 24)
    return torch.cat(words)


def whole_tiles(features: int) -> int:
    """`features`, rounded up to whole tiles of a codebook weight."""
    tile = CODES["e8p", 2].tile
    return -(-features // tile) * tile


def scale_group(traits: WeightOnlyTraits, k: int, *, group_lookup: bool) -> int:
    """Features of a tile, a power of two, that are sure to share a scale: the scale group.

    group_lookup: whether kernels look the groups up in `slice_group`.
    """
    tile = traits.codes.tile
    if group_lookup:
        return SLICE
    if traits.scales.flat:
        return math.gcd(tile, math.gcd(traits.group_size, k))
    return tile if traits.group_size >= k else math.gcd(tile, traits.group_size)


# ---------------------------------------------------------------------- whole weights
def pack(
    fmt: Any, shape: tuple[int, int], params: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Checkpoint tensors of format `fmt` -> tensors of this layout."""
    parts = fmt.weight_only(tensors, shape, params)
    traits = fmt.weight_only_traits(shape, params)
    kind = traits.codes
    _check_parts(parts, traits)
    storage = {f"scaler.{k}": v for k, v in parts.scaler_tensors.items()}
    storage |= {f"outlier.{k}": v for k, v in parts.outliers.items()}
    storage |= {f"extra.{k}": v for k, v in parts.extra.items()} | parts.sides
    if parts.table is not None:
        storage["table"] = parts.table
        storage["lut"] = lut(parts.table)
    codes = parts.codes
    if parts.group_index is not None:
        storage["g_idx"] = parts.group_index
    if kind.codebook:
        assert parts.codebook is not None
        return storage | {"lut": parts.codebook} | pack_codebook(codes, kind)
    order = _kernel_order(parts, traits, shape[1])
    if order is not None:
        perm, slice_group = order
        storage["perm"] = perm
        if slice_group is not None:
            storage["slice_group"] = slice_group
        # Index -1 takes the column of zeros that `pad` appends.
        codes = torch.nn.functional.pad(codes, (0, 1))[:, perm.long()]
    return storage | pack_codes(codes, kind)


def _check_parts(parts: WeightOnlyParts, traits: WeightOnlyTraits) -> None:
    """Raise ValueError unless a format hands over the tensors that its kinds have."""
    names, expected = sorted(parts.scaler_tensors), sorted(traits.scales.tensors)
    if names != expected:
        raise ValueError(f"scaler_tensors: expected {expected} of {traits.scaler!r}, got {names}")
    for name, tensor, needed in (
        ("table", parts.table, traits.codes.table),
        ("codebook", parts.codebook, traits.codes.codebook),
    ):
        if (tensor is not None) != needed:
            expects = "a tensor" if needed else "None"
            got = "None" if tensor is None else "a tensor"
            raise ValueError(f"{name}: expected {expects} of {traits.decoder!r} codes, got {got}")


def unpack(
    fmt: Any, shape: tuple[int, int], params: dict[str, Any], storage: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    n, k = shape
    kind = fmt.weight_only_traits(shape, params).codes
    perm = storage.get("perm")
    if kind.codebook:
        codes = unpack_codebook(storage, kind, n, k)
    else:
        count = k if perm is None else perm.numel()
        codes = unpack_codes(storage, kind, n, count)
    if perm is not None:
        ordered = torch.empty(n, k, dtype=torch.uint8, device=codes.device)
        is_feature = perm >= 0
        ordered[:, perm[is_feature].long()] = codes[:, is_feature]
        codes = ordered
    parts = WeightOnlyParts(
        codes=codes,
        scaler_tensors=section(storage, "scaler."),
        group_index=storage.get("g_idx"),
        table=storage.get("table"),
        outliers=section(storage, "outlier."),
        sides={k: v for k, v in storage.items() if k.startswith(("input.", "output."))},
        extra=section(storage, "extra."),
    )
    return fmt.from_weight_only(parts, shape, params)


# ---------------------------------------------------------------------- codes
def pack_codes(codes: Tensor, kind: CodeKind) -> dict[str, Tensor]:
    """Codes uint8 (N, KP) in kernel order -> `qdata` int32 (T, N, 16), and `qhigh` for two planes.

    `qhigh` is int32 (T, N, `high_words`).
    """
    n, k = codes.shape
    width = kind.width
    tiles = -(-k // kind.tile)
    codes = torch.nn.functional.pad(codes, (0, tiles * kind.tile - k))
    # (T, N, j, p, h, s, b)
    parts = codes.view(n, tiles, -1, 2, 2, 4, 2).permute(1, 0, 5, 3, 4, 2, 6)
    qdata = torch.zeros(tiles, n, 4, 2, 2, dtype=torch.int32, device=codes.device)
    for s in range(16 // width):
        for b in range(2):
            code = (parts[..., s, b] & ((1 << width) - 1)).to(torch.int32)
            qdata |= code << kind.bit_of(s, b)
    packed = {"qdata": qdata.view(tiles, n, WORDS)}
    if count := kind.high_words:
        qhigh = torch.zeros(tiles, n, 4, count // 4, dtype=torch.int32, device=codes.device)
        for (p, h), word, bit in _high_places(kind):
            for s in range(16 // width):
                for b in range(2):
                    high = (parts[:, :, :, p, h, s, b] >> width).to(torch.int32)
                    qhigh[..., word] |= high << (b * 16 + s * width + bit)
        packed["qhigh"] = qhigh.view(tiles, n, count)
    return packed


def _high_places(kind: CodeKind) -> list[tuple[tuple[int, int], int, int]]:
    """The high bits of each (p, h) in `qhigh`: (p, h), the word of thread j, and the lowest bit."""
    high_bits = kind.bits - kind.width
    two_words = kind.high_words == 8  # words of `qhigh` for each thread; otherwise one
    places = [(p, h) for p in range(2) for h in range(2)]
    return [
        ((p, h), h if two_words else 0, high_bits * (p if two_words else p * 2 + h))
        for p, h in places
    ]


def unpack_codes(storage: Mapping[str, Tensor], kind: CodeKind, n: int, k: int) -> Tensor:
    """The inverse of `pack_codes`: codes uint8 (N, k)."""
    width = kind.width
    qdata = storage["qdata"]
    tiles = qdata.shape[0]
    words = qdata.view(tiles, n, 4, 2, 2)
    parts = torch.empty(tiles, n, 4, 2, 2, 16 // width, 2, dtype=torch.uint8, device=qdata.device)
    for s in range(16 // width):
        for b in range(2):
            code = words >> kind.bit_of(s, b)
            parts[..., s, b] = (code & ((1 << width) - 1)).to(torch.uint8)
    if count := kind.high_words:
        qhigh = storage["qhigh"].view(tiles, n, 4, count // 4)
        mask = (1 << (kind.bits - width)) - 1
        for (p, h), word, bit in _high_places(kind):
            for s in range(16 // width):
                for b in range(2):
                    high = (qhigh[..., word] >> (b * 16 + s * width + bit)) & mask
                    parts[:, :, :, p, h, s, b] |= (high << width).to(torch.uint8)
    return parts.permute(1, 0, 5, 3, 4, 2, 6).reshape(n, -1)[:, :k]


# ---------------------------------------------------------------------- codebook codes
def pack_codebook(codes: Tensor, kind: CodeKind) -> dict[str, Tensor]:
    """Codebook codes int32 (N, K / 8) -> `qdata` and, for 3 and 4 bits, `qhigh`."""
    n, count = codes.shape
    tiles = -(-count // CODEBOOK_CODES)
    codes = torch.nn.functional.pad(codes, (0, tiles * CODEBOOK_CODES - count))
    parts = codes.view(n, tiles, WORDS, 2).transpose(0, 1).contiguous()  # (T, N, word, c)
    first, second = parts & 0xFFFF, (parts >> 16) & 0xFFFF
    packed = {"qdata": first[..., 0] | (first[..., 1] << 16)}
    if kind.bits == 4:
        packed["qhigh"] = second[..., 0] | (second[..., 1] << 16)
    elif kind.bits == 3:
        halves = (second[..., 0] | (second[..., 1] << 8)).view(tiles, n, 4, 2, 2)  # j, p, h
        packed["qhigh"] = (halves[:, :, :, 0] | (halves[:, :, :, 1] << 16)).reshape(tiles, n, 8)
    return packed


def unpack_codebook(storage: Mapping[str, Tensor], kind: CodeKind, n: int, k: int) -> Tensor:
    """The inverse of `pack_codebook`: codes int32 (N, K / 8)."""
    qdata = storage["qdata"]
    tiles = qdata.shape[0]
    codes = torch.stack([qdata & 0xFFFF, (qdata >> 16) & 0xFFFF], -1)
    if kind.bits > 2:
        qhigh = storage["qhigh"]
        if kind.bits == 3:
            qhigh = qhigh.view(tiles, n, 4, 1, 2)
            qhigh = torch.cat([qhigh, qhigh >> 16], 3).view(tiles, n, WORDS) & 0xFFFF
            second = torch.stack([qhigh & 0xFF, qhigh >> 8], -1)
        else:
            second = torch.stack([qhigh & 0xFFFF, (qhigh >> 16) & 0xFFFF], -1)
        codes = codes | (second << 16)
    return codes.transpose(0, 1).reshape(n, -1)[:, : k // 8].contiguous()


def codebook_order(count: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 (count): the place of feature k in the kernel order of a codebook weight."""
    k = torch.arange(count, device=device)
    word, c, half, b = k % 256 // 16, k % 16 // 8, k % 8 // 2, k % 2
    j, p, h = word // 4, word // 2 % 2, word % 2
    return k // 256 * 256 + (c * 4 + half) * 32 + p * 16 + h * 8 + j * 2 + b


def section(storage: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in storage.items() if k.startswith(prefix)}


def _kernel_order(
    parts: WeightOnlyParts, traits: WeightOnlyTraits, k: int
) -> tuple[Tensor, Tensor | None] | None:
    """(perm, slice_group or None) if features must be sorted by group, None otherwise."""
    if traits.scales.flat:
        return None
    device = parts.codes.device
    in_order = torch.arange(k, device=device) // traits.group_size
    group_of = in_order if parts.group_index is None else parts.group_index.long()
    aligned = traits.group_size % SLICE == 0 or traits.group_size >= k
    if aligned and torch.equal(group_of, in_order):
        return None
    count = torch.bincount(group_of, minlength=-(-k // traits.group_size))
    padded = -(-count // SLICE) * SLICE
    first = padded.cumsum(0) - padded
    order = group_of.argsort(stable=True)
    rank = torch.arange(k, device=device) - (count.cumsum(0) - count)[group_of[order]]
    perm = torch.full((int(padded.sum()),), -1, dtype=torch.int32, device=device)
    perm[first[group_of[order]] + rank] = order.to(torch.int32)
    slice_group = torch.arange(count.numel(), device=device).repeat_interleave(padded // SLICE)
    regular = aligned and torch.equal(
        slice_group, torch.arange(slice_group.numel(), device=device) * SLICE // traits.group_size
    )
    return perm, None if regular else slice_group.to(torch.int32)
