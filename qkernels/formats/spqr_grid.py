"""A weight in SpQR's terms: codes, quantized scales and zeros, sparse outliers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: bits and largest value of the codes of scales and zeros
STAT_BITS = 3
STAT_TOP = (1 << STAT_BITS) - 1


class SpqrGrid(NamedTuple):
    """A weight (N, K) in SpQR's terms, with its columns in the order of `perm`.

    Attributes:
        codes: uint8 (N, K).
        scale_codes, zero_codes: uint8 (N, G).
        second_level: float16 (G, R, 4), for R groups of rows.
        row_offsets: int32 (N + 1).
        col_vals: int32 (outliers).
        perm: int64 (K), the input feature of each column; None where column k is feature k.
    """

    codes: Tensor
    scale_codes: Tensor
    zero_codes: Tensor
    second_level: Tensor
    row_offsets: Tensor
    col_vals: Tensor
    perm: Tensor | None

    def dense(self, row_group: int) -> Tensor:
        """scale * (code - zero), float32 (N, K), with columns in stored order and no outliers."""
        scale, zero = stats(self.scale_codes, self.zero_codes, self.second_level, row_group)
        grouped = self.codes.reshape(*scale.shape, -1).float()
        return (scale[..., None] * (grouped - zero[..., None])).reshape(self.codes.shape)


def stats(
    scale_codes: Tensor, zero_codes: Tensor, second_level: Tensor, row_group: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero float32 (N, G) from their codes (N, G) and the second level (G, R, 4)."""
    n = scale_codes.shape[0]
    per_row = second_level.float().repeat_interleave(min(row_group, n), 1)[:, :n]
    s_s, z_s, s_z, z_z = per_row.permute(2, 1, 0)
    return s_s * (scale_codes.float() - s_z), z_s * (zero_codes.float() - z_z)


def outlier_values(col_vals: Tensor) -> Tensor:
    """The values in `col_vals`, float16 (outliers)."""
    return (col_vals >> 16).to(torch.int16).view(torch.float16)


def outlier_columns(col_vals: Tensor) -> Tensor:
    """The columns in `col_vals`, int64 (outliers)."""
    return (col_vals & 0xFFFF).long()


def pack_outliers(values: Tensor, columns: Tensor) -> Tensor:
    """`col_vals`, int32, of float16 values and integer columns."""
    return (values.view(torch.int16).to(torch.int32) << 16) | columns.to(torch.int32)
