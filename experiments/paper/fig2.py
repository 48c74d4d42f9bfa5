"""Figure 2: growth of the ERF's size with depth, and of its share. ``python -m experiments.paper.fig2``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from experiments.harness.runs import Record
from experiments.paper.common import Part, about, exact, log_sum, measured, predicted, row, slope_weights
from experiments.roads.cases import plain
from widerf import ERF

GRIDS = ((5, 10, 20, 40), (5, 10, 15, 20), (10, 20, 30, 40), (20, 30, 40), (5, 10, 15, 20, 30, 40))
Map = Literal["amplitude", "energy"]
READINGS: tuple[Map, ...] = ("amplitude", "energy")
NOTE = """Least-squares slopes of log size and of log (size / TRF side) over log depth; size is the paper's: the root of
the number of pixels above 4.55 % of the centre pixel. The paper names neither its depths nor the map (see the
last section), so that every choice is shown: five grids of depths, and size on the energy map A (the variance
of the gradient, eq. 8) and on the amplitude map √A. Random linear networks of 3×3 layers, 32 channels, 100
draws a depth. *Predicted*: the same slopes on the predicted maps. A slope within 10 % of the paper's is met.
*Identity*: size and share differ by the TRF's side alone, so that slope(size) − slope(share) = slope(TRF) for
any grid, map and draw: the paper's .56 + .43 = .99 (.98 to 1.00 by its rounding) is a statement about its
depths, since for 3×3 kernels d log(2n + 1)/d log n = 2n/(2n + 1)."""


def size(of: Map) -> partial[float]:
    """Return the paper's size on one of the maps."""
    return partial(ERF.size, of=of)


def rows(out: Path, *, grids: Sequence[Sequence[int]] = GRIDS, runs: int = 100, channels: int = 32) -> list[Record]:
    """Measure each depth once; fit every grid of them on both maps."""
    depths = sorted({n for grid in grids for n in grid})
    erfs = {n: measured(partial(plain, nn.Identity, channels, n), 2 * n + 5, runs, seed=n) for n in depths}
    told = {n: predicted(partial(plain, nn.Identity, 1, n), 2 * n + 5) for n in depths}
    found: list[Record] = []
    for grid in grids:
        weights = slope_weights(grid)
        field = sum(w * math.log(2 * n + 1) for w, n in zip(weights, grid, strict=True))
        name = f"depths {', '.join(map(str, grid))}: "
        for of in READINGS:
            ours = log_sum(weights, [erfs[n] for n in grid], size(of))
            law = log_sum(weights, [told[n] for n in grid], size(of)).mean
            share = type(ours)(ours.mean - field, ours.low - field, ours.high - field, ours.n)
            found.append(row(f"{name}slope of size, {of} map", ".56", ours, about(0.56), law))
            found.append(row(f"{name}slope of share, {of} map", "−.43", share, about(-0.43), law - field))
        found.append(row(f"{name}slope of the TRF = slope(size) − slope(share)", ".99", exact(field), (0.98, 1.0)))
    draw(erfs, told, PART.figure(out))
    return found


def draw(erfs: dict[int, ERF], told: dict[int, ERF], path: Path) -> None:
    """Draw size and share over depth with their intervals, the predictions as lines."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(8, 3.2), layout="constrained")
    for panel, over, label in zip(made.subplots(1, 2), (False, True), ("ERF size", "ERF size / TRF side"), strict=True):
        for of, colour in zip(READINGS, ("tab:blue", "tab:orange"), strict=True):
            scale = {n: 1 / (2 * n + 1) if over else 1.0 for n in erfs}
            middle = [scale[n] * e.size(of=of) for n, e in erfs.items()]
            ends = [[scale[n] * x for x in e.interval(size(of))] for n, e in erfs.items()]
            reach = [[m - low for m, (low, _) in zip(middle, ends, strict=True)],
                     [high - m for m, (_, high) in zip(middle, ends, strict=True)]]  # fmt: skip
            panel.errorbar(list(erfs), middle, yerr=reach, fmt="o", ms=3, capsize=3, color=colour, label=f"{of} map")
            panel.plot(list(told), [scale[n] * e.size(of=of) for n, e in told.items()], color=colour, lw=0.8)
        panel.set(xscale="log", yscale="log", xlabel="layers", title=label)
        panel.set_xticks(list(erfs), map(str, erfs))
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize="small")
    made.savefig(path, dpi=80, metadata={"Software": None})


PART = Part("fig2", "Figure 2: absolute growth, relative shrinkage", NOTE, rows)

if __name__ == "__main__":
    PART.main()
