"""SpQR: 2 to 4-bit codes in small groups with quantized scales and zeros, and sparse outliers.

    W[n, k] = scale[n, g] * (code[n, k] - zero[n, g]) + outlier[n, k],  g = k // group_size
    scale[n, g] = s_s * (scale_code[n, g] - s_z)        zero[n, g] = z_s * (zero_code[n, g] - z_z)

Scales and zeros are 3-bit codes; `row_group` neighbouring rows of a group share the float16 s_s,
z_s, s_z and z_z. An outlier is added to the decoded weight, so it holds the difference. With
`act_order` all columns are in the order of `in_perm`: column j is input feature in_perm[j].

`checkpoint_format="compact"` takes any bits and group sizes, and stores no redundant bytes:

    qweight       int32 (K*bits/32, N)   codes, a bit stream along K (see bits.py)
    qstats        int32 (N*6/32, G)      scale_code | zero_code << 3, a bit stream along N
    second_level  float16 (G, N/row_group, 4)   s_s, z_s, s_z, z_z
    row_offsets   int32 (N + 1)          CSR: row n has outliers row_offsets[n]..row_offsets[n + 1]
    col_vals      int32 (outliers)       float16 value << 16 | column
    in_perm       int32 (K / 2)          two 16-bit indices, the first one low; only with act_order

"spqr_quant" is the format of the public spqr-quant package: 3 bits in tiles of 16 x 16. Instead of
the first three tensors it has `dense_weights`, an int64 for each 16 columns of a row, at
(tile_row * G + g) * 16 + row % 16:

    bit 0..2  3..5   6..53         54..61                                                62..63
        w_s | w_z | 16 codes | byte (row % 16) // 2 of the tile's {s_s, z_s, s_z, z_z} | 0

Source: Dettmers et al. 2023 (arXiv 2306.03078) and the storage of spqr-quant (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from . import bits
from .base import Format, TensorSpec
from .spqr_grid import (
    STAT_BITS,
    STAT_TOP,
    SpqrGrid,
    outlier_columns,
    outlier_values,
    pack_outliers,
)
from .types import Params, Shape

TILE = 16


class Spqr(Format):
    name = "spqr"
    summary = "2/3/4-bit integers with quantized scales and sparse 16-bit outliers (SpQR)"
    algorithms = ("spqr",)
    defaults = {
        "bits": 3,
        "group_size": 16,
        "row_group": 16,
        "act_order": False,
        "checkpoint_format": "compact",
    }
    quantize_only = {"threshold": 0.2}

    def check_params(self, shape: Shape, params: Params) -> None:
        k = shape[1]
        self.expect("bits", params["bits"], (2, 3, 4))
        self.expect("checkpoint_format", params["checkpoint_format"], ("compact", "spqr_quant"))
        size = params["group_size"]
        if size < 1 or k % size:
            raise ValueError(f"{self.name}: group_size: expected a divisor of K={k}, got {size}")
        if params["row_group"] < 1:
            raise ValueError(
                f"{self.name}: row_group: expected at least 1, got {params['row_group']}"
            )
        if k > 65536:
            raise ValueError(
                f"{self.name}: shape: expected K up to 65536, because outliers have 16-bit "
                f"columns, got K={k}"
            )
        if params["act_order"] and k % 2:
            raise ValueError(f"{self.name}: act_order: expected an even K, got K={k}")
        if params["checkpoint_format"] == "spqr_quant":
            got = (params["bits"], size, params["row_group"])
            if got != (3, TILE, TILE):
                raise ValueError(
                    f"{self.name}: checkpoint_format: expected 'compact' for bits, group_size, "
                    f"row_group = {got}; 'spqr_quant' is for 3, 16, 16 only"
                )

    # ------------------------------------------------------------------ tensors
    def cuts(self, shape: Shape, params: Params) -> Shape:
        # In act-order the columns of a group may be anywhere. A cut would leave groups of unequal
        # sizes, which the format cannot store.
        columns = shape[1] if params["act_order"] else params["group_size"]
        return min(shape[0], params["row_group"]), columns

    def cut(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        dim: int,
        begin: int,
        end: int,
    ) -> tuple[dict[str, Tensor], Params]:
        """Each part gets the outliers of its rows or columns."""
        grid = self._grid(tensors, shape, params)
        position = [_outlier_rows(grid.row_offsets), outlier_columns(grid.col_vals).long()]
        inside = (position[dim] >= begin) & (position[dim] < end)
        position[dim] = position[dim] - begin
        part = (end - begin, shape[1]) if dim == 0 else (shape[0], end - begin)
        counts = torch.bincount(position[0][inside], minlength=part[0])
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(grid.row_offsets.dtype)
        col_vals = pack_outliers(outlier_values(grid.col_vals)[inside], position[1][inside])
        if dim == 0:
            rows = slice(begin, end)
            row_groups = slice(begin // params["row_group"], -(-end // params["row_group"]))
            cut = SpqrGrid(
                grid.codes[rows], grid.scale_codes[rows], grid.zero_codes[rows],
                grid.second_level[:, row_groups].contiguous(), offsets, col_vals, grid.perm,
            )  # fmt: skip
        else:
            groups = slice(begin // params["group_size"], end // params["group_size"])
            cut = SpqrGrid(
                grid.codes[:, begin:end], grid.scale_codes[:, groups], grid.zero_codes[:, groups],
                grid.second_level[groups], offsets, col_vals, grid.perm,
            )  # fmt: skip
        return self.from_spqr(cut, part, params), params

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        n, k = shape
        g, rows = k // params["group_size"], -(-n // params["row_group"])
        if params["checkpoint_format"] == "spqr_quant":
            dense = {"dense_weights": TensorSpec((torch.int64,), (rows * g * TILE,))}
        else:
            dense = {
                "qweight": TensorSpec((torch.int32,), (bits.words(k, params["bits"]), n)),
                "qstats": TensorSpec((torch.int32,), (bits.words(n, 2 * STAT_BITS), g)),
                "second_level": TensorSpec((torch.float16,), (g, rows, 4)),
            }
        return dense | {
            "row_offsets": TensorSpec((torch.int32,), (n + 1,)),
            "col_vals": TensorSpec((torch.int32,), None),
            "in_perm": TensorSpec((torch.int32,), (k // 2,), required=params["act_order"]),
        }

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        _, k = shape
        offsets, col_vals = tensors["row_offsets"], tensors["col_vals"]
        if col_vals.dim() != 1:
            raise ValueError(
                f"{self.name}: col_vals: expected one dimension, got {tuple(col_vals.shape)}"
            )
        if (
            int(offsets[0]) != 0
            or int(offsets[-1]) != col_vals.numel()
            or bool((offsets.diff() < 0).any())
        ):
            raise ValueError(
                f"{self.name}: row_offsets: expected values rising from 0 to {col_vals.numel()}, "
                f"the length of col_vals; got {int(offsets[0])}..{int(offsets[-1])}, "
                f"{int((offsets.diff() < 0).sum())} of them falling"
            )
        if col_vals.numel():
            columns = outlier_columns(col_vals)
            if int(columns.max()) >= k:
                raise ValueError(
                    f"{self.name}: col_vals: expected columns below {k}, got {int(columns.max())}"
                )
            self.check_finite("col_vals", outlier_values(col_vals))
            position = _outlier_rows(offsets) * k + columns
            if bool((position.diff() <= 0).any()):
                raise ValueError(
                    f"{self.name}: col_vals: expected columns rising within each row, got others"
                )
        if "in_perm" in tensors and not params["act_order"]:
            raise ValueError(
                f"{self.name}: in_perm: expected none because act_order is False, got one"
            )
        if params["act_order"]:
            perm = _unpack_perm(tensors["in_perm"])
            if not torch.equal(perm.sort().values, torch.arange(k, device=perm.device)):
                raise ValueError(
                    f"{self.name}: in_perm: expected a permutation of {k} features, got another"
                )
        grid = self._grid(tensors, shape, params)
        name = "dense_weights" if params["checkpoint_format"] == "spqr_quant" else "second_level"
        self.check_finite(name, grid.second_level)
        repacked = self.from_spqr(grid, shape, params)
        for key in ("dense_weights", "qweight", "qstats"):
            if key in tensors and not torch.equal(repacked[key], tensors[key]):
                raise ValueError(
                    f"{self.name}: {key}: expected zero bits behind the last code, got others"
                )

    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        """SpQR without calibration: all inputs count the same, and no error is propagated."""
        from .spqr_search import spqr

        grid = spqr(
            weight,
            None,
            bits=params["bits"],
            group_size=params["group_size"],
            row_group=params["row_group"],
            act_order=params["act_order"],
            threshold=params["threshold"],
        )
        return self.from_spqr(grid, (weight.shape[0], weight.shape[1]), params)

    def from_spqr(self, grid: SpqrGrid, shape: Shape, params: Params) -> dict[str, Tensor]:
        """A weight in SpQR's terms (spqr_search.py) -> stored tensors."""
        if params["checkpoint_format"] == "spqr_quant":
            tensors = {"dense_weights": _pack_dense(grid)}
        else:
            stat_codes = grid.scale_codes | (grid.zero_codes << STAT_BITS)
            tensors = {
                "qweight": bits.pack_rows(grid.codes.T, params["bits"]),
                "qstats": bits.pack_rows(stat_codes, 2 * STAT_BITS),
                "second_level": grid.second_level,
            }
        tensors |= {"row_offsets": grid.row_offsets, "col_vals": grid.col_vals}
        if grid.perm is not None:
            tensors["in_perm"] = _pack_perm(grid.perm)
        return tensors

    def _grid(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> SpqrGrid:
        """The inverse of `from_spqr`."""
        n, k = shape
        if params["checkpoint_format"] == "spqr_quant":
            codes, scale_codes, zero_codes, second_level = _unpack_dense(
                tensors["dense_weights"], shape
            )
        else:
            codes = bits.unpack_rows(tensors["qweight"], params["bits"], k).T.contiguous()
            stat_codes = bits.unpack_rows(tensors["qstats"], 2 * STAT_BITS, n)
            scale_codes, zero_codes = stat_codes & STAT_TOP, stat_codes >> STAT_BITS
            second_level = tensors["second_level"]
        perm = _unpack_perm(tensors["in_perm"]) if params["act_order"] else None
        offsets, col_vals = tensors["row_offsets"], tensors["col_vals"]
        return SpqrGrid(codes, scale_codes, zero_codes, second_level, offsets, col_vals, perm)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        grid = self._grid(tensors, shape, params)
        weight = grid.dense(params["row_group"])
        rows, columns = _outlier_rows(grid.row_offsets), outlier_columns(grid.col_vals)
        weight[rows, columns] += outlier_values(grid.col_vals).float()
        if grid.perm is None:
            return weight
        in_order = torch.empty_like(weight)
        in_order[:, grid.perm] = weight
        return in_order

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        return WeightOnlyTraits(
            params["bits"],
            "unsigned",
            "two_level",
            params["group_size"],
            min(params["row_group"], shape[0]),
            outliers=True,
        )

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        grid = self._grid(tensors, shape, params)
        codes, col_vals, group_index, extra = grid.codes, grid.col_vals, None, {}
        if grid.perm is not None:
            codes = torch.empty_like(grid.codes)
            codes[:, grid.perm] = grid.codes
            group_index = grid.perm.argsort().div(params["group_size"], rounding_mode="floor").int()
            columns = grid.perm[outlier_columns(col_vals)]
            col_vals = pack_outliers(outlier_values(col_vals), columns)
            extra = {"in_perm": tensors["in_perm"]}
        return WeightOnlyParts(
            codes=codes,
            scaler_tensors={
                "stats": (grid.scale_codes | (grid.zero_codes << STAT_BITS)).T.contiguous(),
                "second_level": grid.second_level,
            },
            group_index=group_index,
            outliers={"row_offsets": grid.row_offsets, "col_vals": col_vals},
            extra=extra,
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        codes, col_vals, perm = parts.codes, parts.outliers["col_vals"], None
        if params["act_order"]:
            perm = _unpack_perm(parts.extra["in_perm"])
            codes = codes[:, perm]
            columns = perm.argsort()[outlier_columns(col_vals)]
            col_vals = pack_outliers(outlier_values(col_vals), columns)
        stat_codes = parts.scaler_tensors["stats"].T
        grid = SpqrGrid(
            codes,
            stat_codes & STAT_TOP,
            stat_codes >> STAT_BITS,
            parts.scaler_tensors["second_level"],
            parts.outliers["row_offsets"],
            col_vals,
            perm,
        )
        return self.from_spqr(grid, shape, params)

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any] | None:
        """spqr-quant's own config, which transformers reads; our own config for "compact"."""
        if params["checkpoint_format"] != "spqr_quant":
            return super().to_hf_config(params, skipped)
        return {
            "quant_method": "spqr",
            "bits": params["bits"],
            "beta1": params["group_size"],
            "beta2": params["row_group"],
            "act_order": params["act_order"],
            "checkpoint_format": params["checkpoint_format"],
            "modules_to_not_convert": skipped,
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        if config.get("quant_method") != "spqr":
            return None
        return {
            "bits": config.get("bits", 3),
            "group_size": config.get("beta1", TILE),
            "row_group": config.get("beta2", TILE),
            "act_order": config.get("act_order", True),
            "checkpoint_format": config.get("checkpoint_format", "spqr_quant"),
        }


def _outlier_rows(row_offsets: Tensor) -> Tensor:
    """The row of each outlier, int64."""
    rows = torch.arange(row_offsets.numel() - 1, device=row_offsets.device)
    return rows.repeat_interleave(row_offsets.diff().long())


def _pack_perm(perm: Tensor) -> Tensor:
    """int64 (K) -> in_perm, int32 (K / 2)."""
    pairs = perm.view(-1, 2).to(torch.int32)
    return pairs[:, 0] | (pairs[:, 1] << 16)


def _unpack_perm(in_perm: Tensor) -> Tensor:
    """in_perm, int32 (K / 2) -> int64 (K)."""
    return torch.stack([in_perm & 0xFFFF, (in_perm >> 16) & 0xFFFF], 1).flatten().long()


# ---------------------------------------------------------------------- spqr-quant's words
_SECOND_LEVEL_BIT = STAT_BITS * (TILE + 2)


def _pack_dense(grid: SpqrGrid) -> Tensor:
    """`dense_weights` of a grid, int64 (tile rows * G * 16)."""
    n, g = grid.scale_codes.shape
    rows = grid.second_level.shape[1] * TILE
    device = grid.codes.device
    fields = torch.zeros(rows, g, TILE + 2, dtype=torch.int64, device=device)
    fields[:n, :, 0], fields[:n, :, 1] = grid.scale_codes.long(), grid.zero_codes.long()
    fields[:n, :, 2:] = grid.codes.reshape(n, g, TILE).long()
    shifts = torch.arange(TILE + 2, device=device) * STAT_BITS
    words = (fields << shifts).sum(-1).view(-1, TILE, g).transpose(1, 2)  # (tile rows, G, 16)
    level_bytes = grid.second_level.contiguous().view(torch.uint8).transpose(0, 1)
    words = words | (level_bytes.repeat_interleave(2, -1).long() << _SECOND_LEVEL_BIT)
    return words.flatten()


def _unpack_dense(words: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dense_weights` -> codes (N, K), scale_codes, zero_codes (N, G), second_level (G, R, 4)."""
    n, k = shape
    g = k // TILE
    tiles = words.view(-1, g, TILE)
    level_bytes = ((tiles[:, :, ::2] >> _SECOND_LEVEL_BIT) & 0xFF).to(torch.uint8)
    second_level = level_bytes.transpose(0, 1).contiguous().view(torch.float16)
    shifts = torch.arange(TILE + 2, device=words.device) * STAT_BITS
    fields = ((tiles.transpose(1, 2).reshape(-1, g, 1)[:n] >> shifts) & STAT_TOP).to(torch.uint8)
    codes = fields[..., 2:].reshape(n, k)
    return codes, fields[..., 0].contiguous(), fields[..., 1].contiguous(), second_level
