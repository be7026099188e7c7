"""Bit streams: integers of any width packed end to end into int32 words, lowest bit first.

    word 0                              word 1
    |c0|c1|c2|c3|c4|c5|c6|c7|c8|c9|c1.. |..0|c11|...      (3 bits: code 10 straddles the words)

This is how GPTQ packs along K (`qweight`) and along N (`qzeros`). For 2, 4 and 8 bits no code
straddles; for 3 bits 32 codes fill exactly three words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def words(count: int, bits: int) -> int:
    """Number of int32 words that hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def _period(bits: int) -> tuple[int, int]:
    """(codes, words) after which the positions of codes within words repeat."""
    codes = 32 // math.gcd(32, bits)
    return codes, codes * bits // 32


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes (C, n) uint8 -> words (ceil(C*bits/32), n) int32, packed along the first axis."""
    count, n = codes.shape
    period, period_words = _period(bits)
    repeats = -(-count // period)
    wide = torch.zeros(repeats * period, n, dtype=torch.int32, device=codes.device)
    wide[:count] = codes
    wide = wide.view(repeats, period, n)
    packed = torch.zeros(repeats, period_words, n, dtype=torch.int32, device=codes.device)
    for i in range(period):
        word, offset = divmod(i * bits, 32)
        packed[:, word] |= wide[:, i] << offset
        if offset + bits > 32:
            packed[:, word + 1] |= wide[:, i] >> (32 - offset)
    return packed.view(-1, n)[: words(count, bits)]


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """Words (W, n) int32 -> the first `count` codes (count, n) uint8. Inverse of `pack_rows`."""
    n = packed.shape[1]
    period, period_words = _period(bits)
    repeats = -(-count // period)
    packed = torch.nn.functional.pad(packed, (0, 0, 0, repeats * period_words - packed.shape[0]))
    packed = packed.reshape(repeats, period_words, n)
    codes = torch.empty(repeats, period, n, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for i in range(period):
        word, offset = divmod(i * bits, 32)
        code = packed[:, word] >> offset
        if offset + bits > 32:  # the shift is arithmetic: drop the sign bits that it shifts in
            low_bits = 32 - offset
            code = (code & ((1 << low_bits) - 1)) | (packed[:, word + 1] << low_bits)
        codes[:, i] = code & mask
    return codes.view(-1, n)[:count]


def take_rows(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """Codes (R, n) uint8 at the positions `index`, int64 (R); reads only the words they lie in."""
    first = index * bits
    word, offset = first // 32, (first % 32)[:, None]
    last = (first + bits - 1) // 32
    low, high = (packed[at].to(torch.int64) & 0xFFFFFFFF for at in (word, last))
    # A code within one word needs that word alone; a code that straddles needs both, as 64 bits.
    joined = torch.where((word == last)[:, None], low, low | high << 32)
    return ((joined >> offset) & ((1 << bits) - 1)).to(torch.uint8)


def padding_is_zero(packed: Tensor, bits: int, count: int) -> bool:
    """Whether all bits after the first `count` codes are zero."""
    return bool((pack_rows(unpack_rows(packed, bits, count), bits) == packed).all())


def codes_per_words(bits: int) -> int:
    """The smallest number of codes that fills whole 32-bit words."""
    return 32 // math.gcd(32, bits)
