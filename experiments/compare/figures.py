"""The pictures of a report: transparent, with grey ink, so that they can be read on white and in the dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from experiments.compare.verdict import Row, Verdict, looks
from experiments.harness.runs import Record
from experiments.harness.statistics import survival
from widerf import ERF

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#808080"


def png(figure: Figure) -> str:
    """Return a figure as base64 of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, transparent=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _axes(xlabel: str, ylabel: str, height: float = 3.8) -> tuple[Figure, Axes]:
    """Return axes of the width of a phone's column, so that nothing shrinks there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.grid(alpha=0.25, color=INK)
    return figure, axes


def _legend(figure: Figure) -> None:
    """Name the lines below the axes, where no line is hidden."""
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", labelcolor=INK, frameon=False)


def forest(rows: Sequence[Row], baseline: str) -> Figure:
    """Draw every arm's ratio of steps with its interval on a log scale; filled where it is clear."""
    shown = [row for row in rows if row.steps_ratio is not None]
    figure, axes = _axes(f"steps to the target / {baseline}'s (log scale)", "", height=1.1 + 0.36 * max(1, len(shown)))
    axes.axvline(1, color=INK, linewidth=1)
    for place, row in enumerate(reversed(shown)):
        assert row.steps_ratio is not None
        ratio = row.steps_ratio
        colour = ("#2a8f5a" if ratio.mean < 1 else "#c0504d") if row.clear else INK
        low, high = max(ratio.low, 0.05), min(ratio.high, 20)
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot(ratio.mean, place, "o", color=colour, fillstyle="full" if row.clear else "none", markersize=7)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 0.75, 1, 1.5, 2, 4]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(shown)), [row.arm for row in reversed(shown)])
    return figure


def curves(verdict: Verdict) -> Figure:
    """Draw validation accuracy against steps: a thin line a seed, a thick one for their mean."""
    figure, axes = _axes("step", "validation accuracy")
    for number, arm in enumerate(verdict.arms):
        records = verdict.of(arm)
        longest = max((looks(record["curve"]) for record in records), key=len)
        # A run that ended at the target keeps its last accuracy: the mean would else be that of the slow runs alone.
        table = np.array([_continued(record["curve"]["accuracy"], len(longest)) for record in records])
        for record in records:
            steps = looks(record["curve"])
            axes.plot(steps, record["curve"]["accuracy"], color=f"C{number % 10}", alpha=0.2, linewidth=0.7)
        axes.plot(longest, table.mean(0), color=f"C{number % 10}", linewidth=2.2, label=arm)
    axes.axhline(verdict.target, color=INK, linestyle=":", linewidth=1)
    _legend(figure)
    return figure


def _continued(values: list[float], length: int) -> list[float]:
    return values + values[-1:] * (length - len(values))


def waiting(verdict: Verdict) -> Figure:
    """Draw the share of runs that have not arrived yet (Kaplan–Meier), an arm a line."""
    figure, axes = _axes("step", "share of runs not yet at the target")
    for number, arm in enumerate(verdict.arms):
        steps = [record["steps_to_target"] for record in verdict.of(arm)]
        curve = survival(steps, [verdict.longest] * len(steps))
        inside = curve.steps < verdict.longest
        edges = np.concatenate([[0], curve.steps[inside], [verdict.longest]])
        heights = np.concatenate([[1.0], curve.share[inside]])
        axes.step(edges, [*heights, heights[-1]], where="post", color=f"C{number % 10}", linewidth=2, label=arm)
    axes.set_ylim(0, 1.03)
    _legend(figure)
    return figure


def doses(rows: Sequence[Row]) -> Figure | None:
    """Draw the ratio of steps against the strength of widening; None with fewer than two strengths."""
    shown = [row for row in rows if row.arm.startswith("widened-") and row.steps_ratio is not None]
    if len(shown) < 2:
        return None
    figure, axes = _axes("strength of widening", "steps / baseline's", height=3.0)
    strengths = [float(row.arm.partition("-")[2]) for row in shown]
    ratios = [row.steps_ratio for row in shown if row.steps_ratio is not None]
    means = [ratio.mean for ratio in ratios]
    errors = [[r.mean - r.low for r in ratios], [min(r.high, 4 * r.mean) - r.mean for r in ratios]]
    axes.errorbar(strengths, means, errors, fmt="o-", color="#2a6fb0", capsize=4)
    axes.axhline(1, color=INK, linewidth=1)
    return figure


def erf_map(records: Sequence[Record], when: str) -> str | None:
    """Return the mean amplitude map √A of an arm as base64 of a small PNG; None where no run has one."""
    from matplotlib import image

    there = [record[f"erf_{when}"] for record in records if record[f"erf_{when}"] is not None]
    if not there or "map" not in there[0]:
        return None
    energy = torch.tensor([each["map"] for each in there], dtype=torch.float64).mean(0)
    clipped = float(np.mean([each["clipped"] for each in there]))
    erf = ERF.from_energy(energy, center=there[0]["center"], trf_size=there[0]["trf_size"], clipped=clipped, warn=False)
    amplitude = erf.amplitude
    buffer = io.BytesIO()
    image.imsave(buffer, (amplitude / amplitude.max()).numpy(), cmap="magma", vmin=0, vmax=1, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
