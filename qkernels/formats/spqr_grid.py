"""A weight in SpQR's terms: codes, quantized scales and zeros, sparse outliers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: codes of scales and zeros
STAT_BITS = 3


STAT_TOP = (1 << STAT_BITS) - 1


class SpqrGrid(NamedTuple):
    """A weight (N, K) in SpQR's terms, columns in the order of `perm`.

    codes: uint8 (N, K). scale_codes, zero_codes: uint8 (N, G). second_level: float16 (G, R, 4), R
    groups of rows. row_offsets: int32 (N + 1). col_vals: int32 (outliers). perm: int64 (K), None
    for k itself.
    """

    codes: Tensor
    scale_codes: Tensor
    zero_codes: Tensor
    second_level: Tensor
    row_offsets: Tensor
    col_vals: Tensor
    perm: Tensor | None

    def dense(self, row_group: int) -> Tensor:
        """scale * (code - zero), float32 (N, K), columns in stored order."""
        scale, zero = stats(self.scale_codes, self.zero_codes, self.second_level, row_group)
        grouped = self.codes.reshape(*scale.shape, -1).float()
        return (scale[..., None] * (grouped - zero[..., None])).reshape(self.codes.shape)


def stats(
    scale_codes: Tensor, zero_codes: Tensor, second_level: Tensor, row_group: int
) -> tuple[Tensor, Tensor]:
    """Scale and zero float32 (N, G) from their codes (N, G) and the second level (G, R, 4)."""
    n = scale_codes.shape[0]
    of_rows = second_level.float().repeat_interleave(min(row_group, n), 1)[:, :n]
    s_s, z_s, s_z, z_z = of_rows.permute(2, 1, 0)
    return s_s * (scale_codes.float() - s_z), z_s * (zero_codes.float() - z_z)


def outlier_values(col_vals: Tensor) -> Tensor:
    """float16 (outliers)."""
    return (col_vals >> 16).to(torch.int16).view(torch.float16)


def outlier_columns(col_vals: Tensor) -> Tensor:
    """int64 (outliers)."""
    return (col_vals & 0xFFFF).long()


def pack_outliers(values: Tensor, columns: Tensor) -> Tensor:
    """The inverse: float16 values and integer columns -> int32."""
    return (values.view(torch.int16).to(torch.int32) << 16) | columns.to(torch.int32)
