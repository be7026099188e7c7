"""The plan for a GPU: its commands parse, its runner stops what hangs, and what it carries is found again."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from bench import llm, predictions
from bench.gpu import __main__ as runner
from bench.gpu import install, plan, tables
from bench.peers import gptqmodel_, humming_
from qkernels import roofline
from qkernels.benchmark import shapes

ROOT = Path(__file__).parents[2]
COMMANDS = [
    pytest.param(words, id=f"{name}-{kind}-{number}")
    for name, part in plan.PARTS.items()
    for number, command in enumerate(part.commands)
    for kind, words in (("gpu", command.words), ("tiny", command.tiny))
    if words
]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_parses(words: str, tmp_path: Path) -> None:
    """A typo would show on the GPU alone."""
    module, *options = [w.format(out=tmp_path, seconds="9", jobs="1") for w in words.split()[1:]]
    if module == "pytest":
        files = [option for option in options if option.startswith("tests/")]
        assert files
        assert all((ROOT / file).exists() for file in files)
        return
    name = "bench.__main__" if module == "bench" else module
    if name == "bench.gpu.build":
        assert options in ([], ["--tiny"])
        return
    app = typer.Typer()
    app.command()(importlib.import_module(name).main)
    given = typer.main.get_command(app).make_context(module, options).params  # an error for an unknown option
    for option in ("suite", "formats"):
        if given.get(option):
            assert shapes.formats_of(given[option])
    if module == "bench":
        assert shapes.shapes_of(given["sizes"])
        assert {int(m) for m in given["rows"].split(",")}


def test_the_plan_fits_its_time() -> None:
    """Four calls, each with a start of 35 seconds, in 15 minutes; the fourth has what is left."""
    for names in plan.CALLS.values():
        assert sum(plan.PARTS[name].expected for name in names) <= plan.CALL_SECONDS < 240
    assert 900 - len(plan.CALLS) * plan.CALL_SECONDS - 4 * 35 > 60
    for name, part in plan.PARTS.items():
        assert part.expected <= sum(command.most for command in part.commands), name
    shown = plan.table()
    assert all(part.about in shown for part in plan.PARTS.values())


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.gpu", *arguments], capture_output=True, text=True,
        check=False, timeout=300, cwd=ROOT, env={**os.environ, "OUT": "", **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a folder"),
        (("OUT",), "expected --call, --part or --tiny"),
        (("OUT", "--call", "lunch"), "expected one of smoke, race, model; got 'lunch'"),
        (("OUT", "--part", "lunch"), "got 'lunch'"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run(*(str(tmp_path) if word == "OUT" else word for word in arguments), COLUMNS="200")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(str(tmp_path), "--call", "smoke", PATH=str(tmp_path))
    assert done.returncode == 3
    assert "no GPU here" in done.stderr
    assert run("--plan").stdout.strip() == plan.table()


def test_a_part_is_walked_without_a_gpu(tmp_path: Path) -> None:
    """A race stands for all; CI walks the plan's calls."""
    done = run(str(tmp_path), "--tiny", "--part", "build", "--part", "gguf", "--formats", "nf4")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "CUDA kernels:" in done.stdout
    raced = json.loads((tmp_path / "gguf.json").read_text())
    assert {row["contestant"] for row in raced["results"]} == {"torch bf16", "qkernels triton nf4"}
    assert not [row for row in raced["results"] if row["failed"]]
    assert "us in a chain, M = 1 17" in done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["build.txt", "gguf.json", "gguf.txt"]
    assert done.stdout.rstrip().splitlines()[-1].startswith("gguf: right, ")


def part_of(words: str, most: int = 20) -> plan.Part:
    return plan.Part("a test", 1, (plan.Command(words, most, words),))


def test_a_part_that_hangs_is_stopped_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hangs.py").write_text(
        "import signal, sys, time\n"
        "print('begun', flush=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(5)))\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "fails.py").write_text("import sys; print('gone', *sys.argv[1:]); sys.exit(3)\n")
    parts = {
        "hangs": part_of(f"{tmp_path}/hangs.py", most=16),
        "fails": part_of(f"{tmp_path}/fails.py {{out}} {{jobs}}"),
        "late": part_of(f"{tmp_path}/fails.py"),
    }
    monkeypatch.setattr(plan, "PARTS", parts)
    monkeypatch.setattr(install, "ROOT", tmp_path / "nothing")
    out = tmp_path / "out"
    out.mkdir()
    one = runner.Run(out, 10**6, tiny=True, formats=None)
    one.part("hangs")
    one.part("fails")
    one.seconds = one.used() + 14
    one.part("late")
    assert {name: how for name, (how, _) in one.ended.items()} == {
        "hangs": "stopped", "fails": "3", "late": "no time",
    }  # fmt: skip
    assert 15 < one.ended["hangs"][1] < 40
    assert (out / "hangs.txt").read_text() == "begun\nasked\n"
    assert (out / "fails.txt").read_text() == f"gone {out} 12\n"
    shown = tables.of(out, one.ended, 11_000)
    assert "=== fails\ngone" in shown
    assert shown.splitlines()[-3].startswith("hangs: stopped, ")


