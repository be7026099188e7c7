"""Cases of the benchmark: shapes of known models' linear layers, numbers of rows, formats."""

from __future__ import annotations

from typing import Any

#: model -> (N, K) of q, k and v together, the output projection, gate and up together, down
MODELS: dict[str, list[tuple[int, int]]] = {
    "square": [(8192, 8192)],
    "llama-3-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama-3-70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "qwen3-32b": [(10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)],
    "tiny": [(128, 256), (72, 512)],
}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
TINY_ROWS = [1, 17]

#: suite -> (format, parameters)
SUITES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "weight_only": [
        ("gptq", {"bits": 4, "group_size": 128}),
        ("gptq", {"bits": 4, "group_size": 128, "act_order": True}),
        ("gptq", {"bits": 4, "group_size": 128, "symmetric": False}),
        ("gptq", {"bits": 3, "group_size": 128}),
        ("gptq", {"bits": 2, "group_size": 128}),
        ("gptq", {"bits": 8, "group_size": 128}),
        ("awq", {"group_size": 128}),
        ("nf4", {}),
        ("nf4", {"double_quant": True}),
        ("fp4", {}),
        ("mxfp4", {}),
        ("fp8", {}),
    ],
    "eight_bit": [
        ("w8a8", {}),
        ("w8a8", {"activation": "static", "input_scale": 0.03}),
        ("int8", {}),
        ("fp8", {"activation": "dynamic"}),
        ("fp8", {"activation": "static", "granularity": "tensor", "input_scale": 0.01}),
        ("fp8", {"activation": "dynamic", "granularity": "block"}),
    ],
    "gguf": [(name, {}) for name in ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_nl", "q4_0", "q4_1")],
    "lowbit": [
        ("spqr", {}),
        ("quip", {"bits": 2}),
        ("quip", {"bits": 4}),
        ("quip_sharp", {}),
        ("quip_sharp", {"bits": 4}),
    ],
    "dense": [("bf16", {})],
}
#: formats that other packages have, too; each is also in another suite
SUITES["peers"] = [
    ("gptq", {"bits": 4, "group_size": 128}),
    ("nf4", {}),
    ("w8a8", {}),
    ("fp8", {"activation": "dynamic"}),
    ("int8", {}),
    ("nf4", {"double_quant": True}),
    ("gptq", {"bits": 8, "group_size": 128}),
    ("fp8", {"activation": "dynamic", "granularity": "block"}),
    ("fp8", {}),
    ("spqr", {}),
]


def shapes_of(names: str) -> list[tuple[int, int]]:
    """ "llama-3-8b,8192x8192" -> their shapes (N, K), each once. ValueError for any other name."""
    shapes: list[tuple[int, int]] = []
    for name in (part.strip() for part in names.split(",")):
        if name in MODELS:
            shapes += MODELS[name]
            continue
        n, cross, k = name.partition("x")
        if not cross or not n.isdigit() or not k.isdigit() or int(n) < 1 or int(k) < 1:
            raise ValueError(f"shapes: expected NxK or one of {', '.join(MODELS)}; got {name!r}")
        shapes.append((int(n), int(k)))
    return list(dict.fromkeys(shapes))


def formats_of(suites: str) -> list[tuple[str, dict[str, Any]]]:
    """(format, parameters) of suites, or of specs such as "nf4,gptq:bits=3".

    Formats of a suite that are not registered are left out.
    """
    from .. import formats
    from ..quantizers.specs import parse_specs

    names = [part.strip() for part in suites.split(",")]
    if not all(name in SUITES or name == "all" for name in names):
        return [(spec.name, spec.params) for spec in parse_specs(suites)]
    chosen = [s for s in SUITES if s in names or ("all" in names and s != "peers")]
    return [case for suite in chosen for case in SUITES[suite] if case[0] in formats.names()]
