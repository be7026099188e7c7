"""Loading maps files and holds one shard at a time, by the kernel's count of resident memory."""

from __future__ import annotations

import ctypes
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qkernels as qk
from qkernels.checkpoints import tensor_files
from qkernels.checkpoints.hf import reader as huggingface

from ..tiny import ids, save_tiny, tiny_model

SHARD = 2_500_000


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 MB of int8 in shards of 2.5 MB, 2 MB of it float32 embeddings."""
    model = tiny_model(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=5, vocab_size=1000
    )
    qk.quantize_model(model, "w8a8", progress=False)
    path = tmp_path_factory.mktemp("sharded") / "m"
    huggingface.save(model, path, max_shard_bytes=SHARD)
    return path


def _held(reset: bool = False) -> dict[str, int]:
    """(VmRSS of this process, its peak since the last reset), in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")}


def test_peak_memory_is_the_model_and_one_shard(sharded: Path) -> None:
    """dtype converts the embeddings, so mapped and copied tensors exist side by side."""
    shards = list(sharded.glob("*.safetensors"))
    total = sum(f.stat().st_size for f in shards)
    largest = max(f.stat().st_size for f in shards)
    assert len(shards) >= 6
    huggingface.load(sharded)  # code that loads lazily is in memory from here on
    gc.collect()
    # what is free must not be counted as held
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    try:
        before = _held(reset=True)["VmRSS"]
    except OSError as error:
        pytest.skip(f"the kernel does not reset VmHWM: {error}")
    model = huggingface.load(sharded, dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:  # mapped pages count once they are touched
        tensor.detach().reshape(-1).view(torch.uint8)[::512].clone()
    peak = _held()["VmHWM"] - before
    held = sum(t.numel() * t.element_size() for t in tensors)
    print(f"{peak=} {held=} {largest=} {total=}")
    # torch and malloc round up: 2 MB
    assert peak <= held + largest + 2_000_000, f"{peak=} {held=} {largest=} {total=}"
    assert peak >= 0.8 * held  # so that it was measured at all


def test_no_more_than_two_files_are_open_and_no_tensor_outlives_its_use(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[str, weakref.ref[torch.Tensor]] = {}
    most_open, most_alive = 0, 0
    read = tensor_files.TensorFiles.read

    def watched(self: tensor_files.TensorFiles, name: str) -> torch.Tensor:
        nonlocal most_open, most_alive
        tensor = read(self, name)
        alive[name] = weakref.ref(tensor)
        most_open = max(most_open, len(self._open))
        most_alive = max(most_alive, sum(ref() is not None for ref in alive.values()))
        return tensor

    monkeypatch.setattr(tensor_files.TensorFiles, "read", watched)
    # "meta" keeps nothing of what was read, as a GPU would not.
    with pytest.raises(ValueError, match=r"expected \d+ more tensors"):
        huggingface.load(sharded, device="meta")
    assert len(alive) > 80
    assert most_open <= 2
    assert most_alive <= 3  # one layer's, weight and weight_scale, and the one before


def test_a_layer_may_straddle_shards_in_any_order(tmp_path: Path) -> None:
    """Consecutive tensors lie in different shards."""
    model = qk.quantize_model(tiny_model(), "nf4", progress=False, double_quant=True)
    huggingface.save(model, tmp_path / "m")
    single = tmp_path / "m/model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors, key=lambda name: name[::-1])
    weight_map = {}
    for i in range(4):
        file = f"model-{i + 1:05d}-of-00004.safetensors"
        part = {name: tensors[name] for name in names[i::4]}
        save_file(part, tmp_path / "m" / file)
        weight_map |= dict.fromkeys(part, file)
    single.unlink()
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again = huggingface.load(tmp_path / "m")
    assert torch.equal(model(ids(20)[None]).logits, again(ids(20)[None]).logits)


def test_save_model_shards(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m")
    qk.save_model(model, tmp_path / "n", max_shard_bytes=40_000)
    files = list((tmp_path / "n").glob("*.safetensors"))
    assert len(files) > 2
    assert torch.equal(
        model(ids(9)[None]).logits, qk.load_model(tmp_path / "n")(ids(9)[None]).logits
    )


def test_what_is_loaded_stays_when_the_files_go(tmp_path: Path) -> None:
    model: Any = qk.quantize_model(tiny_model(), "int8", progress=False)
    huggingface.save(model, tmp_path / "m", max_shard_bytes=20_000)
    again: nn.Module = huggingface.load(tmp_path / "m")
    for file in (tmp_path / "m").iterdir():
        file.unlink()
    assert torch.equal(model(ids(9)[None]).logits, again(ids(9)[None]).logits)
