"""The page of `experiments.bench.sparse`: what was asked for, what came out, and every ratio with its spread."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from experiments.harness import markdown
from widerf import kernels

BASE = "dense k×k"
PURE = "shared, pure PyTorch"
NAMES = {
    "mixed": "`mixed`, the default pattern",
    "shared": "one random pattern for all channels",
    "own": "a random pattern for each channel",
    PURE: "one random pattern for all channels, PyTorch's operators",
    "pure": "`mixed`, PyTorch's operators",
}


@dataclass(frozen=True)
class Row:
    """One timing of one arm in seconds, with the base's time in the same round; in section "memory", bytes."""

    section: str
    shape: str
    layout: str
    threads: int
    arm: str
    extent: int
    round: int
    forward: float
    total: float
    base_forward: float
    base_total: float


@dataclass(frozen=True)
class Line:
    """All rounds of one arm on one shape: median and quartiles of the ratios to the base, and the median seconds."""

    section: str
    shape: str
    arm: str
    extent: int
    n: int
    forward: tuple[float, float, float]
    total: tuple[float, float, float]
    seconds: float


def save(rows: Iterable[Row], path: Path) -> None:
    """Write the timings as a table."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)


def load(path: Path) -> list[Row]:
    """Read what `save` wrote."""
    kinds: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float}
    with path.open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    return [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in read]  # type: ignore[arg-type]


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), low, high


def summary(rows: Iterable[Row]) -> list[Line]:
    """Return a line for each arm of each section and shape, in the order of the rows."""
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.section, row.shape, row.arm, row.extent), []).append(row)
    return [
        Line(
            *key,
            len(mine),
            _spread([r.forward / (r.base_forward or 1) for r in mine]),
            _spread([r.total / r.base_total for r in mine]),
            statistics.median(r.total for r in mine),
        )
        for key, mine in groups.items()
    ]


def _verdicts(lines: Sequence[Line]) -> list[tuple[str, float, str, float]]:
    """Return (claim, figure, "≤" or "≥", limit)."""

    def ratios(section: str, arm: str, forward: bool = False) -> list[float]:
        return [
            (line.forward if forward else line.total)[0] for line in lines if (line.section, line.arm) == (section, arm)
        ]

    def seconds(section: str, arm: str, extent: int) -> float:
        return next(line.seconds for line in lines if (line.section, line.arm, line.extent) == (section, arm, extent))

    mean = statistics.geometric_mean
    found = [
        ("dense layers, `mixed`, forward + backward, geometric mean", mean(ratios("dense", "mixed")), "≤", 1.10),
        ("the same, worst shape and extent", max(ratios("dense", "mixed")), "≤", 1.3),
        ("dense layers, `mixed`, forward, geometric mean", mean(ratios("dense", "mixed", True)), "≤", 1.15),
        (
            "dense layers, shared pattern, forward + backward, geometric mean",
            mean(ratios("dense", "shared")),
            "≤",
            0.95,
        ),
        ("dense layers, shared pattern, forward, geometric mean", mean(ratios("dense", "shared", True)), "≤", 1.05),
        (
            "dense layers, channels_last, `mixed`, forward + backward, geometric mean",
            mean(ratios("dense, channels_last", "mixed")),
            "≤",
            1.15,
        ),
    ]
    for taps, limit in ((9, 0.7), (25, 0.3)):
        section = f"depthwise {taps} taps"
        found.append((f"{section}, forward + backward, worst shape", max(ratios(section, "own")), "≤", limit))
        last = ratios(f"{section}, channels_last", "own", True)
        found.append((f"{section}, channels_last, forward, worst shape", max(last), "≤", 1.3))
        blocks = ratios(f"{section}, channels_last", "mixed")
        if blocks:  # older timings have none
            found.append((f"{section}, channels_last, `mixed`, forward + backward, worst shape", max(blocks), "≤", 1.0))
    for arm in ("mixed", "shared"):
        growth = seconds("extent", arm, 63) / seconds("extent", arm, 7)
        found.append((f"time at extent 63 over time at extent 7, {NAMES[arm]}", growth, "≤", 1.05))
    found.append(("peak memory of a training step, `mixed`, extent 15", ratios("memory", "mixed")[0], "≤", 1.2))
    found.append(
        ("PyTorch's operators, shared pattern, forward + backward, worst", max(ratios("dense", PURE)), "≤", 1.5)
    )
    for rival in ("dense S×S", "deform_conv2d", "DCLS"):
        faster = seconds("rivals", rival, 15) / seconds("rivals", "mixed", 15)
        found.append((f"times faster than {rival}, extent 15", faster, "≥", 10))
    network = ratios("network, two threads", "resnet50, converted")[0]
    return [*found, ("training step of resnet50, extent 15, two threads", network, "≤", 1.15)]


def _shown(spread: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f}–{:.2f})".format(*spread)


def page(rows: Sequence[Row]) -> str:
    """Return the page in Markdown."""
    lines = summary(rows)
    text = [
        "# Speed of SparseConv",
        "",
        "![Time of forward and backward against the extent](sparse_speed.png)",
        "",
        "Ratios to oneDNN's dense k×k convolution with as many taps, on the same input in the same round; median over",
        "rounds and, in brackets, quartiles. Arms take turns within a round. float32, one thread unless said.",
        f"Kernels: {kernels.info()['cpu float32'].path}, PyTorch {torch.__version__}. Made by",
        "`python -m experiments.bench sparse`; every timing is in [sparse_speed.csv](sparse_speed.csv).",
        "",
        "## What was asked for",
        "",
        *markdown.table(
            ("figure", "measured", "limit", "holds"),
            [
                (claim, f"{value:.3f}", f"{sign} {limit:g}", "yes" if (value <= limit) == (sign == "≤") else "**no**")
                for claim, value, sign, limit in _verdicts(lines)
            ],
        ),
    ]
    for section in dict.fromkeys(line.section for line in lines):
        mine = [line for line in lines if line.section == section]
        text += ["", f"## {section[0].upper()}{section[1:]}", ""]
        if section == "memory":
            cells = [
                (line.shape, NAMES.get(line.arm, line.arm), f"{line.seconds / 1e6:.0f} MB", f"{line.total[0]:.2f}")
                for line in mine
            ]
            text += markdown.table(("training step", "layer", "peak memory", "ratio"), cells)
            continue
        titles = (
            "input",
            "layer",
            "extent",
            "n",
            "forward + backward, ms",
            "forward, ratio",
            "forward + backward, ratio",
        )
        text += markdown.table(
            titles,
            [
                (
                    line.shape,
                    NAMES.get(line.arm, line.arm),
                    line.extent,
                    line.n,
                    f"{1e3 * line.seconds:.1f}",
                    _shown(line.forward),
                    _shown(line.total),
                )
                for line in mine
            ],
        )
    return "\n".join(text) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot time against extent, in units of the dense k×k."""
    from matplotlib.figure import Figure

    lines = [line for line in summary(rows) if line.section == "extent"]
    made = Figure(figsize=(6.4, 4), layout="constrained")
    panel = made.subplots()
    for arm in dict.fromkeys(line.arm for line in lines):
        mine = [line for line in lines if line.arm == arm]
        low = [line.total[0] - line.total[1] for line in mine]
        high = [line.total[2] - line.total[0] for line in mine]
        x, y = [line.extent for line in mine], [line.total[0] for line in mine]
        panel.errorbar(x, y, yerr=[low, high], fmt="o-", capsize=3, label=NAMES.get(arm, arm).replace("`", ""))
    panel.set_yscale("log")
    panel.set_xlabel("extent S, pixels")
    panel.set_ylabel("forward + backward / dense 3×3")
    panel.set_title(f"64 channels, {lines[0].shape}, 9 taps" if lines else "", fontsize="small")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize="small")
    made.savefig(path, dpi=90)


def write(rows: Sequence[Row], out: Path) -> str:
    """Write page and plot; return the page's table of what was asked for."""
    text = page(rows)
    (out / "sparse_speed.md").write_text(text, encoding="utf-8")
    draw(rows, out / "sparse_speed.png")
    return text.split("## What was asked for")[1].split("## ")[0].strip()
