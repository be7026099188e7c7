"""The benchmark's arithmetic, and that it refuses to time wrong results."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qkernels as qk
from bench import host, peers, report, targets
from qkernels.backends import registry, roofline, workspace
from qkernels.backends.explain import at_best
from qkernels.backends.problem import problem_of
from qkernels.benchmark import race, shapes, timing
from qkernels.cli import main


def test_shapes_and_formats() -> None:
    assert shapes.shapes_of("square, 8192x8192,72x5") == [(8192, 8192), (72, 5)]
    for wrong in ("3by4", "0x4", "x4", "llama-9"):
        with pytest.raises(
            ValueError, match=f"shapes: expected NxK or one of square, .*; got '{wrong}'"
        ):
            shapes.shapes_of(wrong)
    everything = shapes.formats_of("all")
    assert {"bf16", "gptq", "w8a8"} <= {name for name, _ in everything}
    assert shapes.formats_of("eight_bit") == [
        c for c in everything if c in shapes.SUITES["eight_bit"]
    ]
    assert shapes.formats_of("nf4,gptq:bits=3") == [("nf4", {}), ("gptq", {"bits": 3})]


def test_roofline() -> None:
    gpu = roofline.find("NVIDIA H200 NVL")
    assert gpu is not None
    assert gpu.name == "H200"
    assert roofline.find("Radeon") is None
    decode = roofline.estimate(gpu, (8192, 8192), 1, 8192 * 8192 // 2)
    moved = 8192 * 8192 / 2 + 2 * (8192 + 8192)
    assert decode.limit == "memory"
    assert decode.seconds == pytest.approx(2.5e-6 + moved / (4800e9 * 0.9))
    prefill = roofline.estimate(gpu, (8192, 8192), 4096, 8192 * 8192 // 2)
    assert prefill.limit == "tensor cores"
    assert prefill.seconds == pytest.approx(2.5e-6 + 2 * 4096 * 8192**2 / (989e12 * 0.8))
    eight = roofline.estimate(gpu, (8192, 8192), 4096, 8192 * 8192, kind="int8")
    assert eight.seconds < prefill.seconds / 1.9
    assert roofline.estimate(gpu, (64, 64), 1, 2048).limit == "launch"


def test_explain_says_what_would_be_best() -> None:
    def line(name: str, gpu: str, **params: object) -> str:
        p = qk.quantize(torch.randn(256, 256), name, **params)
        problem = problem_of(p, 4096, torch.float16, torch.device("cpu"))
        return at_best(problem._replace(shape=(8192, 8192)), 8192**2, gpu)

    assert line("nf4", "NVIDIA GeForce RTX 2080") == ""
    assert line("nf4", "NVIDIA H200") == "\n  at best 697.3 us on an H200, limited by tensor cores"
    assert line("int8", "NVIDIA H200") == line("fp8", "NVIDIA H200", activation="dynamic")
    assert "349.7 us" in line("int8", "NVIDIA H200")


def test_median_and_quartiles() -> None:
    assert timing.of_samples([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0)


class Wrong(race.Dense):
    name = "wrong"

    def __init__(self, how: str) -> None:
        self.how = how

    def unavailable(self) -> str | None:
        return "away" if self.how == "away" else None

    def prepare(self, weight: Tensor) -> race.Layer:
        if self.how == "prepare":
            raise ValueError("no such type")
        made = super().prepare(weight)
        call = made.call
        made.call = lambda x: call(x) * (float("nan") if self.how == "nan" else 1.1)
        return made


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("nan", "wrong result"),
        ("factor", "wrong result"),
        ("prepare", "ValueError: no such type"),
        ("away", "away"),
    ],
)
def test_what_is_wrong_is_not_timed(how: str, why: str) -> None:
    rows = list(
        race.run(
            [Wrong(how), race.Ours("nf4", {}, "reference")],
            [(64, 128)],
            [1, 3],
            race.Settings("cpu", 2),
        )
    )
    assert [(row.contestant, row.m) for row in rows if row.failed] == [("wrong", 1), ("wrong", 3)]
    assert all(why in row.failed and row.chain is None for row in rows if row.failed)
    fine = [row for row in rows if not row.failed]
    assert [row.contestant.split()[0] for row in fine] == ["torch", "torch", "qkernels", "qkernels"]
    for row in fine:
        assert row.bandwidth == pytest.approx(row.nbytes / row.chain / 1e3)
        assert row.tflops == pytest.approx(2 * row.m * 64 * 128 / row.chain / 1e6)
        assert row.speedup == pytest.approx(next(r for r in fine if r.m == row.m).chain / row.chain)


def test_every_peer_says_why_it_is_not_there() -> None:
    found = peers.contestants()
    names = {p.name for p in found}
    assert {"bitsandbytes", "gemlite", "humming", "torchao", "torch._scaled_mm"} <= names
    assert {"gptqmodel marlin", "spqr-quant", "DeepGEMM", "fast-hadamard-transform"} <= names
    if not torch.cuda.is_available():
        assert all(p.unavailable() for p in found if isinstance(p, peers.Peer))
    groups = {race.Ours(name, params, "triton").group for name, params in shapes.formats_of("all")}
    groups |= {p.group for p in found if not isinstance(p, peers.Peer)}
    assert {p.group for p in found} <= groups, "a peer that races nobody"


def test_named_peers_race_in_the_order_of_their_names() -> None:
    """The first peer is timed even if the time is short."""
    names = [peer.name for peer in peers.contestants(["humming", "bitsandbytes"])]
    assert names == sorted(names, reverse=True)
    assert set(names) == {"humming", "bitsandbytes"}
    with pytest.raises(
        ValueError, match="peers: expected some of bitsandbytes, .*, or a module; got 'marlin'"
    ):
        peers.contestants(["marlin"])


def row(contestant: str, m: int, chain: float, group: str = "g") -> dict[str, object]:
    made = race.Row(
        contestant, group, 64, 128, m, chain=chain, spread=0.1, alone=chain, speedup=10 / chain
    )
    made.bandwidth, made.tflops, made.error = 1.0, 1.0, 1e-3
    return vars(made)


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row("qkernels a", 1, 5),
        row("peer", 1, 10),
        row("qkernels a", 64, 8),
        row("peer", 64, 4),
    ]
    rows.append(vars(race.Row("gone", "g", 64, 128, 1, failed="not installed")))
    speeds = report.mean_speedups(rows)
    assert speeds["qkernels a"] == pytest.approx({"decode": 2.0, "middle": 1.25})
    (peer,) = targets.peers([], {"results": rows})[:1]
    assert peer == ("peer", "g", 0.5, "64x128, M=64", "")
    made = {"environment": race.environment(), "copy_bandwidth": None, "results": rows}
    page = report.write([json.loads(json.dumps(made))], tmp_path / "REPORT.md").read_text()
    assert "| qkernels a | 2.00 | 1.25 |" in page.replace("|  |", "|")
    assert "| gone | g | not installed |" in page


def test_pictures_are_of_each_family(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [synthetic("nf4", m, 10 * m, 30 * m) for m in (1, 64)]
    rows += [{**one, "contestant": "peer"} for one in rows]
    families = report._families(rows)
    assert {name: [one["contestant"] for one in ones] for name, ones in families.items()} == {
        "4-bit weight-only": ["ours nf4", "ours nf4", "peer [nf4]", "peer [nf4]"]
    }
    assert report.pictures(
        [{**one, "predicted": 5.0} for one in rows], 4000.0, tmp_path / "x.md"
    ) == ["8192x8192.png"]
    assert (tmp_path / "8192x8192.png").read_bytes().startswith(b"\x89PNG")


def test_host_overhead_is_measured_with_a_kernel_that_does_nothing() -> None:
    before = dict(registry._KERNELS)
    found = host.measure()
    assert all(0 < value < 1e4 for value in found.values())
    # The direct path makes far fewer Python calls than the operator, so it is faster on any
    # machine.
    assert found["qkernels.matmul"] < found["torch.ops.qkernels.matmul"]
    assert registry._KERNELS == before


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "bench",
                "--formats",
                "nf4",
                "--shapes",
                "16x64",
                "--rows",
                "1,2",
                "--repeats",
                "1",
                "--json",
            ]
        )
        == 0
    )
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["contestant"], r["m"]) for r in results if "nf4" in r["contestant"]] == [
        ("qkernels auto nf4", 1),
        ("qkernels auto nf4", 2),
    ]
    assert main(["bench", "--rows", "0"]) == 2
    assert "--rows: expected numbers from 1" in capsys.readouterr().err
    assert main(["bench", "--formats", "nf5"]) == 2
    assert (
        main(["bench", "--formats", "awq:group_size=128", "--shapes", "16x64", "--rows", "1"]) == 2
    )


def synthetic(
    spec: str, m: int, chain: float, dense: float, backend: str = "triton", n: int = 8192
) -> dict:
    """A row as a race makes it, with round numbers that nobody measured."""
    group = race.GROUPS.get(spec, spec)
    made = race.Row(
        f"qkernels {backend} {spec}", group, n, 8192, m, "kernel", n * 4096, 1e-3, chain, 0.1, chain
    )
    made.speedup, made.bandwidth, made.tflops = dense / chain, n * 4096 / chain / 1e3, 1.0
    return vars(made)


def test_what_falls_short_of_the_targets_worst_first() -> None:
    # a copy of such a weight takes 10 us
    four, copy = (
        "gptq:bits=4,group_size=128",
        8192 * 4096 / 10 / 1e3,
    )
    rows = [
        synthetic(four, 1, 40, 100),  # 2.5x of 3.5, a quarter of the bandwidth
        synthetic(four, 1, 20, 100, backend="cuda"),  # the faster one counts: 5x, half of it
        synthetic(four, 64, 50, 100),  # exactly 2x
        synthetic(four, 1024, 200, 100),  # 0.5x of 0.95
        synthetic("quip_sharp:bits=4", 1, 90, 100),  # no target but peers
        vars(race.Row("gone", "int4 g128", 8192, 8192, 1, failed="not installed")),
    ]
    rows.append({**synthetic(four, 1, 10, 100), "contestant": "marlin"})
    made = {"environment": {"gpu": "synthetic"}, "copy_bandwidth": copy, "results": rows}
    found = targets.findings(made)
    # A format without a peer is last, without a ratio.
    assert [one.format for one in found if one.measured is None] == ["quip_sharp:bits=4"]
    found = found[:-1]
    assert [(str(one.target), round(one.measured, 3), one.where) for one in found] == [
        ("every format, M>=1: 1 x the fastest peer", 0.5, "8192x8192, M=1"),
        ("4-bit weight-only, M>=1024: 0.95 x torch bf16", 0.5, "8192x8192, M=1024"),
        (
            "4-bit weight-only, M=1..16: 0.9 of the copy bandwidth, in a chain from 8192x8192 on",
            0.5,
            "8192x8192, M=1",
        ),
        (
            "4-bit weight-only, M=1..16: 0.8 of the copy bandwidth, alone of 8192x8192",
            0.5,
            "8192x8192, M=1",
        ),
        ("4-bit weight-only, M=64: 2 x torch bf16", 2.0, "8192x8192, M=64"),
        ("4-bit weight-only, M=1..16: 3.5 x torch bf16", 5.0, "8192x8192, M=1"),
        ("4-bit weight-only, M=32..256: 1 x torch bf16", 2.0, "8192x8192, M=64"),
    ]
    reached = [one.reached for one in found]
    assert reached == sorted(reached)
    missing = [str(target) for target in targets.unmeasured(made)]
    assert "SpQR, M=1: 1.5 x torch bf16" in missing
    assert not any(text.startswith("4-bit") for text in missing)
    text = "\n".join(report.verdict([made]))
    table, peers_table, every = (
        text.split("## Against peers")[0],
        *text.split("## Against peers")[1].split("## Every"),
    )
    assert table.count("**50%**") == 1, (
        "the peer's; 0.5 / 0.95 = 53%, 0.5 / 0.9 = 56%, 0.5 / 0.8 = 62%"
    )
    assert (
        table.index("**50%**")
        < table.index("**53%**")
        < table.index("| 100% |")
        < table.index("| not measured |")
    )
    assert "| SpQR, M=1: 1.5 x torch bf16 | not measured |" in table
    assert f"**3 of {len(targets.TARGETS)} targets are reached by every format, 4 are not" in table
    assert "| marlin | int4 g128 | **0.50** | 8192x8192, M=1 |" in peers_table
    assert "| gone | int4 g128 | missing | not installed |" in peers_table
    assert "| humming | w8a8 | missing | was not raced |" in peers_table
    assert "| 53% |" in every
    assert "M=64" not in every


def test_ratios_are_within_one_report() -> None:
    """A machine's rows are not compared with peers of another, twice as fast machine."""
    slow, fast = ([synthetic("nf4", 1, chain, 60)] for chain in (40, 20))
    fast.append({**synthetic("nf4", 1, 20, 60), "contestant": "bitsandbytes"})
    reports = [
        {"environment": {"gpu": str(number)}, "copy_bandwidth": 1.0, "results": rows}
        for number, rows in enumerate((slow, fast))
    ]
    found = {one.target.metric: one for one in targets.findings(*reports)}
    assert found["peers"].measured == 1.0
    assert found["speedup"].measured == 1.5
    (unmatched,) = [one for one in targets.findings(reports[0]) if one.target.metric == "peers"]
    assert (unmatched.measured, unmatched.reached) == (None, None)
    assert [str(t) for t in targets.unmeasured(reports[0]) if t.metric == "peers"]
    assert not [t for t in targets.unmeasured(*reports) if t.metric == "peers"]


