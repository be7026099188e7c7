"""NF4 and FP4 as bitsandbytes stores them: 16-entry tables, and an absmax per block.

    weight            uint8 (ceil(N*K/2), 1)   two codes a byte, the first value in the HIGH nibble;
                                               another `quant_storage` (for FSDP) gives the same
                                               bytes a float dtype
    weight.absmax     float32 (B)              B = ceil(N*K/block_size); uint8 with double_quant
    weight.quant_map  float32 (16)             the table
    weight.nested_absmax float32, weight.nested_quant_map float32 (256)       with double_quant
    weight.quant_state.bitsandbytes__nf4       JSON text as uint8: sizes, dtype, nested_offset

Blocks divide the row-major flattened weight and may straddle rows.
    W[i] = table[code[i]] * absmax[i // block_size]
    absmax[b] = nested_quant_map[q[b]] * nested_absmax[b // 256] + nested_offset     (double_quant)

Source: Dettmers et al. 2023 (arXiv 2305.14314) for NF4 and double quantization, 2022 (2110.02861)
for the dynamic 8-bit map; byte order as bitsandbytes 0.50 writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layouts.weight_only import WEIGHT_ONLY, WeightOnlyParts, WeightOnlyTraits
from .base import Format, TensorSpec
from .types import Params, Shape

_STATE = "weight.quant_state.bitsandbytes__"
#: quantiles of the normal distribution, normalized to [-1, 1], with an exact 0 (QLoRA, appendix E)
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

#: sign, 2 exponent bits, 1 mantissa bit, normalized to 1; code 8 is -0
_FP4_POSITIVE = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4_TABLE = (*_FP4_POSITIVE, *(-v for v in _FP4_POSITIVE))

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256
_DTYPES = ("float16", "bfloat16", "float32")
_STORAGES = {
    "uint8": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_MAX_STATE_BYTES = 64 * 1024


def dynamic_map() -> Tensor:
    """The signed dynamic 8-bit table, float32 (256), ascending.

    Seven decades; decade e holds 2^e values at the midpoints of 2^e equal steps of [0.1, 1] times
    10^(e-6), each with both signs; then 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        # in float32 throughout, as in bitsandbytes
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Code uint8 of the table entry nearest to each value; a tie takes the lower entry."""
    ascending, code = table.sort(stable=True)
    middles = (ascending[:-1] + ascending[1:]) / 2
    return code[torch.bucketize(values, middles)].to(torch.uint8)


class Bitsandbytes4(Format):
    """Base class of NF4 and FP4, which differ only in their table."""

    algorithms = ("awq",)
    defaults = {
        "block_size": 64,
        "double_quant": False,
        "dtype": "bfloat16",
        "nested_block_size": NESTED_BLOCK_SIZE,
        "quant_storage": "uint8",
    }
    table: ClassVar[tuple[float, ...]]

    @property
    def state_name(self) -> str:
        """Name of the quant state tensor, which includes the format's name."""
        return f"{_STATE}{self.name}"

    def format_from_names(self, names: Collection[str]) -> str:
        """The quant state's name says nf4 or fp4; bitsandbytes' configs may omit it or be wrong."""
        kinds = (name.removeprefix(_STATE) for name in names if name.startswith(_STATE))
        return next((kind for kind in kinds if kind in ("nf4", "fp4")), self.name)

    def check_params(self, shape: Shape, params: Params) -> None:
        self.expect("block_size", params["block_size"], BLOCK_SIZES)
        self.expect("nested_block_size", params["nested_block_size"], (NESTED_BLOCK_SIZE,))
        self.expect("dtype", params["dtype"], _DTYPES)
        self.expect("quant_storage", params["quant_storage"], tuple(_STORAGES))
        count, size = -(-shape[0] * shape[1] // 2), _STORAGES[params["quant_storage"]].itemsize
        if count % size:
            raise ValueError(
                f"{self.name}: quant_storage: expected items that {count} bytes divide into, "
                f"got {params['quant_storage']!r}"
            )

    def cuts(self, shape: Shape, params: Params) -> Shape:
        (n, k), block = shape, params["block_size"]
        # Rows can be cut where a block ends with a row, columns only if no block straddles rows.
        return min(n, block // math.gcd(block, k)), block if k % block == 0 else k

    def cut(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        params: Params,
        dim: int,
        begin: int,
        end: int,
    ) -> tuple[dict[str, Tensor], Params]:
        """Undoes double quantization, exactly, where a cut would divide a block of 256 absmax."""
        (n, k), block = shape, params["block_size"]
        rows, columns = (
            (slice(begin, end), slice(0, k)) if dim == 0 else (slice(0, n), slice(begin, end))
        )
        part, nested = dict(tensors), params["double_quant"]
        first, last = begin * k // block, -(-end * k // block)
        if nested and (dim == 1 or first % NESTED_BLOCK_SIZE):
            part["weight.absmax"] = self._absmax(tensors, params)
            del part["weight.nested_absmax"], part["weight.nested_quant_map"]
            nested = False
        codes = unpack_nibbles(tensors["weight"])[: n * k].view(n, k)[rows, columns].reshape(-1)
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
        # always uint8, whatever `quant_storage` was
        part["weight"] = ((codes[:, 0] << 4) | codes[:, 1])[:, None]
        absmax = part["weight.absmax"]
        if dim == 0:
            part["weight.absmax"] = absmax[first:last].contiguous()
        else:
            part["weight.absmax"] = absmax.view(n, -1)[:, begin // block : end // block].reshape(-1)
        if nested:
            outer = slice(first // NESTED_BLOCK_SIZE, -(-last // NESTED_BLOCK_SIZE))
            part["weight.nested_absmax"] = part["weight.nested_absmax"][outer].contiguous()
        state = self._state(tensors[self.state_name])
        state["shape"] = [end - begin, k] if dim == 0 else [n, end - begin]
        if not nested:
            state = {key: value for key, value in state.items() if not key.startswith("nested_")}
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        part[self.state_name] = text.to(absmax.device)
        return part, {**params, "double_quant": nested, "quant_storage": "uint8"}

    def specs(self, shape: Shape, params: Params) -> dict[str, TensorSpec]:
        count = shape[0] * shape[1]
        blocks = -(-count // params["block_size"])
        storage = _STORAGES[params["quant_storage"]]
        nested = params["double_quant"]
        specs = {
            "weight": TensorSpec((storage,), (-(-count // 2) // storage.itemsize, 1)),
            "weight.absmax": TensorSpec((torch.uint8 if nested else torch.float32,), (blocks,)),
            "weight.quant_map": TensorSpec((torch.float32,), (16,)),
            self.state_name: TensorSpec((torch.uint8,), None),
        }
        if nested:
            outer = -(-blocks // NESTED_BLOCK_SIZE)
            specs["weight.nested_absmax"] = TensorSpec((torch.float32,), (outer,))
            specs["weight.nested_quant_map"] = TensorSpec((torch.float32,), (256,))
        return specs

    def params_from_tensors(
        self, tensors: Mapping[str, Tensor], params: Mapping[str, Any]
    ) -> Params:
        params = dict(params)
        for name, dtype in _STORAGES.items():
            weight = tensors.get("weight")
            if isinstance(weight, Tensor) and weight.dtype == dtype:
                params.setdefault("quant_storage", name)
        state_tensor = tensors.get(self.state_name)
        if not isinstance(state_tensor, Tensor) or state_tensor.is_meta:
            return params
        state = self._state(tensors[self.state_name])
        state_params = {
            "block_size": state.get("blocksize"),
            "double_quant": "nested_offset" in state,
            "dtype": state.get("dtype", "bfloat16"),
            "nested_block_size": state.get("nested_blocksize", NESTED_BLOCK_SIZE),
        }
        for key, value in state_params.items():
            if key in params and params[key] != value and key != "dtype":
                raise ValueError(
                    f"{self.name}: {self.state_name}: expected {key}={params[key]!r} as given, "
                    f"got {value!r}"
                )
        return {**params, **state_params}

    def check_values(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> None:
        state = self._state(tensors[self.state_name])
        for key, want in (("quant_type", self.name), ("shape", list(shape))):
            if state.get(key) != want:
                raise ValueError(
                    f"{self.name}: {self.state_name}: expected {key} {want!r}, "
                    f"got {state.get(key)!r}"
                )
        self.check_finite("weight.quant_map", tensors["weight.quant_map"])
        if params["double_quant"]:
            offset = state.get("nested_offset")
            if not isinstance(offset, (int, float)) or not abs(offset) < 3.4e38:
                raise ValueError(
                    f"{self.name}: {self.state_name}: expected a finite nested_offset, "
                    f"got {offset!r}"
                )
            self.check_finite(
                "weight.nested_absmax", tensors["weight.nested_absmax"], nonnegative=True
            )
            self.check_finite("weight.nested_quant_map", tensors["weight.nested_quant_map"])
        else:
            self.check_finite("weight.absmax", tensors["weight.absmax"], nonnegative=True)

    def _state(self, tensor: Tensor) -> dict[str, Any]:
        """The quant state: the JSON object in `tensor`. Raises ValueError if it holds none."""
        where = f"{self.name}: {self.state_name}"
        TensorSpec((torch.uint8,), None).check(where, tensor)
        if tensor.numel() > _MAX_STATE_BYTES:
            raise ValueError(
                f"{where}: expected at most {_MAX_STATE_BYTES} bytes, got {tensor.numel()}"
            )
        try:
            state = json.loads(bytes(tensor.flatten().tolist()).decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected JSON text, got something else ({error})") from None
        if not isinstance(state, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(state).__name__}")
        return state

    # ------------------------------------------------------------------ arithmetic
    def quantize(self, weight: Tensor, params: Params) -> dict[str, Tensor]:
        n, k = weight.shape
        block, device = params["block_size"], weight.device
        table = torch.tensor(self.table, dtype=torch.float32, device=device)
        flat = weight.reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
        absmax = blocks.abs().amax(-1)
        inverse = torch.where(absmax > 0, 1 / absmax, torch.zeros_like(absmax))
        codes = nearest(blocks * inverse[:, None], table).view(-1)[: flat.numel()]
        codes = torch.nn.functional.pad(codes, (0, flat.numel() % 2)).view(-1, 2)
        state: dict[str, Any] = {
            "quant_type": self.name,
            "blocksize": block,
            "dtype": params["dtype"],
            "shape": [n, k],
        }
        tensors = {"weight": _as_storage(codes, params), "weight.quant_map": table}
        if params["double_quant"]:
            offset = absmax.mean()
            inner, outer = quantize_dynamic(absmax - offset, dynamic_map().to(device))
            state |= {
                "nested_blocksize": NESTED_BLOCK_SIZE,
                "nested_dtype": "float32",
                "nested_offset": offset.item(),
            }
            tensors["weight.absmax"] = inner
            tensors["weight.nested_absmax"] = outer
            tensors["weight.nested_quant_map"] = dynamic_map().to(device)
        else:
            tensors["weight.absmax"] = absmax
        text = json.dumps(state).encode()
        tensors[self.state_name] = torch.tensor(list(text), dtype=torch.uint8, device=device)
        return tensors

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, params: Params) -> Tensor:
        n, k = shape
        table = tensors["weight.quant_map"]
        # One look-up decodes both codes of a byte: 256 pairs of values, each read as one int64.
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)
        bytes_ = tensors["weight"].reshape(-1).view(torch.uint8).int()
        values = pairs.view(torch.int64).view(-1)[bytes_].view(torch.float32)[: n * k]
        absmax = self._absmax(tensors, params)
        blocks = torch.nn.functional.pad(values, (0, absmax.numel() * params["block_size"] - n * k))
        return blocks.view(absmax.numel(), -1).mul_(absmax[:, None]).view(-1)[: n * k].view(n, k)

    def _absmax(self, tensors: Mapping[str, Tensor], params: Params) -> Tensor:
        """The absmax of each block, float32 (B), with double quantization undone."""
        absmax = tensors["weight.absmax"]
        if not params["double_quant"]:
            return absmax
        outer = tensors["weight.nested_absmax"].repeat_interleave(NESTED_BLOCK_SIZE)[
            : absmax.numel()
        ]
        inner = tensors["weight.nested_quant_map"][absmax.int()]
        return inner * outer + self._offset(tensors)

    def _offset(self, tensors: Mapping[str, Tensor]) -> float:
        return float(self._state(tensors[self.state_name])["nested_offset"])

    # ------------------------------------------------------------------ kernel family
    def kernel_layout(self, params: Mapping[str, Any]) -> str:
        return WEIGHT_ONLY

    def weight_only_traits(self, shape: Shape, params: Params) -> WeightOnlyTraits:
        scaler = "nested" if params["double_quant"] else "scale"
        if shape[1] % params["block_size"]:  # blocks straddle rows
            scaler += "_flat"
        return WeightOnlyTraits(4, "lut16", scaler, params["block_size"])

    def weight_only(
        self, tensors: Mapping[str, Tensor], shape: Shape, params: Params
    ) -> WeightOnlyParts:
        n, k = shape
        absmax = tensors["weight.absmax"]
        if k % params["block_size"] == 0:
            absmax = absmax.view(n, -1).T  # (blocks along K, N): neighbouring rows are adjacent
        scaler_tensors = {"absmax": absmax}
        if params["double_quant"]:
            scaler_tensors["nested_map"] = tensors["weight.nested_quant_map"]
            scaler_tensors["nested_absmax"] = tensors["weight.nested_absmax"]
            scaler_tensors["offset"] = torch.tensor(
                [self._offset(tensors)], device=tensors["weight"].device
            )
        codes = unpack_nibbles(tensors["weight"])[: n * k].view(n, k)
        return WeightOnlyParts(
            codes=codes,
            scaler_tensors=scaler_tensors,
            table=tensors["weight.quant_map"],
            extra={self.state_name: tensors[self.state_name]},
        )

    def from_weight_only(
        self, parts: WeightOnlyParts, shape: Shape, params: Params
    ) -> dict[str, Tensor]:
        codes = parts.codes.reshape(-1)
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
        assert parts.table is not None
        absmax = parts.scaler_tensors["absmax"]
        tensors = {
            "weight": _as_storage(codes, params),
            "weight.absmax": absmax.T.reshape(-1) if absmax.dim() == 2 else absmax,
            "weight.quant_map": parts.table,
            **parts.extra,
        }
        if params["double_quant"]:
            tensors["weight.nested_absmax"] = parts.scaler_tensors["nested_absmax"]
            tensors["weight.nested_quant_map"] = parts.scaler_tensors["nested_map"]
        return tensors

    # ------------------------------------------------------------------ checkpoints
    def to_hf_config(self, params: Params, skipped: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": params["double_quant"],
            "bnb_4bit_compute_dtype": params["dtype"],
            "bnb_4bit_quant_storage": params["quant_storage"],
            "llm_int8_skip_modules": skipped,
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Params | None:
        if config.get("quant_method") != "bitsandbytes" or not config.get("load_in_4bit"):
            return None
        if config.get("bnb_4bit_quant_type", "fp4") != cls.name:
            return None
        storage = config.get("bnb_4bit_quant_storage", "uint8")
        if not isinstance(storage, str) or storage not in _STORAGES:
            raise ValueError(
                "quantization_config.bnb_4bit_quant_storage: expected one of "
                f"{', '.join(_STORAGES)}; got {storage!r:.60}"
            )
        return {}  # each weight's dtype and quant state have the parameters


class Nf4(Bitsandbytes4):
    name = "nf4"
    summary = "4-bit NormalFloat in blocks, double quantization (bitsandbytes, QLoRA)"
    table = NF4_TABLE


class Fp4(Bitsandbytes4):
    name = "fp4"
    summary = "4-bit float in blocks, double quantization (bitsandbytes)"
    table = FP4_TABLE


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Bytes -> codes uint8 (2 * bytes), high nibble first."""
    flat = packed.reshape(-1).view(torch.uint8)
    return torch.stack((flat >> 4, flat & 15), dim=1).reshape(-1)


def _as_storage(codes: Tensor, params: Mapping[str, Any]) -> Tensor:
    """Codes uint8 (count, 2) -> the stored weight, (items, 1)."""
    packed = (codes[:, 0] << 4) | codes[:, 1]
    return packed.view(_STORAGES[params["quant_storage"]])[:, None]


def quantize_dynamic(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Blockwise 8-bit quantization: float32 (B) -> uint8 (B), absmax float32 (ceil(B/256))."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % NESTED_BLOCK_SIZE))
    blocks = blocks.view(-1, NESTED_BLOCK_SIZE)
    absmax = blocks.abs().amax(-1)
    inverse = torch.where(absmax > 0, 1 / absmax, torch.zeros_like(absmax))
    return nearest(blocks * inverse[:, None], table).view(-1)[: values.numel()], absmax
