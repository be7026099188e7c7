"""WEIGHT_ONLY, the layout of the family "decode 2..8-bit codes, scale, multiply".

Input features run in *kernel order* kk = 0..KP-1, which is k itself unless groups need it otherwise
(below). A *tile* is 16 words of 32 bits per output row, 16*32/bits features; the rows of a tile lie
one after another, so a block of rows is one run of bytes, read 16 at a time:

    qdata[tile, n, word]                                  int32 (T, N, 16)

A word holds the codes of feature pairs in its two halves, so that one shift and one mask yield two
codes that are neighbours along K, each in its own 16 bits. Which word and which shift is chosen so
that the four words (16 bytes) a thread loads are, after decoding, its own registers of the tensor
cores' 16-wide operand (thread j of four holds columns 2j, 2j+1, 2j+8, 2j+9 of a row):

    feature within the tile = s*32 + p*16 + h*8 + j*2 + b         word = j*4 + p*2 + h
                                                                  bits [b*16 + s*width, +width)
    word (4 bits):    31..28 27..24 23..20 19..16 | 15..12 11..8  7..4   3..0
                       s=3    s=2    s=1    s=0      s=3    s=2    s=1    s=0
                      '------- b = 1: k odd ----'   '------- b = 0: k even ---'

Codes that index a table are looked up four at a time, so the codes of a pair lie next to each other
instead, the code of (s, b) at bits (s//2)*16 + (s%2)*8 + b*4.

3, 5 and 6 bits are a plane of the low 2 or 4 bits as above and a plane of the high bits,
qhigh[tile, n, word], whose words serve several words of the low plane: `u` says which one, and the
high bits of (s, b) for it are at b*16 + s*width + u*(their number):

    3 = 2 + 1   word j*2 + h   u = p        5 = 4 + 1   word j   u = p*2 + h
    6 = 4 + 2   word j*2 + h   u = p

Codes of eight weights (QuIP#) are 16 bits wide, two in a word of a tile of 256 features; word w
holds those of features w*16 .. w*16 + 15 of the tile in their plain order, and decodes, as words of
2-bit codes do, to the values of (s, b): code s//4, weights 2*(s%4) + b. So kernel order is not
plain order there (`codebook_order`); the transform of x, which such weights have anyway, writes it
so. A second code for each, of 16 bits or 8, lies in `qhigh`: word w, or as above for 3 bits at bits
u*16 + 8*(which code).

Groups: if the checkpoint has `g_idx` (act-order), or groups that are no multiple of 16, features
are sorted by group and each group is padded to whole slices of 16: `perm[kk]` is the input feature
(-1 for padding). If the padded groups are not simply kk // group_size, `slice_group[kk // 16]` says
which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHT_ONLY = "weight_only"

SLICE = 16
WORDS = 16
#: codes of eight weights in a tile of one row
CODEBOOK_CODES = 32


class WeightOnlyTraits(NamedTuple):
    """How the weight-only kernel family treats a format with given parameters.

    bits: width of a code; 3, 5 and 6 are split into planes. decoder: "linear" (the code less a zero
    point is the value), "signed" (less 2^(bits-1)), "half_integer" (less
        half of 2^bits - 1), "unsigned" (the code itself), "lut16" (it indexes `table`), "e4m3",
        "e5m2", or "e8p" (codes of eight weights each).
    scaler: what the scales are and how they lie; triton_kernels/scalers.py lists them. group_size:
    features along K, or for the flat scalers flattened weights, that share a scale. row_group:
    neighbouring output rows that share a scale. outliers: whether sparse weights are added to the
    decoded ones. norms: if input and output go through transforms (`input.*`, `output.*`), what
    those are divided by.
    """

    bits: int
    decoder: str
    scaler: str
    group_size: int
    row_group: int = 1
    outliers: bool = False
    transform_scales: tuple[float, float] | None = None

    @property
    def codebook(self) -> bool:
        """Whether a code stands for eight weights."""
        return self.decoder == "e8p"

    @property
    def flat(self) -> bool:
        """Whether groups run over the flattened (N, K) matrix instead of along K."""
        return self.scaler.endswith("flat")


@dataclass
class WeightOnlyParts:
    """A weight's tensors as the weight-only kernel family wants them, before the codes are laid
    out.

    codes: uint8 (N, K), in the checkpoint's feature order.
    scaler_tensors: what the scaler reads.
        Of vectors int32 (N, K / 8): the code in the low 16 bits, its residual's in the high ones.
    table: float32 (16), the values of the codes for the decoder "lut16". codebook: int32, what the
    decoder "e8p" looks up. group_index: int32 (K), the group of each feature, if the checkpoint has
    it. outliers: `row_offsets` int32 (N + 1) and `col_vals` int32, float16 value << 16 | input
    feature. sides: of the transforms, "input." and "output." with each of: `diagonal`, what outer
    features are
        multiplied by, float16; `perm`, int32, which of the outer features each inner one is;
        `factor0` .. `factor2`, float16 square matrices whose Kronecker product it is
        (transforms.py); what they leave of the features is a Hadamard matrix of a power of two
        behind them.
    extra: tensors no kernel reads, kept so that the checkpoint can be restored.
    """

    codes: Tensor
    scaler_tensors: dict[str, Tensor]
    group_index: Tensor | None = None
    table: Tensor | None = None
    codebook: Tensor | None = None
    outliers: dict[str, Tensor] = field(default_factory=dict)
    sides: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)


def plane_bits(bits: int, codebook: bool = False) -> int:
    """Width of the codes in `qdata`: wider ones keep their low bits there. `vectors`: bits a
    weight.
    """
    return 2 if codebook else {3: 2, 5: 4, 6: 4}.get(bits, bits)


def high_words(bits: int, codebook: bool = False) -> int:
    """Words of `qhigh` in one tile of one row."""
    return (bits - plane_bits(bits, codebook)) * tile_features(bits, codebook) // 32


def high_step(bits: int, codebook: bool = False) -> int:
    """How far apart the high bits of words that share a word of `qhigh` lie."""
    return 16 if codebook else bits - plane_bits(bits)


def code_bit(s: int, b: int, width: int, *, table: bool) -> int:
    """Lowest bit of the code of (s, b) in its word; `table`: whether codes index a table."""
    return (s // 2) * 16 + (s % 2) * 8 + b * 4 if table else b * 16 + s * width


def lut(table: Tensor) -> Tensor:
    """float32 (16) -> int32 (16): the table in float16, then in bfloat16, cut into bytes.

    Of each: four words with the low bytes of entries 0-3, 4-7, 8-11, 12-15, four with the high
    bytes.
    """
    words = []
    for dtype in (torch.float16, torch.bfloat16):
        entries = table.to(dtype).view(torch.int16).to(torch.int32).view(4, 4)
        for shift in (0, 8):
            part = (entries >> shift) & 0xFF
            words.append(part[:, 0] | part[:, 1] << 8 | part[:, 2] << 16 | part[:, 3] << 24)
    return torch.cat(words)


def tile_features(bits: int, codebook: bool = False) -> int:
    """Input features in one tile."""
    return WORDS * (32 // plane_bits(bits, codebook))


def scale_group(traits: WeightOnlyTraits, k: int, *, group_lookup: bool) -> int:
    """Features of a tile, a power of two, that surely share a scale. `lookup`: by `slice_group`."""
    tile = tile_features(traits.bits, traits.codebook)
    if group_lookup:
        return SLICE
    if traits.flat:
        return math.gcd(tile, math.gcd(traits.group_size, k))
    return tile if traits.group_size >= k else math.gcd(tile, traits.group_size)


# ---------------------------------------------------------------------- whole weights
def pack(
    fmt: Any, shape: tuple[int, int], params: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Checkpoint tensors of format `fmt` -> tensors of this layout."""
    parts = fmt.weight_only(tensors, shape, params)
    storage = {f"scaler.{k}": v for k, v in parts.scaler_tensors.items()}
    storage |= {f"outlier.{k}": v for k, v in parts.outliers.items()}
    storage |= {f"extra.{k}": v for k, v in parts.extra.items()} | parts.sides
    if parts.table is not None:
        storage["table"] = parts.table
        storage["lut"] = lut(parts.table)
    codes = parts.codes
    if parts.group_index is not None:
        storage["g_idx"] = parts.group_index
    traits = fmt.weight_only_traits(shape, params)
    if traits.codebook:
        assert parts.codebook is not None
        return storage | {"lut": parts.codebook} | pack_codebook(codes, traits.bits)
    order = _kernel_order(parts, traits, shape[1])
    if order is not None:
        perm, slice_group = order
        storage["perm"] = perm
        if slice_group is not None:
            storage["slice_group"] = slice_group
        # -1 picks the padding column
        codes = torch.nn.functional.pad(codes, (0, 1))[:, perm.long()]
    return storage | pack_codes(codes, traits.bits, table=parts.table is not None)


