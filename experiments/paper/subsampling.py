"""Sub-sampling and dilation: 15 layers, three of them changed. ``python -m experiments.paper.subsampling``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from experiments.harness.runs import Record
from experiments.paper.common import Part, estimate, exact, maps, measured, predicted, ratio, row
from experiments.roads.cases import plain
from widerf import ERF

DEPTH = 15
# Which three layers: the paper does not say.
PLACES = {"spread (4, 8, 12)": (3, 7, 11), "first three": (0, 1, 2), "last three": (12, 13, 14)}
MEASURED = "spread (4, 8, 12)"
NOTE = f"""{DEPTH} random linear 3×3 layers, 32 channels, 100 draws; size on the amplitude map. Which three layers are
replaced is not said: the spread ones are measured, the others predicted. "Significantly" is read as a ratio to
the dense network's size whose whole interval is above 1. The dilated map's "rectangular shape" is read in two
ways: the energy map is flatter than a Gaussian (excess kurtosis, 0 for a Gaussian, −1.2 for a flat square), and
the pixels above the level of the predicted map fill more of their bounding box than the dense network's do (a
disc fills π/4 = .785 of its own)."""


def changed(places: tuple[int, ...], kind: str) -> Mapping[int, Mapping[str, int]]:
    """Return what becomes of the three layers."""
    if kind == "Sub-sample":
        return {place: {"stride": 2} for place in places}
    return {place: {"dilation": dilation} for place, dilation in zip(places, (2, 4, 8), strict=True)}


def side(places: tuple[int, ...], kind: str) -> int:
    """Pixels that hold the whole field, with room for a unit off the middle."""
    if kind != "Sub-sample":
        return 2 * (DEPTH - 3 + 14) + 5
    reach = sum(2 * 2 ** sum(place < layer for place in places) for layer in range(DEPTH))
    return reach + 17


def fill(erf: ERF) -> float:
    """Share of their bounding box that the pixels above the 2-sigma level take up."""
    above = erf.amplitude > 0.0455 * erf.amplitude.max()
    y, x = torch.nonzero(above, as_tuple=True)
    box = (y.max() - y.min() + 1) * (x.max() - x.min() + 1)
    return float(above.sum() / box)


def kurtosis(erf: ERF) -> float:
    """Excess kurtosis of the energy map."""
    return erf.excess_kurtosis


def rows(out: Path, *, runs: int = 100, channels: int = 32) -> list[Record]:
    """Compare three networks; draw their maps."""
    room = 2 * DEPTH + 5
    base = measured(partial(plain, nn.Identity, channels, DEPTH), room, runs)
    dense = predicted(partial(plain, nn.Identity, 1, DEPTH), room)
    panels = {"Conv-Only": base}
    found: list[Record] = []
    for kind in ("Sub-sample", "Dilation"):
        for name, places in PLACES.items():
            build, room = partial(plain, nn.Identity, changed=changed(places, kind)), side(places, kind)
            told = predicted(partial(build, 1, DEPTH), room)
            says, law = f"{kind}, {name}: size / dense size", ratio(told, dense, ERF.size)
            if name != MEASURED:
                found.append(row(f"{says} (predicted only)", "> 1", law, (1, None)))
                continue
            erf = panels[kind] = measured(partial(build, channels, DEPTH), room, runs)
            found.append(row(says, "> 1", ratio(erf, base, ERF.size), (1, None), law.mean))
            if kind == "Dilation":
                flat = estimate(erf, kurtosis)
                found.append(row("Dilation: rectangular: excess kurtosis", "< 0", flat, (None, 0), kurtosis(told)))
                least = fill(dense)
                boxed = "Dilation: rectangular: fill of the box, predicted"
                found.append(row(boxed, f"> {least:.3g} (dense)", exact(fill(told)), (least, None)))
    maps(panels, 3, PART.figure(out), 40)
    return found


PART = Part("subsampling", "Sub-sampling and dilation", NOTE, rows)

if __name__ == "__main__":
    PART.main()
