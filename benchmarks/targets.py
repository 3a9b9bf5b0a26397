"""What the kernels are asked for, and whether they deliver. Targets are for an H200 in bf16 and channels_last, and for CPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median
from typing import Any

Row = dict[str, Any]
Summary = Callable[[Sequence[float]], float | None]


def geomean(values: Sequence[float]) -> float | None:
    return exp(sum(map(log, values)) / len(values)) if values else None


@dataclass(frozen=True)
class Verdict:
    target: str
    needed: float
    reached: float | None
    """None: no layer it is about."""
    most: float | None = None
    """What it would be if every layer ran at the roofline of its cheapest algorithm, with its operands in main memory."""
    percent: bool = False

    @property
    def met(self) -> bool | None:
        return None if self.reached is None else self.reached >= self.needed

    def cells(self) -> tuple[str, str, str, str, str]:
        def shown(value: float | None) -> str:
            return "-" if value is None else f"{100 * value:.0f} %" if self.percent else f"{value:.2f}x"

        return (
            self.target,
            shown(self.needed),
            shown(self.reached),
            shown(self.most),
            {None: "no data", True: "met", False: "not met"}[self.met],
        )


def targets(rows: Sequence[Row], dtype: str, device: str) -> list[Verdict]:
    """Verdicts over rows of one dtype and layout; ``device`` is ``"cuda"`` or ``"cpu"``."""
    if device == "cpu":
        return _cpu(rows)
    if dtype == "fp32":
        return [Verdict("all, geometric mean over (a), without tf32", 1.3, geomean(_over(rows, "wgrad")))]
    return _cuda(rows)


def _over(rows: Sequence[Row], baseline: str) -> list[float]:
    return [row["us"][baseline] / row["us"]["auto"] for row in rows if baseline in row["us"]]


def _kind(rows: Sequence[Row], *kinds: str) -> list[Row]:
    return [row for row in rows if row["kind"] in kinds]


def _least(values: Sequence[float]) -> float | None:
    return min(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _cuda(rows: Sequence[Row]) -> list[Verdict]:
    def shares(chosen: Sequence[Row], *picks: str) -> list[float]:
        """Of the roofline, on layers long enough for the launch not to decide."""
        return [
            row["roofline_us"][row["pick"]] / row["us"]["auto"]
            for row in chosen
            if row["us"]["auto"] >= 5 and row["pick"] in picks and row["pick"] in row["roofline_us"]
        ]

    dense3x3 = [row for row in _kind(rows, "dense") if tuple(row["case"]["weight"][2:]) == (3, 3)]
    return [
        Verdict(
            "expanding 1x1 and linear (K >= 2C), geometric mean over (a)", 3, geomean(_over(_kind(rows, "expanding"), "wgrad"))
        ),
        Verdict("depthwise, geometric mean over (a)", 5, geomean(_over(_kind(rows, "depthwise"), "wgrad"))),
        Verdict("square 1x1 and linear, geometric mean over (a)", 1.8, geomean(_over(_kind(rows, "square"), "wgrad"))),
        Verdict("every layer over (b), the least", 1, _least(_over(rows, "user"))),
        Verdict("all, geometric mean over (b)", 2, geomean(_over(rows, "user"))),
        Verdict("all, geometric mean over (a)", 1.5, geomean(_over(rows, "wgrad"))),
        Verdict("gram, share of the roofline from 5 µs, the least", 0.7, _least(shares(rows, "gram")), percent=True),
        Verdict("depthwise, share of the roofline from 5 µs, the least", 0.7, _least(shares(rows, "depthwise")), percent=True),
        Verdict(
            "dense 3x3, share of the roofline from 5 µs, the least",
            0.5,
            _least(shares(dense3x3, "direct", "library")),
            percent=True,
        ),
    ]


def _cpu(rows: Sequence[Row]) -> list[Verdict]:
    def expanding(wanted: Callable[[float], bool]) -> list[Row]:
        return [
            r
            for r in _kind(rows, "expanding")
            if wanted(r["case"]["weight"][0] / (r["case"]["weight"][1] * r["case"]["groups"]))
        ]

    def verdict(name: str, needed: float, chosen: Sequence[Row], baseline: str, summary: Summary) -> Verdict:
        most = summary([row["us"][baseline] / min(row["roofline_us"].values()) for row in chosen if baseline in row["us"]])
        return Verdict(name, needed, summary(_over(chosen, baseline)), most)

    wide, narrow = expanding(lambda r: r >= 4), expanding(lambda r: r < 4)
    convolutions = [row for row in rows if len(row["case"]["weight"]) > 2]
    return [
        verdict("expanding 1x1 and linear, K >= 4C, median over (a)", 4, wide, "wgrad", _median),
        verdict("expanding 1x1 and linear, 2C <= K < 4C, median over (a)", 2, narrow, "wgrad", _median),
        verdict("square 1x1 and linear, median over (a)", 1.3, _kind(rows, "square"), "wgrad", _median),
        verdict("depthwise, median over (a)", 3, _kind(rows, "depthwise"), "wgrad", _median),
        verdict("every convolution over (b), the least", 0.97, convolutions, "user", _least),
        verdict("all, geometric mean over (a)", 1.5, rows, "wgrad", geomean),
        verdict("all, geometric mean over (d)", 3, rows, "unfold", geomean),
    ]
