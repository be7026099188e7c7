"""Small files of a model directory that would cost much memory or time, block, or choose the code that runs."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import socket
import string
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels as qk
from qkernels.checkpoints import files, load_tokenizer, patterns
from qkernels.checkpoints.config_checks import check_fields, check_values, without_implementations
from qkernels.checkpoints.quantization import Plan
from qkernels.checkpoints.tensor_files import INDEX, TensorFiles, read_header

from ..tiny import ids, save_tiny, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("saved") / "m"
    save_tiny(path)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def directory(saved: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "m"
    path.mkdir()
    for name, data in saved.items():
        (path / name).write_bytes(data)
    return path


def _change(directory: Path, changes: dict[str, Any], name: str = "config.json") -> None:
    path = directory / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **changes}))


@contextmanager
def _quick(seconds: float) -> Iterator[None]:
    """What is inside takes at most so much of this thread's time."""
    begin = time.thread_time()
    yield
    assert time.thread_time() - begin < seconds


def _error(call: Callable[[], object]) -> str | None:
    """What the ValueError says that a call raises, if it does; others go on."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


# ---------------------------------------------------------------------- config.json: memory and time
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
    ({"num_hidden_layers": 131_072}, "num_hidden_layers: expected at most 20, as the files hold 20 tensors"),
    ({"text_config": {"num_hidden_layers": 10**8}}, r"text_config.num_hidden_layers: expected a number"),
    ({"a": {"b": [{"depths": [1, 10**9]}]}}, r"a.b.depths: expected a number of at most 131072"),
    ({"id2label": {str(i): "x" for i in range(300_000)}}, "expected at most 262144 items in all"),
    ({"anything": [0] * 300_000}, "anything: expected at most 262144 items in all"),
    ({"": [[]] * 300_000}, "expected at most 262144 items in all"),
    ({**_GPT_NEO, "max_position_embeddings": 10**6}, "buffers of at most 2147483648 bytes, got 2000000000000"),
    ({**_BERT, "max_position_embeddings": 10**9}, "buffers of at most .* largest is bert.embeddings.position_ids"),
    ({"num_labels": 131_072}, "loaded"),
    ({"max_position_embeddings": 10**9, "rope_theta": 10**9, "eos_token_id": 250_000}, "loaded"),
]  # fmt: skip


def test_numbers_and_lengths_in_a_config_cost_nothing(directory: Path, tmp_path: Path) -> None:
    """In a process of its own, whose peak is measured after each: the most is 131,072 labels' two dictionaries."""
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
    free = [key for key in numbers if _error(lambda key=key: check_values(Path("x"), {key: 10**7})) is None]
    return random.Random(kind.__name__).choice(free) if free else None


