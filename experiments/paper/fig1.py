"""Figure 1: depth, random weights and ReLU. ``python -m experiments.paper.fig1``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

import widerf
from experiments.harness.runs import Record
from experiments.paper.common import Part, about, estimate, even, exact, maps, measured, predicted, predicted_once, row
from experiments.roads.cases import plain
from widerf import ERF

PERFECT, NEAR = 0.99, 0.9  # least r² that is called a perfect, a near Gaussian
NOTE = f"""3×3 layers, 32 channels (uniform: one), TRF 2n + 1, maps of 20 draws: new weights, image and signs each time.
*r²* is the share of the energy map's variance over pixels that the least-squares Gaussian explains; the paper
gives no number, so that "perfect" is read as r² ≥ {PERFECT} and "near" as r² ≥ {NEAR}. The scatter of 20 draws
alone keeps a measured map from the former; the expected map of the random linear networks is judged in a row of
its own. *Std* is that of the energy map, beside eq. 11's √(n(k²−1)/12); for the uniform network, whose gradient
is the path count itself, that of the gradient, which is what eq. 11 speaks of there. *Predicted* is
`widerf.predict`: the expected map for linear networks, one draw of weights for ReLU."""


def spread(erf: ERF) -> float:
    """Std of the amplitude map."""
    return ERF.from_energy(erf.amplitude, center=erf.center, trf_size=erf.trf_size).std


def r2(erf: ERF) -> float:
    """Share of the map that its Gaussian fit explains."""
    return erf.gaussian_fit().r2


def std(erf: ERF) -> float:
    """Std of the energy map."""
    return erf.std


def rows(out: Path, *, depths: Sequence[int] = (5, 10, 20, 40), runs: int = 20, channels: int = 32) -> list[Record]:
    """Measure each depth and kind; draw their maps."""
    found: list[Record] = []
    panels: dict[str, ERF] = {}
    for n in depths:
        side, law = 2 * n + 5, math.sqrt(n * 8 / 12)
        one = partial(plain, nn.Identity, 1, n)
        uniform = widerf.measure(even(one, 1 / 9), (3, side, side), samples=1)
        told = predicted(one, side)
        found.append(row(f"{n} layers, uniform: perfect Gaussian, r²", "perfect", exact(r2(uniform)), (PERFECT, None)))
        found.append(row(f"{n} layers, uniform: std", f"{law:.3g}", exact(spread(uniform)), about(law, 1e-3), told.std))
        expected = f"{n} layers, random, expected map (predicted): perfect Gaussian, r²"
        found.append(row(expected, "perfect", exact(r2(told)), (PERFECT, None)))
        panels[f"{n}, uniform"] = uniform
        for name, activation, word, least in (
            ("random", nn.Identity, "perfect", PERFECT),
            ("random + ReLU", nn.ReLU, "near", NEAR),
        ):
            build = partial(plain, activation, channels, n)
            erf = measured(build, side, runs)
            if activation is nn.ReLU:
                told = predicted_once(build, side)
            says = f"{n} layers, {name}, {runs} draws: "
            found.append(row(f"{says}{word} Gaussian, r²", word, estimate(erf, r2), (least, None), r2(told)))
            found.append(row(f"{says}std", f"{law:.3g}", estimate(erf, std), about(law), told.std))
            panels[f"{n}, {name}"] = erf
    maps(panels, 6, PART.figure(out), max(depths))
    return found


PART = Part("fig1", "Figure 1: depth, random weights, ReLU", NOTE, rows)

if __name__ == "__main__":
    PART.main()
