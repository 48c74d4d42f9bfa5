"""What the scripts of the paper's claims share: draws, rows of a table, verdicts, figures, the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn

import widerf
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record
from experiments.harness.statistics import Estimate
from experiments.roads.cases import Case, built, redraw
from widerf import ERF

MATCH = 0.1  # a number of the paper's is met within this share of it
Accepted = tuple[float | None, float | None]  # from, to; None is without end
Figure = Callable[[ERF], float]
Build = Callable[[], nn.Module]


def measured(build: Build, side: int, runs: int, *, training: bool = False, seed: int = 0) -> ERF:
    """Measure over ``runs`` draws, each with new weights, a new N(0, 1) image and new signs."""
    case = Case("", build, side, training)
    generator = torch.Generator().manual_seed(seed)
    again = redraw(case)
    return widerf.measure(built(case, seed), case.input_size, samples=runs, redraw=again, generator=generator)


def even(build: Build, weight: float) -> nn.Module:
    """Return the network with all weights equal."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(weight)
    return model


def predicted(build: Build, side: int) -> ERF:
    """Predict the expected ERF of a linear network: all weights have the same square."""
    return widerf.predict(even(build, 1 / 3), (3, side, side))


def predicted_once(build: Build, side: int) -> ERF:
    """Predict from one draw of weights, where the activations depend on them."""
    return widerf.predict(built(Case("", build, side, False), 0), (3, side, side))


def exact(value: float) -> Estimate:
    """Return a figure without sampling error."""
    return Estimate(value, value, value, 1)


def estimate(erf: ERF, figure: Figure) -> Estimate:
    """Return a figure of a measured ERF with its 95 % interval over the draws (jackknife)."""
    assert erf.samples is not None
    return Estimate(figure(erf), *erf.interval(figure), erf.samples)


def log_sum(coefficients: Sequence[float], erfs: Sequence[ERF], figure: Figure) -> Estimate:
    """Σ cᵢ · log figure(erfᵢ) over independently drawn ERFs, with the 95 % t-interval of their jackknife errors."""
    value = sum(c * math.log(figure(e)) for c, e in zip(coefficients, erfs, strict=True))
    blocks = [len(e.blocks) for e in erfs if e.blocks is not None]
    if len(blocks) < len(erfs):
        return exact(value)
    errors = [e.standard_error(lambda erf: math.log(figure(erf))) for e in erfs]
    half = math.hypot(*np.multiply(coefficients, errors).tolist()) * float(stats.t.ppf(0.975, min(blocks) - 1))
    return Estimate(value, value - half, value + half, min(e.samples or 0 for e in erfs))


def ratio(new: ERF, old: ERF, figure: Figure) -> Estimate:
    """Ratio of a figure of two independent ERFs, the interval on the log scale; both predicted: without one."""
    log = log_sum([1, -1], [new, old], figure)
    return Estimate(*np.exp([log.mean, log.low, log.high]).tolist(), log.n)


def slope_weights(depths: Sequence[int]) -> list[float]:
    """Weights of the values whose sum is the least-squares slope over the logarithms of the depths."""
    x = np.log(depths) - np.log(depths).mean()
    return [float(c) for c in x / (x**2).sum()]


def about(number: float, share: float = MATCH) -> Accepted:
    """Return what counts as met: within ``share`` of a number."""
    low, high = sorted((number * (1 - share), number * (1 + share)))
    return low, high


def row(claim: str, paper: str, ours: Estimate, accepted: Accepted | None, predicted: float | None = None) -> Record:
    """Return one row of the page; without ``accepted`` it claims nothing and has no verdict."""
    return {"claim": claim, "paper": paper, "accepted": accepted, "predicted": predicted, **asdict(ours)}


def verdict(row: Record) -> str:
    """Say whether the claim holds: the interval lies inside what is accepted, outside it, or neither.

    Example:
        >>> verdict(row("slope", ".5", Estimate(0.52, 0.5, 0.54, 20), about(0.5)))
        'holds'
        >>> verdict(row("slope", ".5", Estimate(0.52, 0.4, 0.64, 20), about(0.5)))
        'cannot tell'
        >>> verdict(row("wider", "> 1", Estimate(0.8, 0.7, 0.9, 20), (1, None)))
        'differs'
    """
    if row["accepted"] is None:
        return "–"
    low, high = row["accepted"]
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if low <= row["low"] and row["high"] <= high:
        return "holds"
    return "differs" if row["high"] < low or row["low"] > high else "cannot tell"


def table(rows: Sequence[Record]) -> str:
    """Return the rows in Markdown."""
    lines = ["| claim | paper | predicted | ours (95 % interval) | n | verdict |", "|---|---|---|---|---|---|"]
    for line in rows:
        ours = Estimate(*(line[name] for name in ("mean", "low", "high", "n")))
        told = "" if line["predicted"] is None else f"{line['predicted']:.3g}"
        shown = f"{ours.mean:.3g} (exact)" if ours.n == 1 else str(ours)
        lines.append(f"| {line['claim']} | {line['paper']} | {told} | {shown} | {ours.n} | {verdict(line)} |")
    return "\n".join(lines)


def maps(panels: Mapping[str, ERF], columns: int, path: Path, half: int) -> None:
    """Draw the amplitude maps, ``half`` pixels to each side of the centre, each scaled to its own largest pixel."""
    from matplotlib.figure import Figure as Canvas

    lines = math.ceil(len(panels) / columns)
    made = Canvas(figsize=(1.5 * columns, 1.65 * lines), layout="constrained")
    for axis, (title, erf) in zip(made.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False):
        y, x = (round(c) for c in erf.center)
        height, width = erf.map.shape
        box = (-x - 0.5, width - x - 0.5, height - y - 0.5, -y - 0.5)
        axis.imshow(erf.amplitude.numpy(), cmap="gray", extent=box, vmin=0)
        axis.set(xlim=(-half, half), ylim=(half, -half), xticks=[], yticks=[], facecolor="black")
        axis.set_title(title, fontsize=7)
    made.savefig(path, dpi=80, metadata={"Software": None})


@dataclass(frozen=True)
class Part:
    """One script: its name, the heading and text of its section, what makes its rows, and whether it draws."""

    name: str
    title: str
    note: str
    work: Callable[[Path], list[Record]]
    draws: bool = True

    def figure(self, out: Path) -> Path:
        """Where the script draws."""
        return out / f"paper-{self.name}.png"

    def fill(self, out: Path, again: bool) -> Record:
        """Return the part's row of ``paper.jsonl``, made if it is missing."""
        out.mkdir(parents=True, exist_ok=True)
        made = ledger(out).fill({(self.name,): out}, lambda folder: {"rows": self.work(folder)}, again=again)
        return next(found for found in made if found["part"] == self.name)

    def main(self) -> None:
        """Do this part anew and print its rows."""
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and the figure")
        torch.set_num_threads(1)  # sums run in one order, so that the same seeds give the same page
        print(table(self.fill(parser.parse_args().out, again=True)["rows"]))


def ledger(folder: Path) -> Ledger:
    """Return the table of what is done."""
    return Ledger(folder / "paper.jsonl", ("part",))
