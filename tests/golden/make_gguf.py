"""Make gguf.safetensors with llama.cpp's own quantizers, from the PyPI wheel xllamacpp.

    pip install --no-deps xllamacpp==2026.10.11549      (llama.cpp release b11549)
    python tests/golden/make_gguf.py

The file has `weight` float16 (24, 512), `importance` float32 (512), and for each type the bytes of
`ggml_quantize_chunk` with and without importance: "q4_k", "q4_k.importance", ...
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

TYPES = [
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
]
N, K = 24, 512


def weights() -> torch.Tensor:
    """Rows of normal, heavy-tailed, uniform, one-sided and nearly empty weights of any size."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = [normal(8, K), normal(6, K) / normal(6, K).abs().clamp(min=0.05)]
    rows.append(torch.rand(4, K, generator=generator) * 2 - 1)
    rows.append(normal(4, K).abs() + 0.5)
    rows.append(normal(2, K) * (torch.rand(2, K, generator=generator) < 0.02))
    weight = torch.cat(rows) * 10.0 ** (torch.arange(N) % 4 - 3.0)[:, None]
    return weight.half()


def main() -> None:
    found = importlib.util.find_spec("xllamacpp")
    assert found is not None, "pip install --no-deps xllamacpp"
    assert found.origin is not None
    (library,) = Path(found.origin).parent.glob("*.so")
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    floats, index = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, index, index, index, floats]
    weight = weights()
    source = weight.float().contiguous()
    importance = torch.rand(K, generator=torch.Generator().manual_seed(2)) ** 4 * 10 + 1e-3
    tensors = {"weight": weight, "importance": importance}

    def pointer(x: torch.Tensor) -> ctypes._Pointer[ctypes.c_float]:
        return ctypes.cast(x.data_ptr(), floats)

    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name.upper()]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        for suffix, weighting in (("", None), (".importance", pointer(importance))):
            out = torch.zeros(N, K // block * size, dtype=torch.uint8)
            written = quantize(kind, pointer(source), out.data_ptr(), 0, N, K, weighting)
            assert written == out.numel(), (name, written)
            tensors[name + suffix] = out
    save_file(tensors, Path(__file__).with_name("gguf.safetensors"))


if __name__ == "__main__":
    main()
