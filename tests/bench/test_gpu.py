"""The plan for a GPU: commands parse, the runner stops a hung command, the parcel is unpacked."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
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

from bench import llm, predictions, worker
from bench.gpu import __main__ as runner
from bench.gpu import install, plan, tables
from bench.peers import gptqmodel_, humming_
from qkernels.backends import registry, roofline
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
    """Otherwise a typo would show on the GPU only."""
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
    # an error for an unknown option
    given = typer.main.get_command(app).make_context(module, options).params
    for option in ("suite", "formats"):
        if given.get(option):
            assert shapes.formats_of(given[option])
    if module == "bench":
        assert shapes.shapes_of(given["sizes"])
        assert {int(m) for m in given["rows"].split(",")}
        assert set(given["backend"].split(",")) <= set(registry.BACKENDS)
        raced = worker.contestants(
            given["suite"], given["backend"], given["with_peers"], given["tiny"]
        )
        named = {"none"} if given["with_peers"] == "none" else set(given["with_peers"].split(","))
        assert named <= {"none"} or len(raced) > 1 + len(given["backend"].split(","))


def test_the_plan_fits_its_time() -> None:
    """After three calls the fourth has the 4 minutes without which no machine starts.

    The 15 minutes include 45 seconds for each of two starts; the third call finds the machine warm.
    """
    expected = [sum(plan.PARTS[name].expected for name in names) for names in plan.CALLS.values()]
    assert max(expected) <= plan.CALL_SECONDS < 240
    assert 900 - sum(expected) - 2 * 45 >= 240
    for name, part in plan.PARTS.items():
        assert part.expected <= sum(command.most for command in part.commands), name
    shown = plan.table()
    assert all(part.about in shown for part in plan.PARTS.values())


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.gpu", *arguments], capture_output=True,
        text=True, check=False, timeout=300, cwd=ROOT, env={**os.environ, "OUT": "", **environment},
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
def test_wrong_arguments_are_named(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run(*(str(tmp_path) if word == "OUT" else word for word in arguments), COLUMNS="200")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())


def pretended(tmp_path: Path) -> dict[str, str]:
    """An environment in which nvidia-smi exists."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho NVIDIA Pretend\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}"}


def test_without_a_parcel_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Git ignores the parcel, so it is easily left behind; kernels would compile for minutes."""
    if (install.PARCEL / "site.tar.xz").exists():
        pytest.skip("there is a parcel here")
    done = run(str(tmp_path / "out"), "--call", "smoke", **pretended(tmp_path))
    assert done.returncode == 3
    assert ".gpu/extension.tar.xz is not there" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(str(tmp_path), "--call", "smoke", PATH=str(tmp_path))
    assert done.returncode == 3
    assert "no GPU here" in done.stderr
    assert run("--plan").stdout.strip() == plan.table()


def test_a_part_is_walked_without_a_gpu(tmp_path: Path) -> None:
    """One race stands for all parts, because CI runs the plan's calls."""
    (tmp_path / "README.md").write_text("somebody's")
    done = run(str(tmp_path), "--tiny", "--part", "build", "--part", "gguf", "--formats", "nf4")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "CUDA kernels:" in done.stdout
    raced = json.loads((tmp_path / "gguf.json").read_text())
    assert {row["contestant"] for row in raced["results"]} == {"torch bf16", "qkernels triton nf4"}
    assert not [row for row in raced["results"] if row["failed"]]
    assert "us in a chain, M = 1 17" in done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "build.txt",
        "gguf.json",
        "gguf.txt",
    ]
    assert done.stdout.rstrip().splitlines()[-1].startswith("gguf: right, ")


def part_of(words: str, most: int = 20) -> plan.Part:
    return plan.Part("a test", 1, (plan.Command(words, most, words),))