def test_real_configs_pass() -> None:
    """The defaults of every model type of transformers, and what large models say.

    What is let through whatever its size must cost a config class nothing. (All 10,015 fields of all classes were
    tried once, with 1,000,000; here it is one of each.)
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
            with _quick(0.4), suppress(Exception):  # a list of 10 million takes longer
                kind(**{free: 10**7})
    assert checked > 200
    check_values(path, {
        "vocab_size": 256_000, "max_position_embeddings": 10_485_760, "eos_token_id": [200_001, 200_008],
        "rope_scaling": {"original_max_position_embeddings": 1_048_576, "factor": 8.0}, "rope_theta": 1_000_000_000,
        "num_labels": 21_843, "id2label": {str(i): f"LABEL_{i}" for i in range(21_843)}, "sliding_window": 131_072,
        "label2id": {f"LABEL_{i}": i for i in range(21_843)}, "model_max_length": 10**30, "n_positions": 1_048_576,
        "num_experts": 512, "rms_norm_eps": 1e-6, "seed": 2**62, "num_params": 671_000_000_000,
    })  # fmt: skip


def test_depth_of_json(directory: Path) -> None:
    deep: Any = 0
    for _ in range(500):
        deep = [deep]
    for changes in ({"x": deep}, {"quantization_config": {"quant_method": "gptq", "bits": deep}}):
        _change(directory, changes)
        with pytest.raises(ValueError, match="config.json: expected JSON of a depth of at most 32, got more"):
            qk.load_model(directory)


def test_the_tokenizer_s_door_checks_the_config_too(directory: Path) -> None:
    _change(directory, {"num_labels": 10**30})
    with pytest.raises(ValueError, match="config.json: num_labels: expected a number of at most 131072"):
        load_tokenizer(directory)


# ---------------------------------------------------------------------- code that a file chooses
@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were looked up."""
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
def test_repositories_of_kernels_are_refused(key: str, where: str, directory: Path, hosts: list[str]) -> None:
    for name in ("kernels-community/flash-attn2", "evil/kernel@v1:f", "paged|evil/kernel"):
        _change(directory, {
            "outside": {key: name}, "text_config": {"text_config": {key: name}},
            "in a list": {"parts": [{key: name}]}, "by parts": {key: {"": "sdpa", "text_config": name}},
        }[where])  # fmt: skip
        with pytest.raises(ValueError, match=f"config.json: {key}: expected none, .* got the repository"):
            qk.load_model(directory)
    assert hosts == []


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "eager", "no such", 5])
def test_plain_names_of_implementations_do_not_count(name: Any, directory: Path, hosts: list[str]) -> None:
    expected = qk.load_model(directory).config
    _change(
        directory, {"attn_implementation": name, "_attn_implementation": name, "experts_implementation": name}
    )
    loaded = qk.load_model(directory)
    assert loaded.config._attn_implementation == expected._attn_implementation
    assert torch.isfinite(loaded(ids(4)[None]).logits).all()
    assert hosts == []


def test_repositories_of_backbones_are_refused(directory: Path, hosts: list[str]) -> None:
    _change(
        directory,
        {"model_type": "dpt", "architectures": ["DPTForDepthEstimation"], "backbone": "evil/backbone"},
    )
    for load in (qk.load_model, load_tokenizer):
        with pytest.raises(ValueError, match="config.json: backbone: .* got the repository 'evil/backbone'"):
            load(directory)
    assert hosts == []


# ---------------------------------------------------------------------- errors that name the file
_GARBAGE: list[Any] = [
    {"max_length": "x"}, {"eos_token_id": {}}, {"num_beams": {}}, {"watermarking_config": 5}, {"cache_config": 5},
    {"transformers_version": {}}, {"compile_config": "x"}, {"num_beams": [1]}, {"do_sample": []}, {"to_dict": 5},
    {"temperature": "hot"}, {"constraints": 3}, {"quantization_config": 5}, {"suppress_tokens": 5}, {"": 5},
    {"validate": 1}, {"update": 2}, {"\ud800": "\ud800"}, {"num_return_sequences": 10**40}, {"top_k": -5},
]  # fmt: skip


@pytest.mark.parametrize("garbage", _GARBAGE, ids=range(len(_GARBAGE)))
def test_generation_configs(garbage: dict[str, Any], directory: Path) -> None:
    _change(directory, garbage, "generation_config.json")
    said = _error(lambda: qk.load_model(directory))
    assert said is None or said.startswith(f"{directory / 'generation_config.json'}: ")


@pytest.mark.parametrize("text", [b"[]", b"\xff", b"{", b"5", b""])
def test_generation_configs_that_are_none(text: bytes, directory: Path) -> None:
    (directory / "generation_config.json").write_bytes(text)
    with pytest.raises(ValueError, match="generation_config.json: expected (a )?JSON"):
        qk.load_model(directory)


@pytest.mark.parametrize("name", ["a" * 300, "\0", "\ud800", "a\0b", "x" * 5000])
def test_indexes_that_name_what_no_file_is_called(name: str, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": f"{name}.safetensors"}}))
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
    ({"pad_token_id": 2**63}, "pad_token_id: expected an integer of 64 bits, got 9223372036854775808"),
    ({"dtype": "silly"}, "expected a valid llama config"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "expected a"),
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures: expected a class for"),
    ({"model_type": "\ud800"}, "model_type: expected a model transformers knows"),
    ({"model_type": "x" * 10**5}, "model_type: expected a model transformers knows"),
    ({"text_config": {"hidden_size": "x"}}, "expected a LlamaForCausalLM's config"),
    ({"return_dict": False}, None),
])  # fmt: skip
def test_values_of_the_wrong_kind(changes: dict[str, Any], message: str | None, directory: Path) -> None:
    """What loads computes; what would not is refused, and the error names the file."""
    _change(directory, changes)
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
            samples += [json.dumps({**whole, key: value}).encode() for value in (5, "x", [[]], {"a": 5})]
        for data in generator.sample(samples, min(len(samples), 20)):
            path.write_bytes(data)
            said = _error(lambda: load_tokenizer(directory))
            assert said is None or str(directory) in said
        path.write_bytes(good)
    assert load_tokenizer(directory) is not None