def test_without_a_gpu_the_targets_are_not_judged() -> None:
    rows = [synthetic("nf4", 1, 1, 100)]
    made = {"environment": {"gpu": None}, "copy_bandwidth": None, "results": rows}
    assert "No GPU measured" in "\n".join(report.verdict([made]))


def test_the_page_of_targets_has_the_numbers_of_the_code() -> None:
    page = (Path(targets.__file__).parent / "targets.md").read_text()
    table = page.partition("| family | M | at least |\n| --- | --- | --- |\n")[2].partition("\n\n")[
        0
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [f"{family}, {m}: {least}" for family, m, least in rows] == list(
        map(str, targets.TARGETS)
    )
    assert f"at most {host.TARGET:g} us a call" in page
    assert f"outliers in {race.OUTLIERS:.1%} of the columns of x" in page
    assert f"at most {workspace.BYTES >> 20} MB beside the output" in page


def test_every_target_belongs_to_a_format_that_is_raced() -> None:
    specs = [race.FormatSpec(name, params) for name, params in shapes.formats_of("all")]
    for target in targets.TARGETS:
        assert any(targets.FAMILIES[target.family](spec) for spec in specs), target
        assert target.metric in targets.METRICS


def test_a_peer_that_is_not_what_its_adapter_expects_is_listed_as_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer with an empty package is listed, and the reason is told."""
    for peer in peers.contestants(["gptqmodel", "spqr_quant", "deep_gemm", "fast_hadamard"]):
        if not isinstance(peer, peers.Peer):
            continue
        monkeypatch.setitem(sys.modules, peer.module, types.ModuleType(peer.module))
        monkeypatch.setattr(type(peer), "unavailable", lambda self: None)
        x = {1: torch.randn(1, 256).bfloat16()}
        (row,) = race._race(peer, torch.randn(128, 256), x, race.Settings("cpu", 1))
        assert row.failed.startswith("failed: "), (peer.name, row.failed)
        assert "Error" in row.failed


def test_a_peer_of_the_same_codes_is_held_to_them() -> None:
    p = qk.quantize(torch.randn(64, 128), "gptq", bits=4, group_size=128)
    right = peers.same_weight(lambda x: qk.matmul(x, p), p)
    x = torch.randn(3, 128).bfloat16()
    for layer, wrong in (
        (right, False),
        (peers.same_weight(lambda x: 1.03 * qk.matmul(x, p), p), True),
    ):
        error = (layer.call(x) - layer.want(x)).norm() / layer.want(x).norm()
        assert bool(error > layer.tolerance) is wrong