def test_a_part_that_hangs_is_stopped_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hangs.py").write_text(
        "import signal, sys, time\n"
        "print('begun', flush=True)\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('asked', flush=True), sys.exit(5)))\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "deaf.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)\n"
    )
    (tmp_path / "fails.py").write_text("import sys; print('gone', *sys.argv[1:]); sys.exit(3)\n")
    parts = {
        "hangs": part_of(f"{tmp_path}/hangs.py", most=2),
        "deaf": part_of(f"{tmp_path}/deaf.py", most=2),
        "fails": part_of(f"{tmp_path}/fails.py {{out}} {{jobs}}"),
        "late": part_of(f"{tmp_path}/fails.py"),
    }
    monkeypatch.setattr(plan, "PARTS", parts)
    monkeypatch.setattr(runner, "LEAST", 1)
    monkeypatch.setattr(install, "ROOT", tmp_path / "nothing")
    out = tmp_path / "out"
    out.mkdir()
    one = runner.Run(out, 10**6, tiny=True, formats=None)
    one.part("hangs")
    one.part("deaf")
    one.part("fails")
    one.seconds = one.used() + 0.5
    one.part("late")
    assert {name: how for name, (how, _) in one.ended.items()} == {
        "hangs": "stopped", "deaf": "stopped", "fails": "3", "late": "no time",
    }  # fmt: skip
    assert 2 < one.ended["hangs"][1] < one.ended["deaf"][1] < 30
    assert (out / "hangs.txt").read_text() == "begun\nasked\n"
    assert (out / "fails.txt").read_text() == f"gone {out} 12\n"
    shown = tables.of(out, one.ended, 11_000)
    assert "=== fails\ngone" in shown
    assert shown.splitlines()[-4].startswith("hangs: stopped, ")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_is_stopped_stops_what_it_started(
    tmp_path: Path, sign: signal.Signals
) -> None:
    code = (
        "import sys; from bench.gpu import __main__ as runner, plan\n"
        f"command = plan.Command('', 99, {str(tmp_path / 'long.py')!r})\n"
        "plan.PARTS['smoke'] = plan.Part('', 1, (command,))\n"
        f"sys.argv = ['gpu', {str(tmp_path)!r}, '--tiny', '--part', 'smoke']\n"
        "runner.typer.run(runner.main)\n"
    )
    (tmp_path / "long.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    runs = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    runs.send_signal(sign)
    said, _ = runs.communicate(timeout=30)
    assert "=== parts" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_other_formats_are_run_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = runner.Run(tmp_path, 10**6, tiny=False, formats="nf4")
    started: list[list[str]] = []
    monkeypatch.setattr(
        one, "_command", lambda name, command, words, left: started.append(words) or "0"
    )
    for name in ("model", "race", "smoke"):
        one.part(name)
    assert [words[1] for words in started] == ["bench.llm", "bench", "bench.smoke"]
    assert all(words.count("nf4") == 1 and words[-1] == "nf4" for words in started)


def test_a_failure_of_one_format_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = runner.Run(tmp_path, 10**6, tiny=False, formats=None)
    monkeypatch.setattr(
        one, "_command", lambda name, command, words, left: "1" if "nf4" in words else "0"
    )
    one.part("model")
    (tmp_path / "model.txt").write_text("Traceback\nOutOfMemoryError: 3 GiB")
    (tmp_path / "model.json").write_text('{"results": []}')
    assert one.ended["model"][0] == "nf4 1"
    assert "nf4 1; said last: Traceback OutOfMemoryError: 3 GiB" in tables.of(
        tmp_path, one.ended, 5000
    )


def test_the_last_race_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "race.json").write_bytes(predictions.LAST.read_bytes())
    shown = tables.of(tmp_path, {"race": ("right", 99.0)}, 11_000)
    assert "a copy moves 4247 GB/s" in shown
    assert "8192x8192, us in a chain, M = 1 8 16 32 64 128 256 1024 4096" in shown
    assert "triton gptq:bits=4,group_size=128: 24.6 24.7 24.9" in shown
    assert "torch._int_mm [w8a8]: - - - no time was left" in shown
    assert "gptqmodel marlin [int4 g128]: no time was left\n" in shown


def test_what_is_printed_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "PARTS", {name: part_of("x") for name in ("long", "short", "longer")})
    monkeypatch.setitem(plan.PARTS, "longer", dataclasses.replace(part_of("x"), tail=True))
    (tmp_path / "long.txt").write_text("FAILED kernel\n" + "right\n" * 5000)
    (tmp_path / "longer.txt").write_text("right\n" * 9000 + "2 errors")
    (tmp_path / "short.txt").write_text("all of it\nis shown")
    shown = tables.of(tmp_path, dict.fromkeys(("long", "short", "longer"), ("right", 1.0)), 3000)
    assert 2500 < len(shown) <= 3000
    assert "=== long\nFAILED kernel" in shown
    assert "=== short\nall of it\nis shown\n=== longer\n(more in the files)\nright" in shown
    assert "right\n2 errors\n=== parts" in shown


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
        "64x128, us in a chain, M = 1 16", "torch bf16: 2.0 2.5", "cuda nf4: 1.0 -",
        "peer [nf4]: not installed",
    ]  # fmt: skip
    assert tables._races(rows, 400.0).splitlines()[::3] == [
        "a copy moves 400 GB/s", "cuda nf4: 1.0 - | alone 3.2, 25% of a copy",
    ]  # fmt: skip
    rows = [{**row("qkernels cuda nf4", 1, 2.0, "out of memory"), "alone": None, "bandwidth": None}]
    assert tables._races(rows, 400.0).splitlines()[-1] == "cuda nf4: out of memory"
    model = {"format": "nf4", "batch": 1, "prompt": 9, "prefill": 100.0, "decode": {"graph": 2.0}}
    assert (
        "nf4, batch 1: prefill of 9 100, decode (graph) 2.0, 5.0 GiB, at most 7.0"
        in tables._models([{**model, "memory_weights": 5.0, "memory_peak": 7.0}])
    )


