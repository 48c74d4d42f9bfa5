"""Equations 10–11 and the cases of § 2.5. ``python -m experiments.paper.growth``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from experiments.harness.runs import Record
from experiments.harness.statistics import Estimate
from experiments.paper.common import (
    Part,
    about,
    estimate,
    log_sum,
    maps,
    measured,
    predicted,
    predicted_once,
    ratio,
    row,
    slope_weights,
)
from experiments.paper.fig1 import NEAR, r2, std
from experiments.roads.cases import plain, residual
from widerf import ERF

NOTE = f"""Std is that of the energy map. *Growth*: random linear networks, 16 channels, 40 draws a network; the share
is std over the TRF's side, whose slope tends to −½ only where (k − 1)n is large. *Dropout* (share ½, train mode)
and *skips*: 21 layers, 32 channels, 100 draws; the residual network is a convolution and blocks of two with
ReLU after the addition, without normalisation, beside a plain ReLU network of as many layers and the same TRF.
The analysis itself is in the paper's appendix; what is checked is what § 2.5 says of it. "Does not change the
Gaussian shape" is read as a std within 10 % of that without dropout and r² ≥ {NEAR}."""


def growth(depths: Sequence[int], sides: Sequence[int], runs: int, channels: int) -> list[Record]:
    """Slopes over depth for each kernel size, and over the kernel size at the middle depth."""
    found: list[Record] = []
    middle = depths[len(depths) // 2]
    there: list[ERF] = []
    for k in sides:
        field = {n: (k - 1) * n + 1 for n in depths}
        erfs = {
            n: measured(partial(plain, nn.Identity, channels, n, kernel_size=k), field[n] + 4, runs) for n in depths
        }
        weights = slope_weights(depths)
        ours = log_sum(weights, list(erfs.values()), std)
        shrink = sum(w * math.log(field[n]) for w, n in zip(weights, depths, strict=True))
        name = f"k = {k}, depths {', '.join(map(str, depths))}: "
        found.append(row(f"{name}slope of std", "½", ours, about(0.5), 0.5))
        share = Estimate(ours.mean - shrink, ours.low - shrink, ours.high - shrink, ours.n)
        found.append(row(f"{name}slope of std / TRF", "−½", share, about(-0.5), 0.5 - shrink))
        law = math.sqrt(middle * (k**2 - 1) / 12)
        found.append(
            row(f"k = {k}, {middle} layers: std (eq. 11)", f"{law:.3g}", estimate(erfs[middle], std), about(law))
        )
        there.append(erfs[middle])
    weights = slope_weights(sides)
    law = sum(w * math.log(k**2 - 1) / 2 for w, k in zip(weights, sides, strict=True))
    ours = log_sum(weights, there, std)
    found.append(row(f"{middle} layers: slope of std over kernel size (eq. 11)", "1", ours, about(1.0), law))
    return found


def rows(
    out: Path,
    *,
    depths: Sequence[int] = (4, 8, 16),
    sides: Sequence[int] = (3, 5, 7),
    depth: int = 21,
    runs: tuple[int, int] = (40, 100),
    channels: tuple[int, int] = (16, 32),
) -> list[Record]:
    """Growth, dropout, skips; draw the maps of the latter."""
    found = growth(depths, sides, runs[0], channels[0])
    room, wide = 2 * depth + 5, channels[1]
    linear = measured(partial(plain, nn.Identity, wide, depth), room, runs[1])
    dropped = measured(partial(plain, partial(nn.Dropout, 0.5), wide, depth), room, runs[1], training=True)
    found.append(row("dropout: std / std without", "1", ratio(dropped, linear, std), about(1.0), 1.0))
    smooth = r2(predicted(partial(plain, nn.Identity, 1, depth), room))
    found.append(row("dropout: Gaussian, r²", "unchanged", estimate(dropped, r2), (NEAR, None), smooth))
    builds = partial(residual, False, wide, depth // 2), partial(plain, nn.ReLU, wide, depth)
    skipped, stacked = (measured(build, room, runs[1]) for build in builds)
    told = [predicted_once(build, room) for build in builds]
    law = told[0].std / told[1].std
    found.append(row("skips: std / std of the plain network", "< 1", ratio(skipped, stacked, std), (None, 1), law))
    panels = {"linear": linear, "dropout": dropped, "ReLU": stacked, "ReLU, skips": skipped}
    maps(panels, 4, PART.figure(out), depth)
    return found


PART = Part("growth", "Equations 10–11; dropout and skips", NOTE, rows)

if __name__ == "__main__":
    PART.main()