def test_what_is_printed_fits_and_failures_come_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plan, "PARTS", {name: part_of("x") for name in ("long", "short", "longer")})
    (tmp_path / "long.txt").write_text("FAILED kernel\n" + "right\n" * 5000)
    (tmp_path / "longer.txt").write_text("FAILED other\n" + "right\n" * 9000)
    (tmp_path / "short.txt").write_text("all of it\nis shown")
    shown = tables.of(tmp_path, dict.fromkeys(("long", "short", "longer"), ("right", 1.0)), 3000)
    assert 2500 < len(shown) <= 3000
    assert "=== long\nFAILED kernel" in shown
    assert "=== short\nall of it\nis shown\n=== longer\nFAILED other" in shown


def test_tables_of_races_and_models() -> None:
    def row(who: str, m: int, chain: float | None, failed: str = "") -> dict[str, Any]:
        found = {
            "contestant": who,
            "group": "nf4",
            "n": 64,
            "k": 128,
            "m": m,
            "chain": chain,
            "failed": failed,
        }
        return {**found, "alone": 3.25, "bandwidth": 100.0}

    rows = [row("torch bf16", 1, 2.0), row("torch bf16", 16, 2.5), row("qkernels cuda nf4", 1, 1.0)]
    rows += [row("peer", 1, None, "not installed"), row("peer", 16, None, "not installed")]
    assert tables._races(rows, None).splitlines() == [
        "64x128, us in a chain, M = 1 16", "torch bf16: 2.0 2.5", "cuda nf4: 1.0 -", "peer [nf4]: not installed",
    ]  # fmt: skip
    assert tables._races(rows, 400.0).splitlines()[::3] == [
        "a copy moves 400 GB/s", "cuda nf4: 1.0 - | alone 3.2, 25% of a copy",
    ]  # fmt: skip
    model = {"format": "nf4", "batch": 1, "prompt": 9, "prefill": 100.0, "decode": {"graph": 2.0}}
    assert "nf4, batch 1: prefill of 9 100, decode (graph) 2.0, 5.0 GiB, at most 7.0" in tables._models(
        [{**model, "memory_weights": 5.0, "memory_peak": 7.0}]
    )