# ------------------------------------------------------------------ what is carried
def pack(parcel: Path, name: str, files: dict[str, str]) -> None:
    folder = parcel / name
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    subprocess.run(
        ["tar", "-C", str(parcel), "-cJf", str(parcel / f"{name}.tar.xz"), name], check=True
    )


@pytest.fixture
def parcel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A parcel of archives without useful content, and a folder to unpack it to."""
    monkeypatch.setattr(install, "ROOT", tmp_path / "root")
    folder = tmp_path / "parcel"
    folder.mkdir()
    for name in install.ARCHIVES:
        pack(folder, name, {"nothing": ""})
    return folder


def test_the_extension_comes_to_where_it_is_looked_for(parcel: Path) -> None:
    build = install.build_module()
    module = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    pack(parcel, "extension", {module: "machine code", "sources": build.sources_digest()})
    kernels = {"KEY1/kernel.cubin": "", "KEY2/kernel.cubin": "", "KEY3/launcher.so": ""}
    pack(parcel, "triton", {**kernels, "sources": install.triton_digest()})
    assert not install.all_compiled()
    environment = install.unpack(parcel)
    assert build.cached(("90a",), Path(environment["QKERNELS_CACHE"])).read_text() == "machine code"
    assert install.kernels_added() == 0
    assert install.all_compiled()
    (Path(environment["TRITON_CACHE_DIR"]) / "KEY3" / "kernel.cubin").touch()
    assert install.kernels_added() == 1
    (install.ROOT / "triton" / "sources").write_text("of yesterday")
    assert not install.all_compiled()


def test_nothing_is_unpacked_where_others_can_write(parcel: Path) -> None:
    install.ROOT.mkdir()
    install.ROOT.chmod(0o777)
    with pytest.raises(RuntimeError, match="expected what only this user can write to"):
        install.unpack(parcel)


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


def test_a_missing_archive_is_named(parcel: Path) -> None:
    (parcel / "prebuilt.tar.xz").unlink()
    with pytest.raises(
        ValueError,
        match="prebuilt.tar.xz is not there. The parcel, which git ignores, must be carried",
    ):
        install.unpack(parcel)


def test_what_is_compiled_beforehand_is_all_that_the_calls_start() -> None:
    """`cache.PLANNED` has all parts of calls that start Triton kernels, and each has products."""
    pytest.importorskip("triton")
    from bench.gpu import cache

    parts = cache.PLANNED.split(",")
    assert set(parts) | {"racecheck", "gemlite"} == {
        name for names in plan.CALLS.values() for name in names
    }
    by_part = {name: list(cache.products([name])) for name in parts}
    assert all(by_part.values())
    assert list(cache.products(["racecheck"])) == by_part["memcheck"]
    known = {(one.spec, one.shape, call) for one in by_part["race"] for call in one.calls}
    for one in cache.products(["gemlite"]):
        assert all((one.spec, one.shape, call) in known for call in one.calls)
    assert any(call.late for one in by_part["smoke"] for call in one.calls)


def test_hummings_kernels_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
            assert (
                Path(Compiler.compile(code, 90, "kernel<1>")).read_text()
                == f"machine code of {code}"
            )
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
    """Without a GPU: the same launches ask for the same cache keys in another process."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = tmp_path / "cache"
    code = (
        "from bench import smoke; from bench.gpu import cache;"
        "smoke.REAL = smoke.ODD = smoke.Shape(72, 512, (1,), ());"
        f"cache.main(cache.Path({str(cache)!r}), 'smoke', 'nf4', 90, 1, share=0)"
    )
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
            env=environment, cwd=ROOT, check=False,
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
        "results": [
            {**row, "chain": 3 * row["chain"]} for row in report["results"] if row["chain"]
        ],
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
    parameters = 32 * sum(
        n * k * c for (n, k), c in zip(llm.linear_shapes("8b"), (2, 2, 2, 1), strict=True)
    )
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
    """Importing torch takes seconds, which a call needs for its parts."""
    began = time.monotonic()
    code = "import sys, bench.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert time.monotonic() - began < 20