def test_told_by_lets_pass_what_no_file_causes() -> None:
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
            files.told_by(path, "a thing"),
        ):
            raise error
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ValueError, match="got: PanicException: x"), files.told_by(path, "a thing"):
        raise panic("x")
    with pytest.raises(ValueError, match="^here.json: y: z$"), files.told_by(path, "a thing"):
        raise ValueError("here.json: y: z")
    for passing in (MemoryError, KeyboardInterrupt, SystemExit):
        with pytest.raises(passing), files.told_by(path, "a thing"):
            raise passing


# ---------------------------------------------------------------------- files that are none
_FILES = ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          INDEX, "quantize_config.json", "quant_config.json", "chat_template.jinja",
          "additional_chat_templates/x.jinja")  # fmt: skip


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a directory", "a socket"])
@pytest.mark.parametrize("name", _FILES)
def test_what_is_no_regular_file(
    name: str, kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if name == INDEX:
        (directory / "model.safetensors").unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a directory":
        path.mkdir()
    else:
        monkeypatch.chdir(path.parent)  # a socket's path is short
        server = socket.socket(socket.AF_UNIX)
        server.bind(path.name)
        server.close()
    load = load_tokenizer if "token" in name or "template" in name else qk.load_model
    with _quick(20), pytest.raises(ValueError, match=f"{path.name}: expected a regular file, got {kind}"):
        load(directory)


@pytest.mark.parametrize("load", [qk.load_model, load_tokenizer])
def test_gguf_files_that_are_none(load: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    (tmp_path / "folder.gguf").mkdir()
    for name in ("fifo.gguf", "device.gguf", "folder.gguf"):
        with _quick(2), pytest.raises(ValueError, match=f"{name}: expected"):
            load(tmp_path / name)


def test_links_to_regular_files_work(directory: Path, tmp_path: Path) -> None:
    """As in Hugging Face's cache."""
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for i, file in enumerate(directory.iterdir()):
        (cache / file.name).symlink_to(os.path.relpath(file, cache))
        assert i < 20
    expected = qk.load_model(directory)(ids(4)[None]).logits
    assert torch.equal(qk.load_model(cache)(ids(4)[None]).logits, expected)
    assert load_tokenizer(cache).vocab_size == load_tokenizer(directory).vocab_size


def test_a_file_is_read_to_its_limit_whatever_its_size_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grows.json"
    path.write_bytes(b"x" * 1000)
    real = os.fstat

    def small(descriptor: int) -> os.stat_result:
        values = list(real(descriptor))
        values[6] = 0  # as /proc has it
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", small)
    with pytest.raises(ValueError, match="grows.json: expected at most 100 bytes of JSON, got 101"):
        files.read_bytes(path, 100)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    loop = tmp_path / "config.json"
    loop.symlink_to(loop)
    with pytest.raises(ValueError, match="config.json: expected a file that can be read, got: "):
        files.read_json(loop)
    with pytest.raises(FileNotFoundError, match="expected a file none.json, found none"):
        files.read_json(tmp_path / "none.json")


# ---------------------------------------------------------------------- headers
def _safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_duplicate_keys_take_no_time(tmp_path: Path) -> None:
    header = "{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":0}'
    with (
        _quick(2),
        pytest.raises(ValueError, match="x.safetensors: header: expected JSON, .*'99999' is there twice"),
    ):
        read_header(_safetensors(tmp_path / "x.safetensors", header.encode()))


@pytest.mark.parametrize("count", [65, 400_000])
def test_shapes_of_many_dimensions(count: int, tmp_path: Path) -> None:
    header = '{"a":{"dtype":"U8","shape":[' + ",".join(["9"] * count) + '],"data_offsets":[0,0]}}'
    expected = f"x.safetensors: tensor 'a': shape: expected at most 64 dimensions, got {count}"
    with _quick(1), pytest.raises(ValueError, match=expected):
        read_header(_safetensors(tmp_path / "x.safetensors", header.encode()))


@pytest.mark.parametrize("entry", [
    {"dtype": "U8", "shape": [10**4000, 10**4000], "data_offsets": [0, 1]},
    {"dtype": "U8", "shape": [2**63], "data_offsets": [0, 1]},
    {"dtype": "U8", "shape": [1], "data_offsets": [0, 10**4000]},
    {"dtype": "U8", "shape": [2**62] * 64, "data_offsets": [0, 1]},
])  # fmt: skip
def test_sizes_beyond_any_file(entry: dict[str, Any], tmp_path: Path) -> None:
    """Numbers of more digits than Python prints are named with the file, too."""
    path = _safetensors(tmp_path / "x.safetensors", json.dumps({"t" * 500: entry}).encode(), b"1")
    with pytest.raises(ValueError, match="x.safetensors: tensor 'ttt.*expected") as caught:
        read_header(path)
    assert len(str(caught.value)) < 4000


def test_names_of_many_components(directory: Path) -> None:
    """Whose a tensor is, is looked up dot by dot."""
    for name in ("." * 501, "model." * 10_000_000):
        header = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
        _safetensors(directory / "model.safetensors", header)
        expected = (
            f"model.safetensors: tensor '.*: expected a name of at most 500 characters, got {len(name)}"
        )
        with _quick(2), pytest.raises(ValueError, match=expected):
            qk.load_model(directory)


@pytest.mark.parametrize("item", ["{}", "[]", "0", '{"":{}}', '""'])
def test_headers_of_many_items(item: str, tmp_path: Path) -> None:
    header = ('{"a":[' + ",".join([item] * 3_000_000) + "]}").encode()
    with _quick(1), pytest.raises(ValueError, match="header: expected JSON of at most 2000000 items, got"):
        read_header(_safetensors(tmp_path / "x.safetensors", header))


def test_real_headers_are_far_below(tmp_path: Path) -> None:
    """100,000 tensors in one file."""
    entry = '"model.layers.{0}.mlp.experts.{0}.w.weight_packed":{{"dtype":"I32","shape":[0,8],"data_offsets":[0,0]}}'
    header = "{" + ",".join(entry.format(i) for i in range(100_000)) + "}"
    assert len(read_header(_safetensors(tmp_path / "x.safetensors", header.encode()))) == 100_000


def test_more_tensors_than_a_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkernels.checkpoints.tensor_files._MAX_TENSORS", 3)
    entry = '"{}":{{"dtype":"I32","shape":[0],"data_offsets":[0,0]}}'
    shards = [
        _safetensors(tmp_path / f"{s}.safetensors", ("{" + ",".join(entry.format(f"{s}{i}") for i in range(2)) + "}").encode())
        for s in "ab"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="b.safetensors: expected at most 3 tensors in all"):
        TensorFiles(shards)


# ---------------------------------------------------------------------- files that change
def test_a_file_that_changes_while_it_is_loaded(directory: Path) -> None:
    path = directory / "model.safetensors"
    good = path.read_bytes()
    with TensorFiles(directory) as open_files:
        open_files.read("model.norm.weight")
        os.truncate(path, len(good) // 2)
        with pytest.raises(
            ValueError, match="model.safetensors: expected the file whose header was read, got one changed"
        ):
            open_files.read("model.norm.weight")
    path.write_bytes(good)
    with TensorFiles(directory) as open_files:
        os.replace(_copy(path, good), path)  # another save: half of each would be no model
        with pytest.raises(ValueError, match="expected the file whose header was read"):
            open_files.read("model.norm.weight")
    with TensorFiles(directory) as open_files:
        path.unlink()
        with pytest.raises(ValueError, match="expected the file whose header was read"):
            open_files.read("model.norm.weight")


def _copy(path: Path, data: bytes) -> Path:
    other = path.with_suffix(".new")
    other.write_bytes(data)
    return other


def test_a_model_outlives_a_save_over_its_files(directory: Path) -> None:
    """Its tensors are mapped; a save puts a new file in the place and leaves the old one to who has it open."""
    model = qk.load_model(directory)
    before = model(ids(8)[None]).logits
    qk.save_model(tiny_model(seed=5), directory)
    assert torch.equal(model(ids(8)[None]).logits, before)
    assert not torch.equal(qk.load_model(directory)(ids(8)[None]).logits, before)


def test_a_copy_of_a_model_does_not_need_its_file(directory: Path) -> None:
    loaded = qk.load_model(directory)
    copied, before = copy.deepcopy(loaded), loaded(ids(8)[None]).logits
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-20_000, os.SEEK_END)
        file.write(bytes(20_000))
    assert torch.equal(copied(ids(8)[None]).logits, before)
    assert not torch.equal(loaded(ids(8)[None]).logits, before)  # as load_model says


# ---------------------------------------------------------------------- patterns
_NAME = "model.layers.11.self_attn.q_proj"
#: the first is one that `regex` sees through and `re` does not
_ENDLESS = ["(?:[a-z0-9_.]+)+!", r"(?:\w|[a-z]|\.)+[!?]", r"(?:.|[a-z])+(?=x).", r"(?:(\w|[a-z]|.)+)+(?<!.)"]


def _with(field: str, pattern: str) -> dict[str, Any]:
    if field == "dynamic":
        return {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {f"-:{pattern}": {}}}
    if field == "modules_to_not_convert":
        return {"quant_method": "gptq", "bits": 4, "group_size": 32, field: [pattern]}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True,
                                                "strategy": "group", "group_size": 32}}  # fmt: skip
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}
    if field == "ignore":
        return {**config, "ignore": [f"re:{pattern}"]}
    return {**config, "config_groups": {"g": {**group, "targets": [f"re:{pattern}"]}}}