def unpack(
    fmt: Any, shape: tuple[int, int], params: dict[str, Any], storage: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `pack`."""
    n, k = shape
    traits = fmt.weight_only_traits(shape, params)
    perm = storage.get("perm")
    if traits.codebook:
        codes = unpack_codebook(storage, traits.bits, n, k)
    else:
        count = k if perm is None else perm.numel()
        codes = unpack_codes(storage, traits.bits, n, count, table="table" in storage)
    if perm is not None:
        ordered = torch.empty(n, k, dtype=torch.uint8, device=codes.device)
        kept = perm >= 0
        ordered[:, perm[kept].long()] = codes[:, kept]
        codes = ordered
    parts = WeightOnlyParts(
        codes=codes,
        scaler_tensors=_section(storage, "scaler."),
        group_index=storage.get("g_idx"),
        table=storage.get("table"),
        outliers=_section(storage, "outlier."),
        sides={k: v for k, v in storage.items() if k.startswith(("input.", "output."))},
        extra=_section(storage, "extra."),
    )
    return fmt.from_weight_only(parts, shape, params)


# ---------------------------------------------------------------------- codes
def pack_codes(codes: Tensor, bits: int, *, table: bool = False) -> dict[str, Tensor]:
    """Codes uint8 (N, KP) in kernel order -> {"qdata": int32 (T, N, 16)[, "qhigh": int32 (T, N,
    words)]}.
    """
    n, k = codes.shape
    width, features = plane_bits(bits), tile_features(bits)
    tiles = -(-k // features)
    codes = torch.nn.functional.pad(codes, (0, tiles * features - k))
    # (T, N, j, p, h, s, b)
    parts = codes.view(n, tiles, -1, 2, 2, 4, 2).permute(1, 0, 5, 3, 4, 2, 6)
    qdata = torch.zeros(tiles, n, 4, 2, 2, dtype=torch.int32, device=codes.device)
    for s in range(16 // width):
        for b in range(2):
            code = (parts[..., s, b] & ((1 << width) - 1)).to(torch.int32)
            qdata |= code << code_bit(s, b, width, table=table)
    packed = {"qdata": qdata.view(tiles, n, WORDS)}
    if count := high_words(bits):
        qhigh = torch.zeros(tiles, n, 4, count // 4, dtype=torch.int32, device=codes.device)
        for (p, h), word, bit in _high_places(bits):
            for s in range(16 // width):
                for b in range(2):
                    high = (parts[:, :, :, p, h, s, b] >> width).to(torch.int32)
                    qhigh[..., word] |= high << (b * 16 + s * width + bit)
        packed["qhigh"] = qhigh.view(tiles, n, count)
    return packed


def _high_places(bits: int) -> list[tuple[tuple[int, int], int, int]]:
    """For each (p, h): the word among thread j's, and the lowest bit, of its high bits in `qhigh`."""
    own = bits - plane_bits(bits)
    halves = high_words(bits) == 8
    places = [(p, h) for p in range(2) for h in range(2)]
    return [((p, h), h if halves else 0, own * (p if halves else p * 2 + h)) for p, h in places]


def unpack_codes(
    storage: Mapping[str, Tensor], bits: int, n: int, k: int, *, table: bool = False
) -> Tensor:
    """The inverse of `pack_codes`: codes uint8 (N, k)."""
    width = plane_bits(bits)
    qdata = storage["qdata"]
    tiles = qdata.shape[0]
    words = qdata.view(tiles, n, 4, 2, 2)
    parts = torch.empty(tiles, n, 4, 2, 2, 16 // width, 2, dtype=torch.uint8, device=qdata.device)
    for s in range(16 // width):
        for b in range(2):
            code = words >> code_bit(s, b, width, table=table)
            parts[..., s, b] = (code & ((1 << width) - 1)).to(torch.uint8)
    if count := high_words(bits):
        qhigh, mask = storage["qhigh"].view(tiles, n, 4, count // 4), (1 << (bits - width)) - 1
        for (p, h), word, bit in _high_places(bits):
            for s in range(16 // width):
                for b in range(2):
                    high = (qhigh[..., word] >> (b * 16 + s * width + bit)) & mask
                    parts[:, :, :, p, h, s, b] |= (high << width).to(torch.uint8)
    return parts.permute(1, 0, 5, 3, 4, 2, 6).reshape(n, -1)[:, :k]


# ---------------------------------------------------------------------- codes of eight weights
def pack_codebook(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes int32 (N, K / 8) -> `qdata` and, for 3 and 4 bits, `qhigh`, as the module's docstring
    says.
    """
    n, count = codes.shape
    tiles = -(-count // CODEBOOK_CODES)
    codes = torch.nn.functional.pad(codes, (0, tiles * CODEBOOK_CODES - count))
    parts = codes.view(n, tiles, WORDS, 2).transpose(0, 1).contiguous()  # (T, N, word, c)
    first, second = parts & 0xFFFF, (parts >> 16) & 0xFFFF
    packed = {"qdata": first[..., 0] | (first[..., 1] << 16)}
    if bits == 4:
        packed["qhigh"] = second[..., 0] | (second[..., 1] << 16)
    elif bits == 3:
        halves = (second[..., 0] | (second[..., 1] << 8)).view(tiles, n, 4, 2, 2)  # j, p, h
        packed["qhigh"] = (halves[:, :, :, 0] | (halves[:, :, :, 1] << 16)).reshape(tiles, n, 8)
    return packed


def unpack_codebook(storage: Mapping[str, Tensor], bits: int, n: int, k: int) -> Tensor:
    """The inverse of `pack_codebook`: codes int32 (N, K / 8)."""
    qdata = storage["qdata"]
    tiles = qdata.shape[0]
    codes = torch.stack([qdata & 0xFFFF, (qdata >> 16) & 0xFFFF], -1)
    if bits > 2:
        qhigh = storage["qhigh"]
        if bits == 3:
            qhigh = qhigh.view(tiles, n, 4, 1, 2)
            qhigh = torch.cat([qhigh, qhigh >> 16], 3).view(tiles, n, WORDS) & 0xFFFF
            second = torch.stack([qhigh & 0xFF, qhigh >> 8], -1)
        else:
            second = torch.stack([qhigh & 0xFFFF, (qhigh >> 16) & 0xFFFF], -1)
        codes = codes | (second << 16)
    return codes.transpose(0, 1).reshape(n, -1)[:, : k // 8].contiguous()


def codebook_order(count: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 (count): where kernel order has feature k of a weight of vectors."""
    k = torch.arange(count, device=device)
    word, c, half, b = k % 256 // 16, k % 16 // 8, k % 8 // 2, k % 2
    j, p, h = word // 4, word // 2 % 2, word % 2
    return k // 256 * 256 + (c * 4 + half) * 32 + p * 16 + h * 8 + j * 2 + b


def _section(storage: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in storage.items() if k.startswith(prefix)}


def _kernel_order(
    parts: WeightOnlyParts, traits: WeightOnlyTraits, k: int
) -> tuple[Tensor, Tensor | None] | None:
    """(perm, slice_group or None) where features must be regrouped, None where kernel order is k
    itself.
    """
    if traits.flat:
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
