"""The theoretical fields that the paper gives for Figure 3. ``python -m experiments.paper.fields``."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import widerf
from experiments.harness.runs import Record
from experiments.paper.common import Part, exact, row
from experiments.paper.networks import BLOCKS, Setting, network

STEMS = (3, 5, 7)
WAYS = ("3×3 layer of stride 2", "2×2 pooling", "first layer of the next block strided")
NOTE = """`widerf.receptive_field` of the networks that `experiments.paper.trained` trains, and a count of layouts.
CIFAR-10: 17 blocks of two 3×3 layers without down-sampling see 1 + 34·2 = 69 pixels, and 2 more for a 3×3 stem;
every stack of odd kernels at stride 1 sees an odd number, so that no layout gives 74. CamVid: 16 blocks of two
3×3 layers, cut into five runs by four halvings, in all 1365 ways; a stem of 3×3, 5×5 or 7×7; counted are those
whose field is 505 pixels wide."""


def field(runs: tuple[int, ...], way: str, stem: int) -> int:
    """Side of the theoretical field of runs of blocks with a halving between two of them."""
    side, jump = stem, 1
    for number, blocks in enumerate(runs):
        if number:
            side += jump if way == "2×2 pooling" else 2 * jump
            jump *= 2
            side -= 2 * jump if way.startswith("first") else 0
        side += 4 * blocks * jump
    return side


def layouts(blocks: int, halvings: int) -> list[tuple[int, ...]]:
    """Return all ways to cut the blocks into runs of at least one.

    Example:
        >>> layouts(3, 1)
        [(1, 2), (2, 1)]
    """
    cuts = ((0, *cut, blocks) for cut in combinations(range(1, blocks), halvings))
    return [tuple(b - a for a, b in pairwise(cut)) for cut in cuts]


def side(task: str, pixels: int) -> float:
    """Side of the field of a network of ``networks.py`` before its head, by the library."""
    model = network(Setting(task, channels=1))[0].eval()
    return float(widerf.receptive_field(model, (3, pixels, pixels)).size[0])


def rows(out: Path) -> list[Record]:
    """Trace both networks; count the layouts. There is no figure."""
    found = [row("CIFAR-10: TRF of 17 blocks and a 3×3 stem", "74", exact(side("cifar10", 80)), (74, 74))]
    found.append(row("CamVid: TRF of runs of 2, 2, 4, 4, 4 blocks", "505", exact(side("camvid", 512)), (505, 505)))
    counted = []
    for way in WAYS:
        for stem in STEMS:
            fit = sum(field(runs, way, stem) == 505 for runs in layouts(BLOCKS["camvid"], 4))
            counted.append(row(f"… of these with a {stem}×{stem} stem, {way}", "", exact(float(fit)), None))
    total = sum(line["mean"] for line in counted)
    return [*found, row("CamVid: layouts whose TRF is 505", "≥ 1", exact(total), (1, None)), *counted]


PART = Part("fields", "Figure 3: the theoretical fields", NOTE, rows, draws=False)

if __name__ == "__main__":
    PART.main()
