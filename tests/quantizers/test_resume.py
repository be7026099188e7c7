"""Resuming: the same job ends with the same bits; another job or a damaged file is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import qkernels as qk
from qkernels.checkpoints import atomic
from qkernels.quantizers import digest, driver

from ..tiny import ids, tiny_model

#: changes norms, and quickly
JOB = {"format": "w8a8"}


def model(**changes: object) -> nn.Module:
    return tiny_model(
        **{"num_key_value_heads": 4, "attention_bias": True, "num_hidden_layers": 2, **changes}
    )


def data() -> Tensor:
    return ids(96).view(3, 32)


def run(folder: Path | None, of: nn.Module | None = None, **changes: Any) -> nn.Module:
    arguments = {"calibration": data(), "progress": False, **JOB, **changes}
    return qk.quantize_model(model() if of is None else of, resume=folder, **arguments)


def bits(of: nn.Module) -> dict[str, Tensor]:
    tensors = {**of.state_dict(), **dict(of.named_buffers(remove_duplicate=False))}
    return {name: tensor.contiguous().view(torch.uint8) for name, tensor in tensors.items()}


def test_configs_with_any_keys() -> None:
    """Keys may be integers and tuples; versions of transformers do not count."""
    one = digest.as_json({1: {"a": 2, "transformers_version": "5.1"}, "b": (1, 2), (3, 4): None})
    assert one == digest.as_json(
        {1: {"a": 2, "transformers_version": "5.2"}, "b": [1, 2], (3, 4): None}
    )
    assert one != digest.as_json({1: {"a": 3}, "b": [1, 2], (3, 4): None})


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = bits(one), bits(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "r"
    run(folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """The folder of a job whose blocks are all finished, for a test to damage."""
    return Path(shutil.copytree(finished, tmp_path / "r"))


def test_finished_blocks_are_taken_as_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkernels.quantizers.algorithms import SmoothQuant

    whole = run(None)
    monkeypatch.setattr(SmoothQuant, "run", None)
    assert_same(run(folder), whole)


# ---------------------------------------------------------------------- kill -9
@pytest.mark.parametrize(
    "job",
    [{"format": "awq", "group_size": 32}, {"format": "gptq", "group_size": 32, "act_order": True}],
    ids=str,
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, job: dict[str, object]) -> None:
    """The process is killed at a random moment after each block, by a signal it cannot catch."""
    folder, threads = tmp_path / "r", torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        whole = run(None, model(num_hidden_layers=4), **job)
        for finished in range(4):
            child = os.fork()
            if child == 0:
                try:
                    run(folder, model(num_hidden_layers=4), **job)
                finally:
                    os._exit(0)
            end = time.monotonic() + 60
            while (
                len(list(folder.glob("block-?.safetensors"))) < finished and time.monotonic() < end
            ):
                time.sleep(0.001)
            time.sleep(random.random() * 0.05)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert len(list(folder.glob("block-?.safetensors"))) >= finished, (
                "the child did nothing"
            )
        assert_same(run(folder, model(num_hidden_layers=4), **job), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_manifest_that_was_not_written_to_its_end_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / f"{atomic.PREFIX}123").mkdir()
    run(tmp_path)
    (tmp_path / "novel.txt").write_text("x")
    run(tmp_path)
    (tmp_path / "resume.json").unlink()
    with pytest.raises(
        ValueError, match="resume: expected an empty directory or one of an earlier run"
    ):
        run(tmp_path)


# ---------------------------------------------------------------------- another job
def changed(name: str, at: int = -1) -> nn.Module:
    """A copy of the model with the last bit of one value of one parameter flipped."""
    of = model()
    flat = of.get_parameter(name).data.view(torch.int32).view(-1)
    flat[at] ^= 1
    return of


def with_buffer() -> nn.Module:
    of = model()
    of.model.rotary_emb.inv_freq[-1] *= 1.5
    return of


def with_config() -> nn.Module:
    of = model()
    of.config.rms_norm_eps *= 2
    return of


def with_module() -> nn.Module:
    of = model()
    of.model.layers[1].mlp.act_fn = nn.Tanh()
    return of


def with_epsilon() -> nn.Module:
    of = model()
    of.model.layers[1].input_layernorm.variance_epsilon *= 2
    return of


PARAMETERS = [name for name, _ in model().named_parameters()]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_bit_of_any_parameter_makes_another_job(folder: Path, name: str) -> None:
    for at in (0, -1):
        with pytest.raises(
            ValueError, match=r"resume: expected finished blocks of the same job .* but model was '"
        ):
            run(folder, changed(name, at))


@pytest.mark.parametrize(
    ("of", "changes", "field"),
    [
        (with_buffer, {}, "model"),
        (with_config, {}, "model"),
        (with_module, {}, "model"),
        (with_epsilon, {}, "model"),
        (lambda: model().bfloat16(), {}, "model"),
        (lambda: model(tie_word_embeddings=False), {}, "model"),
        (model, {"calibration": ids(96, seed=1).view(3, 32)}, "calibration"),
        (model, {"calibration": data()[:2]}, "calibration"),
        (model, {"calibration": data().view(2, 48)}, "calibration"),
        (model, {"calibration": data().flip(0)}, "calibration"),
        (model, {"granularity": "tensor"}, "params"),
        (model, {"activation": "static"}, "params"),
        (model, {"alpha": 0.6}, "settings"),
        (model, {"algorithm": "ranges"}, "algorithm"),
        (model, {"format": "int8"}, "format"),
        (model, {"skip": "*.layers.1.*o_proj"}, "layers"),
    ],
)  # fmt: skip
def test_whatever_else_can_change_a_result_makes_another_job(
    folder: Path, of: Any, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"of the same job in .* but {field} was .* there and is .* now"
    ):
        run(folder, of(), **changes)


def test_another_version_of_this_library_makes_another_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "__version__", "0.0.7")
    with pytest.raises(
        ValueError, match=r"but version was '.*' there and is '0\.0\.7, files 2' now"
    ):
        run(folder)


def test_where_a_model_came_from_makes_no_other_job(folder: Path) -> None:
    of = model()
    of.config._name_or_path, of.config.transformers_version = "elsewhere", "0"
    run(folder, of)


def test_a_digest_covers_values_dtypes_shapes_names_and_who_is_tied() -> None:
    x, y = torch.arange(6.0), torch.ones(6)
    several = [
        [("a", x)], [("b", x)], [("a", x.view(2, 3))], [("a", x.half())],
        [("a", x.view(torch.int32))],
        [("a", x), ("b", x)], [("a", x), ("b", x.clone())],
        [("a", x), ("b", y), ("c", x)], [("a", x), ("b", y), ("c", y)], [("a", -x)],
        [("a", x[:5])], [],
        [("a", torch.tensor(0.0))], [("a", torch.zeros(1))], [("a", torch.zeros(0))],
        [("a", torch.zeros(0, 2))],
    ]  # fmt: skip
    assert len({digest.of_tensors(tensors) for tensors in several}) == len(several)
    wide = torch.randn(64, 64)
    assert digest.of_tensors([("a", wide.T)]) == digest.of_tensors([("a", wide.T.contiguous())])
    assert digest.of_tensors([("a", wide[:, ::2])]) == digest.of_tensors(
        [("a", wide[:, ::2].clone())]
    )
    with pytest.raises(
        ValueError, match="a: expected a tensor with its data in memory, got the meta device"
    ):
        digest.of_tensors([("a", torch.empty(2, device="meta"))])
    with pytest.raises(ValueError, match="got layout torch.sparse_coo"):
        digest.of_tensors([("a", torch.eye(3).to_sparse())])


def test_a_tensor_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.randn(37, 11)
    whole = digest.of_tensors([("a", wide)])
    for size in (1, 44, 100, 500):
        monkeypatch.setattr(digest, "_CHUNK", size)
        assert digest.of_tensors([("a", wide)]) == whole


# ---------------------------------------------------------------------- damaged files
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "{}", '{"format": "awq"}', "\x00\xff"]
)
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    (folder / "resume.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        ValueError, match=r"resume.json: expected JSON|resume: expected finished blocks of the"
    ):
        run(folder)


def test_a_folder_for_a_manifest(folder: Path) -> None:
    (folder / "resume.json").unlink()
    (folder / "resume.json").mkdir()
    with pytest.raises(ValueError, match=r"resume.json: expected JSON"):
        run(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 5000, -1])
def test_a_block_that_is_cut_off(folder: Path, size: int) -> None:
    file = folder / "block-1.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    before = model()
    with pytest.raises(
        ValueError, match=r"block-1\.safetensors: expected a finished block, got .*; delete it"
    ):
        run(folder, before)
    file.unlink()
    run(folder)


NORM, CODES = "plain.input_layernorm.weight", "packed.mlp.up_proj/weight"


def widened(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors[NORM] = tensors[NORM][:1].clone()  # which copy_ would spread


def renamed(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors[NORM + "s"] = tensors.pop(NORM)


def retyped(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors[NORM] = tensors[NORM].double()


def recoded(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors[CODES] = tensors[CODES][:, :-1].contiguous()


def uncoded(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    del tensors[CODES]


def more_coded(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors["packed.mlp.up_proj/more"] = torch.zeros(1)


def one_more(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    tensors["stranger"] = torch.zeros(1)


def another_job(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    said["job"] = "0" * 64


def no_job(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    del said["job"]


def no_params(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    del said["params"]


def listed_params(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    said["params"] = json.dumps(list(json.loads(said["params"])))


def fewer_params(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    params = json.loads(said["params"])
    del params["mlp.up_proj"]
    said["params"] = json.dumps(params)


def other_params(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    said["params"] = said["params"].replace('"channel"', '"tensor"')


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (widened, rf"{NORM}: expected torch.float32 \(64,\), got torch.float32 \(1,\)"),
        (renamed, rf"{NORM}: expected the block's own tensors, got none"),
        (retyped, rf"{NORM}: expected torch.float32 \(64,\), got torch.float64 \(64,\)"),
        (recoded, r"mlp.up_proj: w8a8: weight: expected shape .*, got"),
        (uncoded, r"mlp.up_proj: w8a8: weight: expected"),
        (more_coded, r"mlp.up_proj: w8a8: .*more"),
        (one_more, r"stranger: expected the block's own tensors, got one that the block has not"),
        (another_job, r"one of another job: expected [0-9a-f]{64}, got 0{64}"),
        (no_job, r"one of another job: expected [0-9a-f]{64}, got none"),
        (no_params, "params: expected an object of objects, got None"),
        (listed_params, r"params: expected an object of objects, got \['"),
        (fewer_params, r"layers \[.*\], expected \[.*'mlp.up_proj'"),
        (other_params, r"self_attn.q_proj: w8a8: weight_scale: expected shape"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_block_that_is_not_what_it_should_be(folder: Path, harm: Any, message: str) -> None:
    file = folder / "block-1.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        said = opened.metadata()
    harm(tensors, said)
    save_file(tensors, file, said)
    with pytest.raises(
        ValueError, match=rf"block-1\.safetensors: expected a finished block, got {message}"
    ):
        run(folder)


def test_a_block_in_another_s_place(folder: Path) -> None:
    shutil.copy(folder / "block-0.safetensors", folder / "block-1.safetensors")
    with pytest.raises(
        ValueError, match=r"block-1.*got one of another block: expected 1, got 0; delete it"
    ):
        run(folder)
