"""JSON files of a model directory that cost memory or time, choose code to run, or hold garbage."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels.checkpoints import files, load_tokenizer
from qkernels.checkpoints.hf.config_checks import (
    check_fields,
    check_values,
    without_implementations,
)
from qkernels.checkpoints.tensor_files import INDEX

from ..tiny import ids
from .hostile import change, quick, said_by

# --------------------------------------------------------------------- config.json: memory and time
_MEMORY = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import qkernels as qk
directory, base = Path(sys.argv[1]), None
path = directory / "config.json"
base = json.loads(path.read_text())
qk.load_model(directory)
for changes in json.loads(Path(sys.argv[2]).read_text()):
    path.write_text(json.dumps({**base, **changes}))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        qk.load_model(directory)
        said = "loaded"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([more, time.process_time() - begin, said[:500]]))
"""
_GPT_NEO = {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "num_layers": 2,
            "attention_types": [[["global"], 2]]}  # fmt: skip
_BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
_BOMBS: list[tuple[dict[str, Any], str]] = [
    ({"num_labels": 10**30}, "num_labels: expected a number of at most 131072, got 1000"),
    ({"num_labels": 1e9}, "num_labels: expected a number of at most 131072, got 1000"),
    ({"num_labels": 10_000_000}, "num_labels: expected a number of at most 131072, got 10000000"),
    ({"num_hidden_layers": 10_000_000}, "num_hidden_layers: expected a number of at most 131072"),
    ({"num_hidden_layers": 131_072},
     "num_hidden_layers: expected at most 20, as the files hold 20 tensors"),
    ({"text_config": {"num_hidden_layers": 10**8}},
     r"text_config.num_hidden_layers: expected a number"),
    ({"a": {"b": [{"depths": [1, 10**9]}]}}, r"a.b.depths: expected a number of at most 131072"),
    ({"id2label": {str(i): "x" for i in range(300_000)}}, "expected at most 262144 items in all"),
    ({"anything": [0] * 300_000}, "anything: expected at most 262144 items in all"),
    ({"": [[]] * 300_000}, "expected at most 262144 items in all"),
    ({**_GPT_NEO, "max_position_embeddings": 60_000},
     "buffers of at most 2147483648 bytes, got 7200000"),
    ({**_BERT, "max_position_embeddings": 10**9},
     "expected parameters of at most [0-9]+ numbers, as the files hold fewer, got more"),
    # tables that are computed row by row, in Python, while the model is built
    ({"model_type": "pegasus", "architectures": ["PegasusForConditionalGeneration"],
      "max_position_embeddings": 10**12},
     "parameters of at most"),
    ({"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"],
      "sinusoidal_pos_embds": True,
      "max_position_embeddings": 5_000_000}, "parameters of at most"),
    ({"num_labels": 131_072}, "loaded"),
    ({"max_position_embeddings": 10**9, "rope_theta": 10**9, "eos_token_id": 250_000}, "loaded"),
]  # fmt: skip


def test_numbers_and_lengths_in_a_config_cost_nothing(directory: Path, tmp_path: Path) -> None:
    """The peak memory after each config, in a process of its own.

    The largest are the two dictionaries of 131,072 labels.
    """
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([changes for changes, _ in _BOMBS]))
    limits = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(directory), str(cases)],
        capture_output=True, text=True, env=limits, timeout=300, check=True,
    )  # fmt: skip
    answers = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == len(_BOMBS)
    for (kilobytes, seconds, said), (changes, expected) in zip(answers, _BOMBS, strict=True):
        assert re.search(expected, said), (changes.keys(), said)
        assert kilobytes < 150_000, (changes.keys(), kilobytes)
        assert seconds < 10, (changes.keys(), seconds)


def _unbounded(values: dict[str, Any], kind: Any) -> str | None:
    """The name of an integer of a config that may be of any size; another one for each class."""
    numbers = sorted(key for key, value in values.items() if type(value) is int)
    free = [
        key
        for key in numbers
        if said_by(lambda key=key: check_values(Path("x"), {key: 10**7})) is None
    ]
    return random.Random(kind.__name__).choice(free) if free else None


