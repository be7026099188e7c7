"""Configurations: the table, the fit to each architecture, and the cache of tuned ones."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

import qkernels as qk

pytest.importorskip("triton")

from qkernels.backends.problem import Problem, problem_of
from qkernels.backends.triton import autotune, configs, weight_only

ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120, 0)


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("QKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "_tuned", {})
    return tmp_path / "tune"


def problem(m: int = 1) -> Problem:
    p = qk.quantize(torch.randn(64, 256), "gptq", group_size=64)
    return problem_of(p, m, torch.float16, torch.device("cpu"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 16, 17, 128, 129, 4096])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_table_entry_fits_its_architecture(
    arch: int, m: int, invariant: bool, bits: int
) -> None:
    traits = weight_only.layout.WeightOnlyTraits(bits, "linear", "group", 64)
    sizes = weight_only.sizes(traits)
    config = configs.choose(weight_only.family(traits), arch, m, invariant, sizes)
    limit = configs.SHARED_KIB.get(arch, 99) * 1024
    assert configs.shared_bytes(config, sizes) < limit
    assert config.num_stages >= 2


def test_what_cannot_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="no configuration fits sm_89"):
        configs.fitted(configs.GemmConfig(128, 128, 8, 4), 89, configs.StepSizes(4096, 4096))


@pytest.mark.parametrize("tiles", [1, 2, 3, 5, 31, 32, 64, 1000])
@pytest.mark.parametrize("blocks", [1, 7, 132, 5000])
def test_no_k_slice_is_empty(tiles: int, blocks: int) -> None:
    for requested in (0, 1, 4, 64):
        config = configs.GemmConfig(16, 64, 4, 3, k_slices=requested)
        k_slices = configs.k_slices_of(config, tiles, blocks, 132)
        slice_tiles = -(-tiles // k_slices)
        assert (k_slices - 1) * slice_tiles < tiles <= k_slices * slice_tiles


def test_batch_invariant_configurations_differ_in_block_m_only() -> None:
    for arch in ARCHITECTURES:
        found = {
            configs.choose("weight_only", arch, m, True, configs.StepSizes(128, 64))._replace(
                block_m=0
            )
            for m in range(1, 300)
        }
        assert len(found) == 1


def test_tuning_keeps_the_fastest(tuning: Path) -> None:
    tabled = weight_only.tabled(problem())
    fastest = list(configs.candidates(tabled, 1))[5]
    launched = []

    def seconds(call) -> float:  # type: ignore[no-untyped-def]
        call()
        return 1.0 if launched[-1] == fastest else 2.0

    assert autotune.tune("weight_only", problem(), tabled, launched.append, seconds) == fastest
    assert autotune.tuned("weight_only", problem()) == fastest
    assert "tuned on this GPU" in autotune.words("weight_only", problem(), tabled)
    autotune._tuned.clear()  # like another process, which reads it from disk
    assert autotune.tuned("weight_only", problem()) == fastest
    assert autotune.tuned("weight_only", problem(m=100)) is None
    (file,) = tuning.iterdir()
    assert json.loads(file.read_text())["key"]["kernels"]


def test_candidates_that_do_not_run_are_left_out(tuning: Path) -> None:
    tabled = weight_only.tabled(problem())

    def launch(config: configs.GemmConfig) -> None:
        if config != tabled:
            raise RuntimeError("out of resource: shared memory")

    assert autotune.tune("weight_only", problem(), tabled, launch, lambda call: 1.0) == tabled

    def broken(config: configs.GemmConfig) -> None:
        if config != tabled:
            raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotune.tune("weight_only", problem(), tabled, broken, lambda call: 1.0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": {}}', '{"config": {"block_m": "16"}}'])
def test_a_file_that_makes_no_sense_is_ignored(tuning: Path, text: str) -> None:
    tabled = weight_only.tabled(problem())
    autotune.tune("weight_only", problem(), tabled, lambda config: None, lambda call: 1.0)
    (file,) = tuning.iterdir()
    file.write_text(text)
    autotune._tuned.clear()
    assert autotune.tuned("weight_only", problem()) is None


def _write_many(path: Path, value: int) -> None:
    for _ in range(50):
        autotune._write(
            path, {"config": configs.GemmConfig(value, 64, 4, 3)._asdict(), "pad": "x" * 10000}
        )


def test_many_processes_may_write(tmp_path: Path) -> None:
    path = tmp_path / "tune" / "key.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, 16 * i)) for i in (1, 2, 3)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(w.is_alive() for w in writers):
        if path.exists():
            found = autotune._read(path)
            assert found is not None, "a reader saw half a file"
            seen.add(found.block_m)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {16, 32, 48}
    assert [f.name for f in path.parent.iterdir()] == ["key.json"]


def test_off_by_default_and_never_when_batch_invariant(
    tuning: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tabled = weight_only.tabled(problem())
    autotune.tune("weight_only", problem(), tabled, lambda config: None, lambda call: 1.0)
    invariant = problem()._replace(batch_invariant=True)
    assert autotune.tuned("weight_only", invariant) is None
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "0")
    assert autotune.tuned("weight_only", problem()) is None
    monkeypatch.setenv("QKERNELS_AUTOTUNE", "please")
    with pytest.raises(ValueError, match="QKERNELS_AUTOTUNE: expected 0 or 1, got 'please'"):
        autotune.enabled()


def test_explain_names_configuration_and_first_call() -> None:
    p = qk.quantize(torch.randn(72, 320), "gptq", group_size=64)
    x = torch.randn(3, 320).half()
    before = str(qk.explain(p, 3, torch.float16, backend="triton"))
    assert "block_m=16" in before
    assert "from the table" in before
    assert "first call compiles" in before
    qk.matmul(x, p, backend="triton")
    assert "the first call took" in str(qk.explain(p, 3, torch.float16, backend="triton"))
