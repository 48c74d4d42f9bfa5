"""§ 4, architecture: sparse connections off the grid beside dilation. ``python -m experiments.paper.architecture``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import widerf
from experiments.harness.runs import Record
from experiments.paper.common import Part, estimate, even, exact, maps, measured, ratio, row
from experiments.paper.subsampling import kurtosis
from widerf import ERF

# Kernel side, pattern, groups of input channels that have taps of their own, extents of the layers, the first one next
# to the image; a grid of spacing d has extent (k − 1)d + 1.
Arm = tuple[int, str, int, tuple[int, ...]]
ARMS: dict[str, Arm] = {
    "dense 3×3": (3, "grid", 1, (3,) * 6),
    "3×3, dilation 4": (3, "grid", 1, (3, 9, 9, 9, 9, 9)),
    "3×3, dilations 1 1 2 2 4 4": (3, "grid", 1, (3, 3, 5, 5, 9, 9)),
    "3×3, partition": (3, "partition", 9, (3, 9, 9, 9, 9, 9)),
    "3×3, stratified": (3, "stratified", 9, (3, 9, 9, 9, 9, 9)),
    "3×3, mixed": (3, "mixed", 18, (3, 9, 9, 9, 9, 9)),
    "dense 5×5": (5, "grid", 1, (5,) * 6),
    "5×5, dilation 3": (5, "grid", 1, (5, 13, 13, 13, 13, 13)),
    "5×5, foveal": (5, "foveal", 4, (5, 13, 13, 13, 13, 13)),
}
NOTE = """Six random linear layers, 36 channels, 100 draws; as many connections in each network of one kernel size. 3×3:
over a window of 9×9 in all layers but the first, 5×5: of 13×13. The paper proposes "sparse connections that are not
grid-like" and gives no number; claimed is that a larger area gives a larger field, that is a ratio of sizes
(amplitude map) to the dense network's above 1. For the shape nothing is claimed: excess kurtosis of the energy map
(0 for a Gaussian), and holes, the pixels inside the bounding box of the field to which no path leads
(`widerf.patterns.coverage`). *Foveal* taps (§ 5) are dense about the centre and sparser outwards."""


@cache
def offsets(kernel_size: int, pattern: str, groups: int, extent: int, seed: int) -> Tensor:
    """Return the taps of a layer, ``(groups, taps, 2)``."""
    taps: Tensor = getattr(widerf.patterns, pattern)(kernel_size, extent, groups, torch.Generator().manual_seed(seed))
    return taps


def network(arm: str, channels: int) -> nn.Sequential:
    """Return the linear network of an arm; the offsets are the same in every draw."""
    k, pattern, groups, extents = ARMS[arm]
    layers: list[nn.Module] = []
    for depth, extent in enumerate(extents):
        inner, drawn = (3, ("grid", 1)) if depth == 0 else (channels, (pattern, groups))
        taps = offsets(k, *drawn, extent, depth)
        conv = widerf.SparseConv2d(inner, channels, k, padding=k // 2, bias=False, extent=extent, pattern=taps)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
        layers.append(conv)
    return nn.Sequential(*layers)


def rows(out: Path, *, arms: Sequence[str] = tuple(ARMS), runs: int = 100, channels: int = 36) -> list[Record]:
    """Measure every arm; draw the maps."""
    found: list[Record] = []
    panels: dict[str, ERF] = {}
    told: dict[str, ERF] = {}
    for arm in arms:
        build = partial(network, arm, channels)
        side = sum(extent - 1 for extent in ARMS[arm][-1]) + 5
        erf = panels[arm] = measured(build, side, runs)
        told[arm] = widerf.predict(even(build, 1 / ARMS[arm][0]), (3, side, side))
        dense = f"dense {ARMS[arm][0]}×{ARMS[arm][0]}"
        if arm != dense:
            law = told[arm].size() / told[dense].size()
            found.append(row(f"{arm}: size / dense size", "> 1", ratio(erf, panels[dense], ERF.size), (1, None), law))
        found.append(row(f"{arm}: excess kurtosis", "", estimate(erf, kurtosis), None, kurtosis(told[arm])))
        taps = [conv.offsets for conv in build()]
        found.append(row(f"{arm}: holes", "", exact(float(widerf.patterns.coverage(taps).holes)), None))
    maps(panels, 3, PART.figure(out), 30)
    return found


PART = Part("architecture", "§ 4, architecture: sparse connections off the grid", NOTE, rows)

if __name__ == "__main__":
    PART.main()