@pytest.mark.parametrize("field", ["ignore", "config_groups.g.targets", "dynamic", "modules_to_not_convert"])
@pytest.mark.parametrize("pattern", _ENDLESS, ids=range(len(_ENDLESS)))
def test_patterns_that_backtrack(field: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All names of a model together take at most the limit; the error names field and pattern."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    monkeypatch.setattr(patterns.Patterns.__init__, "__defaults__", (0.2,))
    plan = Plan("here", _with(field, pattern))

    def all_names() -> None:
        for layer in range(2000):
            plan.scheme(_NAME.replace("11", str(layer)) + ".a" * 30)

    with _quick(1.5):
        said = _error(all_names)
    expected = (
        rf"here: quantization_config.{field}: expected patterns that take at most 0.2 s in all, got more at '"
    )
    assert said is None or re.match(expected, said)
    assert said is not None or pattern == _ENDLESS[0]


def test_a_model_s_patterns_that_backtrack(tmp_path: Path) -> None:
    path = tmp_path / "m"
    qk.save_model(qk.quantize_model(tiny_model(), "gptq", group_size=32, progress=False), path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {f"-:{_ENDLESS[3]}": {}}
    (path / "config.json").write_text(json.dumps(config))
    expected = "config.json: quantization_config.dynamic: expected patterns that take at most 2 s"
    with _quick(5), pytest.raises(ValueError, match=expected):
        qk.load_model(path)


@pytest.mark.parametrize("pattern", [
    "((a{1000}){1000}){1000}", "(((((a{100}){100}){100}){100}){100}){100}", "(?:[ab][cd]){1000000000}", "(" * 100 + "a" + "){9}" * 100,
    "[a-z]{65535}" * 70, "a{,99999999999999999999}",
])  # fmt: skip
def test_patterns_that_are_huge_once_compiled(pattern: str) -> None:
    with (
        _quick(1),
        pytest.raises(
            ValueError, match="here: quantization_config.dynamic: expected counts of at most 20000"
        ),
    ):
        Plan("here", _with("dynamic", pattern))


@pytest.mark.parametrize("pattern", ["a{e<=1}", "(?:foo){i}", "[[:alpha:]]", "x{"])
def test_patterns_that_re_and_regex_read_otherwise(pattern: str) -> None:
    with pytest.raises(ValueError, match="expected no braces but counts and no"):
        Plan("here", _with("dynamic", pattern))


_PIECES = [r"model", r"layers", r"\.", ".", r"\d", r"\d+", r"[0-9]+", ".*", ".+?", "(?!.*mlp)", "(?=.*q_proj)", "(?:q|k|v)_proj",
           "(self_attn|mlp)", "$", "^", r"\b", "[^.]*", "(?<=layers.)", "(?<!x)", r"(\w+)", r"\1", "{1,2}", "?", "*", "+",
           "{2}", "|", "_proj", "1[0-5]", "(?P<n>1)", "(?P=n)", "(?i:MLP)", r"\w+", r"\Z", r"\S"]  # fmt: skip
_NAMES = [
    f"model.layers.{i}.{m}"
    for i in (0, 1, 11, 111)
    for m in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.up_proj",
        "mlp.gate",
        "block_sparse_moe.experts.3.w1",
        "input_layernorm",
    )
]
_NAMES += ["lm_head", "model.embed_tokens", "model", ""]


def test_regex_agrees_with_re() -> None:
    """Random patterns of what is in use, and GPTQModel's own examples."""
    generator = random.Random(1)
    texts = [
        r"-:.*\.mlp\.(?!down).*"[2:],
        r"^model\.layers\.\d+\.mlp$",
        r"(?!.*(?:mlp|attn)).*",
        r".*(?:(?<!gate)_proj)$",
    ]
    texts += ["".join(generator.choices(_PIECES, k=generator.randint(1, 6))) for _ in range(3000)]
    compared = 0
    for text in texts:
        try:
            judge = re.compile(text)
        except re.error:
            with pytest.raises(ValueError, match="expected"):
                patterns.Patterns().compile("f", text)
            continue
        ours = patterns.Patterns().compile("f", text)
        assert [ours.match(name) for name in _NAMES] == [judge.match(name) is not None for name in _NAMES], (
            text
        )
        compared += 1
    assert compared > 500


def test_lists_agree_with_transformers_s_matcher() -> None:
    """Names and patterns in skip lists, literal dots, wildcards and ends, against their function."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    generator = random.Random(2)
    pieces = ["model", ".", "layers", "1", "11", "mlp", "_", "up_proj", "proj", "lm_head", "q", "experts.3"]
    names = [name for name in _NAMES if name] + ["modelXlayers.1.mlp", "model.layers.1"]
    for _ in range(300):
        count = generator.randint(1, 4)
        entries = ["".join(generator.choices(pieces, k=generator.randint(1, 5))) for _ in range(count)]
        skipped = patterns.Skipped(patterns.Patterns(), "f", entries)
        assert [not skipped(name) for name in names] == [should_convert_module(n, entries) for n in names], (
            entries
        )


def test_long_lists_of_names_are_quick() -> None:
    """18,000 modules, half of them left alone: a mixture of which only some experts are packed."""
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{w}_proj"
        for i in range(60)
        for e in range(100)
        for w in ("up", "gate", "down")
    ]
    half = names[::2]
    for config in (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "modules_to_not_convert": half},
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "dynamic": {f"-:^{re.escape(n)}$": {} for n in half},
        },
        {**_with("ignore", "x"), "ignore": half},
    ):
        with _quick(10):
            plan = Plan("here", config)
            assert [plan.scheme(name) is None for name in names] == [i % 2 == 0 for i in range(len(names))]


def test_rules_keep_their_order() -> None:
    """An exact name behind a pattern that fits does not come first, and the other way round."""
    rules = patterns.Rules(patterns.Patterns())
    for place, text in enumerate([r".*\.1\..*", r"^a\.1\.b$", r"^a\.2\.b$", r".*\.2\..*"]):
        rules.add_pattern("f", text, place)
    assert [rules.first(name) for name in ("a.1.b", "a.2.b", "x.2.y", "x")] == [0, 2, 3, None]
    letters = string.ascii_lowercase
    assert all(patterns._literal(f"^{re.escape(c)}x$") == f"{c}x" for c in letters + "._-+*")
