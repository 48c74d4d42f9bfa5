"""The report of the main job: one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import torch

from experiments.compare.task import Task
from experiments.compare.verdict import Row, Verdict, cells
from experiments.harness.runs import Record, write_whole
from widerf import ERF
from widerf.erf import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(path: Path, verdict: Verdict, task: Task, settings: Record) -> Path:
    """Write the report and return its path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    first = verdict.records[0]
    page = environment.get_template("report.html").render(
        verdict=verdict,
        rows=[cells(row) for row in verdict.rows],
        erf_rows=[_erf_cells(row) for row in verdict.rows],
        curves=_png(curves(verdict)),
        maps=_png(maps(verdict)),
        settings=settings,
        machine={key: first[key] for key in ("device", "python", "torch", "timm", "widerf")},
        erf_on="validation images" if task.erf_inputs is not None else "N(0, 1) inputs",
        accuracy_on="test" if task.test is not None else "validation",
        seeds=sorted({record["seed"] for record in verdict.records}),
        minutes=sum(record["seconds"]["run"] for record in verdict.records) / 60,
    )
    write_whole(path, page)
    return path


def _erf_cells(row: Row) -> tuple[str, ...]:
    ratios = (row.std_ratio_before, row.std_ratio_after)
    text = [f"{r.mean:.3f} ({r.low:.3f}–{r.high:.3f})" if r is not None else "1" for r in ratios]
    return row.arm, f"{row.std_before:.2f}", text[0], f"{row.std_after:.2f}", text[1]


def curves(verdict: Verdict) -> Figure:
    """Draw validation accuracy against steps: a thin line a seed, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(verdict.arms):
        colour = f"C{number}"
        records = verdict.of(arm)
        longest = max((record["curve"]["step"] for record in records), key=len)
        # A run that ended at the target keeps its last accuracy: the mean would else be that of the slow runs alone.
        table = np.array([_continued(record["curve"]["accuracy"], len(longest)) for record in records])
        for record in records:
            axes.plot(record["curve"]["step"], record["curve"]["accuracy"], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(longest, table.mean(0), color=colour, linewidth=2.2, label=arm)
    axes.axhline(verdict.target, color="0.4", linestyle=":", linewidth=1)
    axes.annotate(
        f"target {verdict.target:.0%}", (1, verdict.target), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    axes.set(xlabel="step", ylabel="validation accuracy")
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(alpha=0.2)
    return figure


def _continued(values: list[float], length: int) -> list[float]:
    return values + values[-1:] * (length - len(values))


def maps(verdict: Verdict) -> Figure:
    """Draw the ERF of every arm before (first row) and after training (second row), mean over seeds, at one scale."""
    figures = {
        f"{arm}, {when}": [record[f"erf_{when}"] for record in verdict.of(arm) if record[f"erf_{when}"] is not None]
        for when in ("before", "after")
        for arm in verdict.arms
    }
    shown = {title: _mean_erf(those) for title, those in figures.items() if those}
    return plot.compare(shown, columns=len(verdict.arms))


def _mean_erf(figures: list[Record]) -> ERF:
    total = torch.tensor([f["map"] for f in figures], dtype=torch.float64).mean(0)
    clipped = float(np.mean([f["clipped"] for f in figures]))
    return ERF.from_energy(
        total, center=figures[0]["center"], trf_size=figures[0]["trf_size"], clipped=clipped, warn=False
    )


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return base64.b64encode(buffer.getvalue()).decode()