def test_real_configs_pass() -> None:
    """The defaults of every model type of transformers, and what large models say.

    What is let through whatever its size must cost a config class nothing. (All 10,015 fields of
    all classes were tried once, with 1,000,000; here it is one of each.)
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path, checked = Path("config.json"), 0
    for kind in dict.fromkeys(CONFIG_MAPPING.values()):
        try:
            values = json.loads(json.dumps(kind().to_dict()))
        except Exception:
            continue  # has no defaults, or some that are no JSON
        values = without_implementations(path, values)
        check_values(path, values)
        check_fields(path, kind, values)
        checked += 1
        if (free := _unbounded(values, kind)) is not None:
            with quick(0.4), suppress(Exception):  # a list of 10 million takes longer
                kind(**{free: 10**7})
    assert checked > 200
    check_values(path, {
        "vocab_size": 256_000, "max_position_embeddings": 10_485_760,
        "eos_token_id": [200_001, 200_008],
        "rope_scaling": {"original_max_position_embeddings": 1_048_576, "factor": 8.0},
        "rope_theta": 1_000_000_000,
        "num_labels": 21_843, "id2label": {str(i): f"LABEL_{i}" for i in range(21_843)},
        "sliding_window": 131_072,
        "label2id": {f"LABEL_{i}": i for i in range(21_843)}, "model_max_length": 10**30,
        "n_positions": 1_048_576,
        "n_words": 200_000, "num_training_steps": 500_000, "num_train_samples": 1_281_167,
        "num_train_epochs": 10**6,
        "num_experts": 512, "rms_norm_eps": 1e-6, "seed": 2**62, "num_params": 671_000_000_000,
    })  # fmt: skip


def test_depth_of_json(directory: Path) -> None:
    deep: Any = 0
    for _ in range(500):
        deep = [deep]
    for changes in ({"x": deep}, {"quantization_config": {"quant_method": "gptq", "bits": deep}}):
        change(directory, changes)
        with pytest.raises(
            ValueError, match="config.json: expected JSON of a depth of at most 32, got more"
        ):
            qk.load_model(directory)


def test_the_tokenizer_s_door_checks_the_config_too(directory: Path) -> None:
    change(directory, {"num_labels": 10**30})
    with pytest.raises(
        ValueError, match="config.json: num_labels: expected a number of at most 131072"
    ):
        load_tokenizer(directory)


# ---------------------------------------------------------------------- code that a file chooses
@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The list of host names that were looked up."""
    asked: list[str] = []

    def spy(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(str(host))
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", spy)
    return asked


@pytest.mark.parametrize("key", [
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
])  # fmt: skip
@pytest.mark.parametrize("where", ["outside", "text_config", "in a list", "by parts"])
def test_repositories_of_kernels_are_refused(
    key: str, where: str, directory: Path, hosts: list[str]
) -> None:
    for name in ("kernels-community/flash-attn2", "evil/kernel@v1:f", "paged|evil/kernel"):
        change(directory, {
            "outside": {key: name}, "text_config": {"text_config": {key: name}},
            "in a list": {"parts": [{key: name}]},
            "by parts": {key: {"": "sdpa", "text_config": name}},
        }[where])  # fmt: skip
        with pytest.raises(
            ValueError, match=f"config.json: {key}: expected none, .* got the repository"
        ):
            qk.load_model(directory)
    assert hosts == []


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "eager", "no such", 5])
def test_plain_names_of_implementations_do_not_count(
    name: Any, directory: Path, hosts: list[str]
) -> None:
    expected = qk.load_model(directory).config
    change(
        directory,
        {"attn_implementation": name, "_attn_implementation": name, "experts_implementation": name},
    )
    loaded = qk.load_model(directory)
    assert loaded.config._attn_implementation == expected._attn_implementation
    assert torch.isfinite(loaded(ids(4)[None]).logits).all()
    assert hosts == []


def test_repositories_of_backbones_are_refused(directory: Path, hosts: list[str]) -> None:
    change(
        directory,
        {
            "model_type": "dpt",
            "architectures": ["DPTForDepthEstimation"],
            "backbone": "evil/backbone",
        },
    )
    for load in (qk.load_model, load_tokenizer):
        with pytest.raises(
            ValueError, match="config.json: backbone: .* got the repository 'evil/backbone'"
        ):
            load(directory)
    assert hosts == []


# ---------------------------------------------------------------------- errors that name the file
_GARBAGE: list[Any] = [
    {"max_length": "x"}, {"eos_token_id": {}}, {"num_beams": {}}, {"watermarking_config": 5},
    {"cache_config": 5},
    {"transformers_version": {}}, {"compile_config": "x"}, {"num_beams": [1]}, {"do_sample": []},
    {"to_dict": 5},
    {"temperature": "hot"}, {"constraints": 3}, {"quantization_config": 5}, {"suppress_tokens": 5},
    {"": 5},
    {"validate": 1}, {"update": 2}, {"\ud800": "\ud800"}, {"num_return_sequences": 10**40},
    {"top_k": -5},
]  # fmt: skip


@pytest.mark.parametrize("garbage", _GARBAGE, ids=range(len(_GARBAGE)))
def test_generation_configs(garbage: dict[str, Any], directory: Path) -> None:
    change(directory, garbage, "generation_config.json")
    said = said_by(lambda: qk.load_model(directory))
    assert said is None or said.startswith(f"{directory / 'generation_config.json'}: ")


