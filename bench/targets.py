"""The performance targets of bench/targets.md as data, and how far a race's results miss them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from qkernels.benchmark import race
from qkernels.quantizers.specs import FormatSpec, parse_specs

Row = dict[str, Any]
LARGE = 8192 * 8192


@dataclass(frozen=True)
class Target:
    """One row of the table in bench/targets.md.

    family: key of FAMILIES. rows: fewest and most rows of x. metric: key of METRICS. least: value
    of the metric that is required. weights, most: smallest and largest N * K that the target is
    for.
    """

    family: str
    rows: tuple[int, int]
    metric: str
    least: float
    weights: int = 0
    most: int = 10**12

    def __str__(self) -> str:
        low, high = self.rows
        m = f"M={low}" if low == high else f"M={low}..{high}" if high < 10**9 else f"M>={low}"
        size = (
            " of 8192x8192" if self.most == LARGE else " from 8192x8192 on" if self.weights else ""
        )
        return f"{self.family}, {m}: {self.least:g} {METRICS[self.metric].unit}{size}"


class Metric(NamedTuple):
    """What a target is measured in.

    of: function (row, all rows of the same shape and M, GB/s of a copy) -> value of the metric, or
    None where the report lacks what is needed.
    """

    unit: str
    of: Callable[[Row, list[Row], float], float | None]


def _against(*names: str) -> Callable[[Row, list[Row], float], float | None]:
    """The metric that compares our speed with the fastest of some contestants.

    It is our speed over that of the fastest contestant of the same group whose name starts with one
    of `names`.
    """

    def of(row: Row, others: list[Row], copy: float) -> float | None:
        times = [
            other["chain"]
            for other in others
            if other["group"] == row["group"]
            and any(other["contestant"].startswith(n) for n in names)
        ]
        return min(times) / row["chain"] if times else None

    return of


def _against_peers(row: Row, others: list[Row], copy: float) -> float | None:
    times = [o["chain"] for o in others if o["group"] == row["group"] and not _is_ours(o)]
    return min(times) / row["chain"] if times else None


METRICS = {
    "speedup": Metric("x torch bf16", lambda row, others, copy: row["speedup"]),
    "bandwidth": Metric(
        "of the copy bandwidth, in a chain",
        lambda row, others, copy: row["bandwidth"] / copy if copy else None,
    ),
    "alone": Metric(
        "of the copy bandwidth, alone",
        lambda row, others, copy: row["nbytes"] / row["alone"] / 1e3 / copy if copy else None,
    ),
    "torch": Metric("x torch's own 8-bit product", _against("torch._int_mm", "torch._scaled_mm")),
    "bitsandbytes": Metric("x bitsandbytes", _against("bitsandbytes")),
    "unfused": Metric("x dequantize + bf16", _against("qkernels reference")),
    "peers": Metric("x the fastest peer", _against_peers),
}

#: family -> whether a format with these parameters belongs to it
FAMILIES: dict[str, Callable[[FormatSpec], bool]] = {
    "4-bit weight-only": lambda spec: (
        spec.name in ("awq", "nf4", "q4_k", "iq4_nl")
        or (spec.name == "gptq" and spec.params.get("bits") == 4)
    ),
    "W8A8 and FP8": lambda spec: (
        spec.name == "w8a8" or (spec.name == "fp8" and "activation" in spec.params)
    ),
    "LLM.int8()": lambda spec: spec.name == "int8",
    "SpQR": lambda spec: spec.name == "spqr",
    "QuIP# 2-bit": lambda spec: (
        spec.name in ("quip", "quip_sharp") and spec.params.get("bits", 2) == 2
    ),
    "every format": lambda spec: True,
}
_DECODE, _MIDDLE, _PREFILL = (1, 16), (32, 256), (1024, 10**9)
TARGETS = (
    Target("4-bit weight-only", _DECODE, "bandwidth", 0.9, LARGE),
    Target("4-bit weight-only", _DECODE, "alone", 0.8, LARGE, LARGE),
    Target("4-bit weight-only", _DECODE, "speedup", 3.5),
    Target("4-bit weight-only", (64, 64), "speedup", 2.0),
    Target("4-bit weight-only", _MIDDLE, "speedup", 1.0),
    Target("4-bit weight-only", _PREFILL, "speedup", 0.95),
    Target("W8A8 and FP8", _DECODE, "bandwidth", 0.9, LARGE),
    Target("W8A8 and FP8", _DECODE, "speedup", 1.8),
    Target("W8A8 and FP8", _MIDDLE, "speedup", 1.6),
    Target("W8A8 and FP8", _PREFILL, "speedup", 1.7),
    Target("W8A8 and FP8", _PREFILL, "torch", 1.0),
    Target("LLM.int8()", _DECODE, "speedup", 1.7),
    Target("LLM.int8()", _MIDDLE, "speedup", 1.3),
    Target("LLM.int8()", _PREFILL, "speedup", 1.3),
    Target("LLM.int8()", (1, 10**9), "bitsandbytes", 3.0),
    Target("SpQR", (1, 1), "speedup", 1.5),
    Target("SpQR", _MIDDLE, "unfused", 1.0),
    Target("SpQR", _PREFILL, "speedup", 0.8),
    Target("QuIP# 2-bit", (1, 1), "speedup", 4.0),
    Target("QuIP# 2-bit", _MIDDLE, "unfused", 1.0),
    Target("QuIP# 2-bit", _PREFILL, "speedup", 0.8),
    Target("every format", (1, 10**9), "peers", 1.0),
)


class Finding(NamedTuple):
    """The worst result of one format against one target.

    measured: value of the target's metric; None where nothing was measured. where: shape and M.
    """

    target: Target
    format: str
    measured: float | None
    where: str
    kernel: str

    @property
    def reached(self) -> float | None:
        """Measured value over the required one."""
        return None if self.measured is None else self.measured / self.target.least


def _is_ours(row: Row) -> bool:
    return str(row["contestant"]).startswith("qkernels ")


def _fastest_of_ours(rows: list[Row]) -> Iterator[tuple[FormatSpec, Row, list[Row]]]:
    """For each shape, M and format: the row of our fastest kernel, and all rows of that shape.

    The reference backend does not count.
    """
    places: dict[tuple[int, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["chain"] is not None:
            places[row["n"], row["k"], row["m"]].append(row)
    for here in places.values():
        best: dict[str, Row] = {}
        for row in here:
            place = race.ours(row["contestant"])
            if place is not None and place[0] != "reference":
                spec = place[1]
                if spec not in best or row["chain"] < best[spec]["chain"]:
                    best[spec] = row
        for text, row in best.items():
            yield _spec_of(text), row, here


def _spec_of(text: str) -> FormatSpec:
    """The format named `text`; some contestants are no formats, such as the Hadamard transform."""
    try:
        return parse_specs(text)[0]
    except ValueError:
        return FormatSpec(text)


def findings(*reports: dict[str, Any]) -> list[Finding]:
    """The worst result of each format against each target, the one that misses most first.

    Each ratio compares rows of one report, because reports of other runs may come from other GPUs.
    A format that was raced without the contestant it is compared with is listed last, with
    measured = None.
    """
    worst: dict[tuple[Target, str], Finding] = {}
    for report in reports:
        copy = report["copy_bandwidth"] or 0.0
        for spec, row, here in _fastest_of_ours(report["results"]):
            for target in TARGETS:
                if (
                    not FAMILIES[target.family](spec)
                    or not target.rows[0] <= row["m"] <= target.rows[1]
                ):
                    continue
                if not target.weights <= row["n"] * row["k"] <= target.most:
                    continue
                value = METRICS[target.metric].of(row, here, copy)
                where = f"{row['n']}x{row['k']}, M={row['m']}"
                kernel = row["kernel"] or row["contestant"].split()[1]
                finding = Finding(target, str(spec), value, where, kernel)
                previous = worst.setdefault((target, str(spec)), finding)
                if value is not None and (previous.measured is None or value < previous.measured):
                    worst[target, str(spec)] = finding
    return sorted(
        worst.values(), key=lambda one: float("inf") if one.reached is None else one.reached
    )


class Peer(NamedTuple):
    """Our fastest kernel against one peer.

    ratio: our speed over the peer's, at the shape and M where it is least (`where`); None if the
    peer was not timed. why: the reason it was not.
    """

    name: str
    group: str
    ratio: float | None
    where: str
    why: str


def peers(known: list[tuple[str, str]], *reports: dict[str, Any]) -> list[Peer]:
    """Our fastest kernel against each peer, the worst ratio first, peers that were not timed last.

    known: (contestant, group) of peers to list even if no report has a row of them.
    """
    worst: dict[tuple[str, str], Peer] = {}
    failed: dict[tuple[str, str], str] = {}
    for report in reports:
        places: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in report["results"]:
            if row["chain"] is not None:
                places[row["group"], row["n"], row["k"], row["m"]].append(row)
            elif not _is_ours(row):
                failed.setdefault((row["contestant"], row["group"]), row["failed"])
        for (group, n, k, m), here in places.items():
            ours = [row["chain"] for row in here if _is_ours(row)]
            for row in here:
                if _is_ours(row) or row["contestant"] == "torch bf16" or not ours:
                    continue
                key = (row["contestant"], group)
                peer = Peer(*key, row["chain"] / min(ours), f"{n}x{k}, M={m}", "")
                if key not in worst or peer.ratio < worst[key].ratio:  # type: ignore[operator]
                    worst[key] = peer
    for key in [*known, *failed]:
        worst.setdefault(key, Peer(*key, None, "", failed.get(key, "was not raced")))
    return sorted(worst.values(), key=lambda one: float("inf") if one.ratio is None else one.ratio)


def unmeasured(*reports: dict[str, Any]) -> list[Target]:
    """Targets that no row of the reports measures."""
    seen = {one.target for one in findings(*reports) if one.measured is not None}
    return [target for target in TARGETS if target not in seen]
