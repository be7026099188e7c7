"""Truncated, contradictory and malicious checkpoints: one clear ValueError, quickly."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import qkernels as qk
from qkernels.checkpoints.hf import reader as huggingface
from qkernels.checkpoints.hf.quantization import Plan
from qkernels.checkpoints.tensor_files import INDEX, TensorFiles

from ..tiny import tiny_model

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def _file(path: Path, header: Any, data: bytes = bytes(64), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(begin: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The files of small, sound checkpoints: GPTQ in one file, NF4 in shards."""
    found = {}
    for name, params, limit in (
        ("gptq", {"group_size": 32}, 10**9),
        ("nf4", {"double_quant": True}, 20_000),
    ):
        path = tmp_path_factory.mktemp("originals") / name
        model = qk.quantize_model(tiny_model(), name, progress=False, **params)
        huggingface.save(model, path, max_shard_bytes=limit)
        found[name] = {f.name: f.read_bytes() for f in path.iterdir()}
    return found


def _put(files: dict[str, bytes], path: Path) -> Path:
    path.mkdir(exist_ok=True)
    for file in path.iterdir():
        file.unlink()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


# ---------------------------------------------------------------------- one file
@pytest.mark.parametrize(("header", "message"), [
    ({"a": _entry(0, 32, [8]), "b": _entry(16, 64, [12])},
     "tensor 'b': data_offsets: expected data from byte 32.* got 16 .overlap"),
    ({"a": _entry(0, 32, [8]), "b": _entry(31, 63, [8])},
     "tensor 'b': data_offsets: expected data from byte 32.* got 31 .overlap"),
    ({"a": _entry(0, 32, [8]), "b": _entry(33, 64, [31], "U8")},
     "tensor 'b': data_offsets: expected data from byte 32.* got 33 .hole"),
    ({"a": _entry(0, 32, [8]), "b": _entry(0, 32, [8])},
     "tensor 'b': data_offsets: expected data from byte 32.* got 0 .overlap"),
    ({"a": _entry(0, 32, [8]), "b": _entry(48, 64, [4])},
     "tensor 'b': data_offsets: expected data from byte 32.* got 48 .hole"),
    ({"a": _entry(0, 32, [8])}, "expected 32 bytes of data, got 64"),
    ({"a": _entry(0, 128, [32])},
     "tensor 'a': expected data up to byte 128, got a file with 64 bytes of it .truncated"),
    ({"a": _entry(0, 64, [15])}, r"expected 60 bytes for F32 \[15\], got 0..64"),
    ({"a": _entry(0, 64, [16], "F16")}, r"expected 32 bytes for F16 \[16\], got 0..64"),
    ({"a": _entry(64, 0, [16])}, "expected 64 bytes .* got 64..0"),
    ({"a": _entry(-4, 60, [16])}, "got -4..60"),
    ({"a": _entry(0, 64, [16], "I4")}, "dtype: expected one of BOOL, .* got 'I4'"),
    ({"a": _entry(0, 64, [16], ["F32"])}, r"dtype: expected one of .* got \['F32'\]"),
    ({"a": _entry(0, 64, [-16])}, r"shape: expected a list of sizes, got \[-16\]"),
    ({"a": _entry(0, 64, [4, 4.0])}, "shape: expected a list of sizes"),
    ({"a": _entry(0, 64, [2**62, 2**62])}, "data_offsets: expected"),
    ({"a": {**_entry(0, 64, [16]), "data_offsets": 3}},
     r"data_offsets: expected \[begin, end\], got 3"),
    ({"a": 3}, "tensor 'a': dtype: expected one of"),
    ([1], "header: expected a JSON object, got list"),
    (b'{"a": 1, "a": 2}', "header: expected JSON, got something else .'a' is there twice"),
    (b"[" * 100_000, "header: expected JSON, got something else .*recursion"),
    (b"\xff\xfe\x00", "header: expected JSON"),
], ids=range(22))  # fmt: skip
def test_headers(header: Any, message: str, tmp_path: Path) -> None:
    path = _file(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=f"x.safetensors: .*{message}"), TensorFiles(path) as files:
        files.read("a")


@pytest.mark.parametrize("length", [2**63, 2**32, 200])
def test_header_lengths_beyond_the_file(length: int, tmp_path: Path) -> None:
    path = _file(tmp_path / "x.safetensors", {"a": _entry(0, 64, [16])}, length=length)
    with pytest.raises(ValueError, match="header length: expected at most"):
        TensorFiles(path)