# ------------------------------------------------------------------ what is carried
@pytest.fixture
def parcel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty parcel, and a place for it to be unpacked to."""
    monkeypatch.setattr(install, "ROOT", tmp_path / "root")
    folder = tmp_path / "parcel"
    folder.mkdir()
    return folder


def pack(parcel: Path, name: str, files: dict[str, str]) -> None:
    folder = parcel / name
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    subprocess.run(["tar", "-C", str(parcel), "-cJf", str(parcel / f"{name}.tar.xz"), name], check=True)


def test_the_extension_comes_to_where_it_is_looked_for(parcel: Path) -> None:
    build = install.build_module()
    module = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    pack(parcel, "extension", {module: "machine code", "sources": build.sources_digest()})
    pack(parcel, "triton", {"KEY1/kernel.cubin": "", "KEY2/kernel.cubin": ""})
    environment = install.unpack(parcel)
    assert build.cached(("90a",), Path(environment["QKERNELS_CACHE"])).read_text() == "machine code"
    assert install.kernels_added() == 0
    (Path(environment["TRITON_CACHE_DIR"]) / "KEY3").mkdir()
    assert install.kernels_added() == 1


def test_a_parcel_of_other_sources_or_another_python_is_refused(parcel: Path) -> None:
    pack(parcel, "extension", {"_cuda.cpython-399-other.so": "", "sources": "of yesterday"})
    with pytest.raises(ValueError, match="compiled from other sources than csrc has now"):
        install.unpack(parcel)
    digest = install.build_module().sources_digest()
    pack(parcel, "extension", {"_cuda.cpython-399-other.so": "", "sources": digest})
    with pytest.raises(ValueError, match="for this Python, got _cuda.cpython-399-other.so"):
        install.unpack(parcel)


def test_a_damaged_archive_is_named(parcel: Path) -> None:
    (parcel / "triton.tar.xz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="triton.tar.xz: expected a tar archive"):
        install.unpack(parcel)


def test_hummings_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[str] = []

    class Compiler:
        @classmethod
        def compile(cls, code: str, *rest: Any) -> str:
            compiled.append(code)
            file = tmp_path / "kernel.cubin"
            file.write_text(f"machine code of {code}")
            return str(file)

    class KernelRuntime:
        @staticmethod
        def _get_compiler() -> type[Compiler]:
            return Compiler

    module = types.ModuleType("humming.jit.runtime")
    module.KernelRuntime = KernelRuntime  # type: ignore[attr-defined]
    for name in ("humming", "humming.jit"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for _ in range(2):
        humming_.keep_kernels(tmp_path / "store")
        for code in ("a", "b"):
            assert Path(Compiler.compile(code, 90, "kernel<1>")).read_text() == f"machine code of {code}"
    assert Path(Compiler.compile("a", 90, "kernel<2>")).is_file()
    assert compiled == ["a", "b", "a"]


def test_a_prebuilt_marlin_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marlin = types.ModuleType("gptqmodel.utils.marlin")
    marlin._MARLIN_BF16_TORCH_OPS_EXTENSION = types.SimpleNamespace()  # type: ignore[attr-defined]
    marlin.marlin_runtime_available = lambda dtype: True  # type: ignore[attr-defined]
    utils = types.ModuleType("gptqmodel.utils")
    utils.marlin = marlin  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gptqmodel", types.ModuleType("gptqmodel"))
    monkeypatch.setitem(sys.modules, "gptqmodel.utils", utils)
    monkeypatch.setenv("QKERNELS_PREBUILT", str(tmp_path))
    monkeypatch.setenv("QKERNELS_MARLIN", "")
    gptqmodel_.build()
    assert not vars(marlin._MARLIN_BF16_TORCH_OPS_EXTENSION)
    (tmp_path / gptqmodel_.LIBRARY).touch()
    gptqmodel_.build()
    variable = marlin._MARLIN_BF16_TORCH_OPS_EXTENSION.prebuilt_library_env
    assert os.environ[variable] == str(tmp_path / gptqmodel_.LIBRARY)


def test_what_is_compiled_beforehand_is_found(tmp_path: Path) -> None:
    """Without a GPU: the same launches ask for the same keys in another process."""
    pytest.importorskip("triton")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "QKERNELS_PRETEND_GPU")
    }
    cache = tmp_path / "cache"
    code = (
        "from bench import smoke; from bench.gpu import cache; smoke.REAL = smoke.Shape(72, 512, (1,), ());"
        f"smoke.ODD = smoke.REAL; cache.main(cache.Path({str(cache)!r}), 'smoke', 'nf4', 90, 1, share=0)"
    )
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment,
            cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        counts.append([int(word) for word in done.stdout.split()])
    (kernels, known), again = counts
    assert known == 0
    assert kernels > 0
    assert again == [kernels, kernels]
    assert list(cache.rglob("*.cubin"))


# ------------------------------------------------------------------ what is expected
def test_predictions_are_the_last_runs_own_times_where_it_measured() -> None:
    gpu = roofline.find("H200")
    assert gpu is not None
    report = json.loads(predictions.LAST.read_text())
    predictor = predictions.Predictor(gpu, report)
    lines = list(predictions.beside(predictor, report))
    assert len(lines) > 40
    assert all(ratio == pytest.approx(1) for ratio, _ in lines)
    slower = {
        **report,
        "results": [{**row, "chain": 3 * row["chain"]} for row in report["results"] if row["chain"]],
    }
    assert all(ratio == pytest.approx(3) for ratio, _ in predictions.beside(predictor, slower))
    other = predictor.product("nf4", (28672, 4096), 4096)
    assert other.expected / other.best == pytest.approx(predictor.factors["nf4"][4096])
    assert other.limit == "tensor cores"


def test_predictions_of_models() -> None:
    """Decoding reads each weight once; a prompt is arithmetic."""
    gpu = roofline.find("H200")
    assert gpu is not None
    predictor = predictions.Predictor(gpu, json.loads(predictions.LAST.read_text()))
    best, expected = predictor.model("bf16", 1, 1)
    parameters = 32 * sum(n * k * c for (n, k), c in zip(llm.linear_shapes("8b"), (2, 2, 2, 1), strict=True))
    assert parameters == 6_979_321_856
    assert 2 * parameters / 4.8e12 < best < expected < 10e-3
    decode = {
        "format": "bf16",
        "batch": 1,
        "prompt": plan.PROMPT,
        "prefill": 1e4,
        "decode": {"graph": 0.5 / expected},
    }
    found = list(predictions.beside(predictor, {"results": [decode]}))
    assert found[0][0] == pytest.approx(2)
    assert [text.split(",")[0] for _, text in found] == ["bf16 decode", "bf16 prefill"]


def test_linear_shapes_are_the_models() -> None:
    model = llm.model_of("tiny", "cpu")
    found = {tuple(m.weight.shape) for m in model.model.modules() if isinstance(m, torch.nn.Linear)}
    assert found == set(llm.linear_shapes("tiny"))


def test_the_runner_does_not_import_torch() -> None:
    """It takes seconds, which a call has better use for."""
    began = time.monotonic()
    code = "import sys, bench.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert time.monotonic() - began < 20
