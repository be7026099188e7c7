from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.formats import bits


@given(width=st.sampled_from([2, 3, 4, 8]), count=st.integers(1, 100), n=st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_matches_a_stream_built_bit_by_bit(width: int, count: int, n: int) -> None:
    codes = torch.randint(0, 1 << width, (count, n), dtype=torch.uint8)
    packed = bits.pack_rows(codes, width)
    for column in range(n):
        stream = sum(int(c) << (i * width) for i, c in enumerate(codes[:, column]))
        words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(bits.words(count, width))]
        assert [int(w) & 0xFFFFFFFF for w in packed[:, column]] == words
    assert torch.equal(bits.unpack_rows(packed, width, count), codes)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_padding_bits_are_seen(width: int) -> None:
    packed = bits.pack_rows(torch.full((5, 2), 1, dtype=torch.uint8), width)
    assert bits.padding_is_zero(packed, width, 5)
    packed[-1, 1] |= -(1 << 31)
    assert not bits.padding_is_zero(packed, width, 5)