@FUZZ
@given(data=st.data())
def test_fuzzed_files_fail_cleanly(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(save({"a": torch.arange(8.0), "b": torch.zeros(3, 2, dtype=torch.int8)}))
    kind = data.draw(st.sampled_from(["bytes", "cut", "json"]))
    if kind == "bytes":
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(raw)
    if kind == "json":
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        header = {"a": _entry(0, 64, [16]) | {field: data.draw(JSON)}}
        _file(path, header)
    with suppress(ValueError), TensorFiles(path) as files:
        for name in files.infos:
            files.read(name)


# ---------------------------------------------------------------------- the index
@pytest.mark.parametrize(("change", "message"), [
    ({"weight_map": {}}, "weight_map: expected a non-empty object"),
    ({"weight_map": [1]}, r"weight_map: expected a non-empty object, got \[1\]"),
    ({"?": "../evil.safetensors"}, "expected a .safetensors file name, got '../evil.safetensors'"),
    ({"?": "/etc/passwd"}, "expected a .safetensors file name, got '/etc/passwd'"),
    ({"?": "sub/model.safetensors"},
     "expected a .safetensors file name, got 'sub/model.safetensors'"),
    ({"?": "pytorch_model.bin"}, "expected a .safetensors file name, got 'pytorch_model.bin'"),
    ({"?": "..\\evil.safetensors\0"}, "expected a .safetensors file name"),
    ({"?": 7}, "expected a .safetensors file name, got 7"),
    ({"?": "model-00009-of-00009.safetensors"},
     "expected a file model-00009-of-00009.safetensors .* found none"),
    ({"?": "model-00002-of-"},
     "expected tensor '.*', which model.safetensors.index.json places here"),
])  # fmt: skip
def test_indexes(
    change: dict[str, Any], message: str, originals: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    files = dict(originals["nf4"])
    index = json.loads(files[INDEX])
    if "?" in change:
        first = next(n for n, f in index["weight_map"].items() if f.startswith("model-00001"))
        target = change["?"]
        if target == "model-00002-of-":
            target = next(f for f in index["weight_map"].values() if f.startswith(target))
        index["weight_map"][first] = target
    else:
        index |= change
    files[INDEX] = json.dumps(index).encode()
    with pytest.raises(ValueError, match=message):
        qk.load_model(_put(files, tmp_path / "m"))


def test_a_tensor_in_two_shards(originals: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    files = dict(originals["nf4"])
    names = sorted(name for name in files if name.endswith(".safetensors"))
    files[names[1]] = files[names[0]]
    index = json.loads(files[INDEX])
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != names[1]}
    index["weight_map"]["more"] = names[1]
    files[INDEX] = json.dumps(index).encode()
    with pytest.raises(ValueError, match="expected tensor 'more'|also in model-00001"):
        qk.load_model(_put(files, tmp_path / "m"))


def test_shards_in_each_other_s_place(
    originals: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    files = dict(originals["nf4"])
    names = sorted(name for name in files if name.endswith(".safetensors"))
    files[names[0]], files[names[1]] = files[names[1]], files[names[0]]
    with pytest.raises(
        ValueError, match="expected tensor '.*', which model.safetensors.index.json places here"
    ):
        qk.load_model(_put(files, tmp_path / "m"))


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1, -5000])
def test_truncated_shards(cut: int, originals: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    files = dict(originals["nf4"])
    name = sorted(name for name in files if name.endswith(".safetensors"))[-1]
    files[name] = files[name][:cut]
    with pytest.raises(ValueError, match=f"{name}: (header length|tensor|expected)"):
        qk.load_model(_put(files, tmp_path / "m"))


# ---------------------------------------------------------------------- the config
@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 10**5}, "num_hidden_layers: expected at most .* tensors .* got 100000"),
    ({"num_hidden_layers": 10**9},
     "num_hidden_layers: expected a number of at most 131072, got 1000000000"),
    ({"hidden_size": 10**12}, "hidden_size: expected at most"),
    ({"head_dim": 10**12}, "head_dim: expected a number of at most 131072"),
    ({"vocab_size": 10**15}, "vocab_size: expected at most"),
    ({"num_attention_heads": 0},
     "config.json: .*(modulo by zero|num_attention_heads: expected a positive integer)"),
    ({"num_key_value_heads": 3}, "config.json|expected shape"),
    ({"hidden_act": "no such"}, "expected a LlamaForCausalLM's config"),
    ({"hidden_size": True}, "hidden_size: expected a positive integer, got True"),
    ({"rope_scaling": {"rope_type": "no such"}}, "config.json: expected"),
    ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"},
     "model_type: expected a model"),
])  # fmt: skip
def test_configs(
    changes: dict[str, Any], message: str, originals: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    files = dict(originals["gptq"])
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changes}).encode()
    path = _put(files, tmp_path / "m")
    (path / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with pytest.raises(ValueError, match=message):
        qk.load_model(path)


def test_a_huge_config(originals: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    path = _put(dict(originals["gptq"]), tmp_path / "m")
    with (path / "config.json").open("wb") as file:
        file.truncate(200_000_000)  # a hole: takes no space
    with pytest.raises(
        ValueError, match="config.json: expected at most 100000000 bytes of JSON, got 200000000"
    ):
        qk.load_model(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["re:.*", "Linear", "-:x", "int", "float", "group", "channel", "gptq", "gemm",
      4, 8, 128]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner,
     max_size=3),
    max_leaves=6,
)  # fmt: skip
_ARGUMENTS = st.fixed_dictionaries({}, optional={
    "num_bits": JSON, "type": JSON, "symmetric": JSON, "strategy": JSON, "group_size": JSON,
    "dynamic": JSON,
    "block_structure": JSON, "actorder": JSON,
})  # fmt: skip
_GROUP = st.fixed_dictionaries({}, optional={
    "targets": JSON | st.just(["Linear"]), "weights": _ARGUMENTS | JSON,
    "format": JSON | st.just("pack-quantized"),
    "input_activations": _ARGUMENTS | JSON, "output_activations": JSON,
})  # fmt: skip
CONFIGS = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["gptq", "awq", "bitsandbytes", "compressed-tensors",
       "fp8"]) | JSON},
    optional={
        "bits": JSON, "group_size": JSON, "sym": JSON, "desc_act": JSON, "checkpoint_format": JSON,
        "dynamic": JSON,
        "version": JSON, "zero_point": JSON, "modules_to_not_convert": JSON, "load_in_4bit": JSON,
        "load_in_8bit": JSON,
        "bnb_4bit_quant_type": JSON | st.just("nf4"), "bnb_4bit_quant_storage": JSON,
        "llm_int8_threshold": JSON,
        "llm_int8_skip_modules": JSON, "weight_block_size": JSON, "activation_scheme": JSON,
        "scale_fmt": JSON,
        "config_groups": st.dictionaries(st.text(max_size=4), _GROUP | JSON, max_size=3) | JSON,
        "ignore": JSON,
        "format": JSON | st.sampled_from(["pack-quantized", "int-quantized", "float-quantized"]),
        "sparsity_config": JSON, "transform_config": JSON,
    },
)  # fmt: skip