@pytest.mark.parametrize("text", [b"[]", b"\xff", b"{", b"5", b""])
def test_generation_configs_that_are_none(text: bytes, directory: Path) -> None:
    (directory / "generation_config.json").write_bytes(text)
    with pytest.raises(ValueError, match="generation_config.json: expected (a )?JSON"):
        qk.load_model(directory)


@pytest.mark.parametrize("name", ["a" * 300, "\0", "\ud800", "a\0b", "x" * 5000])
def test_indexes_that_name_what_no_file_is_called(name: str, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / INDEX).write_text(
        json.dumps({"weight_map": {"lm_head.weight": f"{name}.safetensors"}})
    )
    with pytest.raises(ValueError, match=f"{INDEX}: ") as caught:
        qk.load_model(directory)
    assert len(str(caught.value)) < 2000
    str(caught.value).encode()  # it can be printed


@pytest.mark.parametrize(("changes", "message"), [
    ({"sliding_window": "silu"}, "sliding_window: expected int or null, got 'silu'"),
    ({"sliding_window": 1.5}, "sliding_window: expected int or null, got 1.5"),
    ({"sliding_window": True}, "sliding_window: expected int or null, got True"),
    ({"attention_chunk_size": "x"}, "attention_chunk_size: expected int or null"),
    ({"is_causal": "x"}, "is_causal: expected bool"),
    ({"kv_sharing_modes": ["x"]}, "kv_sharing_modes: expected null"),
    ({"output_hidden_states": 1.5}, "output_hidden_states: expected bool or null, got 1.5"),
    ({"attention_chunk_size": -(10**30)}, "attention_chunk_size: expected an integer of 64 bits"),
    ({"hidden_act": 5}, "hidden_act"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ({"to_dict": 5}, "to_dict: expected a field of LlamaConfig, got the name of a method"),
    ({"get_text_config": {}}, "get_text_config: expected a field of LlamaConfig"),
    ({"pad_token_id": 2**63},
     "pad_token_id: expected an integer of 64 bits, got 9223372036854775808"),
    ({"dtype": "silly"}, "expected a valid llama config"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "expected a"),
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures: expected a class for"),
    ({"model_type": "\ud800"}, "model_type: expected a model transformers knows"),
    ({"model_type": "x" * 10**5}, "model_type: expected a model transformers knows"),
    ({"text_config": {"hidden_size": "x"}}, "expected a LlamaForCausalLM's config"),
    ({"return_dict": False}, None),
])  # fmt: skip
def test_values_of_the_wrong_kind(
    changes: dict[str, Any], message: str | None, directory: Path
) -> None:
    """If the model loads, it computes; otherwise the error names the file."""
    change(directory, changes)
    if message is None:
        assert torch.isfinite(qk.load_model(directory)(ids(4)[None]).logits).all()
        return
    with pytest.raises(ValueError, match=f"config.json: .*{message}") as caught:
        qk.load_model(directory)
    str(caught.value).encode()
    assert len(str(caught.value)) < 2000


def test_nested_configs_are_checked_by_their_own_class() -> None:
    from transformers import LlavaConfig

    values = {"text_config": {"model_type": "llama", "sliding_window": "silu"}}
    with pytest.raises(ValueError, match="sliding_window: expected int or null, got 'silu'"):
        check_fields(Path("config.json"), LlavaConfig, values)


def test_tokenizer_files_of_garbage(directory: Path) -> None:
    generator = random.Random(0)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        good = path.read_bytes() if path.exists() else b"{}"
        whole = json.loads(good)
        samples = [b"", b"[]", b"\xff\xfe", b"5", good[: len(good) // 2], b"{}"]
        for key in list(whole)[:12]:
            samples += [
                json.dumps({**whole, key: value}).encode() for value in (5, "x", [[]], {"a": 5})
            ]
        for data in generator.sample(samples, min(len(samples), 20)):
            path.write_bytes(data)
            said = said_by(lambda: load_tokenizer(directory))
            assert said is None or str(directory) in said
        path.write_bytes(good)
    assert load_tokenizer(directory) is not None


def test_errors_naming_file_lets_pass_what_no_file_causes() -> None:
    path = Path("here.json")
    for error in (
        KeyError("x"),
        OSError("x"),
        RecursionError("x"),
        AssertionError(),
        ImportError("x"),
        ValueError("x"),
    ):
        with (
            pytest.raises(ValueError, match="^here.json: expected a thing, got: "),
            files.errors_naming_file(path, "a thing"),
        ):
            raise error
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(ValueError, match="got: PanicException: x"),
        files.errors_naming_file(path, "a thing"),
    ):
        raise panic("x")
    with (
        pytest.raises(ValueError, match="^here.json: y: z$"),
        files.errors_naming_file(path, "a thing"),
    ):
        raise ValueError("here.json: y: z")
    for passing in (MemoryError, KeyboardInterrupt, SystemExit):
        with pytest.raises(passing), files.errors_naming_file(path, "a thing"):
            raise passing