@settings(FUZZ, max_examples=150)
@given(CONFIGS)
def test_fuzzed_quantization_configs_fail_cleanly(config: dict[str, Any]) -> None:
    """The formats' parameter check accepts each scheme of a plan, or raises ValueError."""
    with suppress(ValueError):
        plan = Plan("here", config)
        for name in ("lm_head", "model.layers.0.mlp.up_proj"):
            scheme = plan.scheme(name)
            if scheme is not None:
                qk.formats.get(scheme.format).resolve((64, 128), scheme.params)


@settings(FUZZ, max_examples=25)
@given(data=st.data())
def test_fuzzed_checkpoints_fail_cleanly(
    data: st.DataObject,
    originals: dict[str, dict[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With changed bytes in any file, the model loads, or one error says why not."""
    files = dict(originals[data.draw(st.sampled_from(["gptq", "nf4"]))])
    name = data.draw(st.sampled_from(sorted(files)))
    raw = bytearray(files[name])
    # near the start, where headers are, or anywhere
    top = data.draw(st.sampled_from([min(len(raw), 2000), len(raw)]))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, top - 1))] = data.draw(st.integers(0, 255))
    files[name] = bytes(raw)
    with suppress(ValueError, FileNotFoundError):
        qk.load_model(_put(files, tmp_path_factory.getbasetemp() / "fuzzed"))
