"""Every pattern by the ruler, at equal σ: how wide, how heavy-tailed, how full of holes, how rough, how round.

``python -m experiments.patterns.table`` writes ``docs/results/pattern-table.md`` and ``pattern-table.csv``. Nothing is
trained: the figures are of the expected energy at initialisation, `widerf.patterns.coverage` of stacks of L layers, as
plain chains and as residual branches that carry half of the energy each.
"""

from __future__ import annotations

import argparse
import bisect
import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import widerf
from experiments.harness.inputs import main_guard
from experiments.harness.ledger import RESULTS
from experiments.harness.runs import Record, write_whole
from experiments.patterns import settings
from widerf.patterns import NAMED, Coverage, coverage

KERNELS = (3, 5, 7)
LAYERS = (1, 2, 6)
SHARES = {"plain": 1.0, "residual": 0.5}
SPACING = 4  # of the grid whose second moment all patterns have
CHANNELS = 64  # in blocks of settings.BLOCK that share their taps
DRAWS = 8
NEAR = 1.5  # σ within which holes are counted
FIGURES = ("std", "excess_kurtosis", "holes", "roughness", "isotropy")


def pattern_set(kernel: int) -> dict[str, Any]:
    """Return all named patterns and the mixtures of the study for a kernel of that side."""
    mixed = settings.PATTERNS | (settings.FOVEAL if kernel > 3 else {})
    return {name: name for name in NAMED} | {k: v for k, v in mixed.items() if not isinstance(v, str)}


@dataclass(frozen=True)
class Kind:
    """A pattern with its kernel."""

    pattern: Any
    kernel: int

    def draw(self, extent: int, seed: int) -> torch.Tensor:
        """Return the offsets (groups, taps, 2) of a layer."""
        layer = widerf.SparseConv2d(
            CHANNELS, CHANNELS, self.kernel, extent=extent, pattern=self.pattern, block=settings.BLOCK, seed=seed
        )
        return layer.offsets

    def moment(self, extent: int) -> float:
        """Return the mean square of the taps' coordinates over the draws."""
        return float(np.mean([settings.second_moment(self.draw(extent, seed)) for seed in range(DRAWS)]))

    def extent(self) -> int:
        """Return the odd extent whose taps have the second moment of a grid of :data:`SPACING`, as near as can be."""
        if self.pattern == "dense":
            return self.kernel
        wanted = SPACING**2 * (self.kernel**2 - 1) / 12
        sides = range(self.kernel, 8 * SPACING * self.kernel, 2)
        at = bisect.bisect_left(sides, wanted, key=self.moment)
        return min(sides[max(0, at - 1) : at + 1], key=lambda side: abs(self.moment(side) - wanted))


def holes_near(covered: Coverage) -> float:
    """Return the share of the cells within 1.5 σ of the unit that no path reaches."""
    shape = covered.energy.shape
    axes = [torch.arange(n, dtype=torch.float64) + low for n, low in zip(shape, covered.low, strict=True)]
    inside = axes[0].square()[:, None] + axes[1].square() <= (NEAR * covered.std) ** 2
    cells = sum(1 for _ in _disc(NEAR * covered.std))
    return 1 - int((covered.energy[inside] > 0).sum()) / cells


def _disc(radius: float) -> Iterator[tuple[int, int]]:
    top = math.floor(radius)
    for y in range(-top, top + 1):
        for x in range(-top, top + 1):
            if y * y + x * x <= radius**2:
                yield y, x


def figures(kind: Kind, extent: int, layers: int, share: float) -> dict[str, float]:
    """Return means of the figures over the draws, and their standard deviations; each layer has taps of its own."""
    found = []
    for draw in range(DRAWS):
        taps = [kind.draw(extent, 1000 * draw + layer) for layer in range(layers)]
        covered = coverage(taps, shares=[share] * layers)
        values = {name: float(getattr(covered, name)) for name in FIGURES}
        found.append(values | {"holes": holes_near(covered)})
    means = {name: float(np.mean([each[name] for each in found])) for name in FIGURES}
    return means | {f"{name}_sd": float(np.std([each[name] for each in found], ddof=1)) for name in FIGURES}


def rows(kernels: Iterable[int] = KERNELS) -> Iterator[Record]:
    """Yield a row for each kernel, pattern, number of layers and way."""
    todo = [(kernel, name, pattern) for kernel in kernels for name, pattern in pattern_set(kernel).items()]
    for kernel, name, pattern in tqdm(todo, unit="pattern", disable=None):
        kind = Kind(pattern, kernel)
        extent = kind.extent()
        for way, share in SHARES.items():
            for layers in LAYERS:
                about = {"kernel": kernel, "pattern": name, "extent": extent, "way": way, "layers": layers}
                yield about | {key: round(value, 4) for key, value in figures(kind, extent, layers, share).items()}


def _extremes(mine: Sequence[Record]) -> str:
    """Name what stands out at two layers, of the patterns that have the common σ."""
    two = [row for row in mine if row["layers"] == 2 and row["pattern"] != "dense"]
    full = [row["pattern"] for row in two if row["holes"] == 0]
    smooth, tail, rough = (
        min(two, key=lambda row: row["roughness"]),
        max(two, key=lambda row: row["excess_kurtosis"]),
        max(two, key=lambda row: row["roughness"]),
    )
    return (
        f"At two layers: smoothest `{smooth['pattern']}` ({smooth['roughness']:.2f}), roughest `{rough['pattern']}` "
        f"({rough['roughness']:.2f}); heaviest tail `{tail['pattern']}` ({tail['excess_kurtosis']:+.2f}); "
        f"no hole near the unit: {', '.join(full) or 'none'}."
    )


METHOD = f"""\
Made by `python -m experiments.patterns.table`; nothing is trained, so that this says what a stack reaches at
initialisation and not what it learns. One layer has the second moment of a grid of spacing {SPACING}, as near as an odd
window comes to it; `dense` is the plain kernel, narrower, for comparison. {CHANNELS} channels, blocks of
{settings.BLOCK} share their taps, every layer has taps of its own; means over {DRAWS} draws. Figures of
`widerf.patterns.coverage` for 1 / 2 / 6 layers: σ in pixels; excess kurtosis (0 for a Gaussian, more for heavy tails);
holes, the share of the pixels within {NEAR:g} σ of the unit that no path reaches; roughness (0 for a smooth map);
isotropy (1 if all directions are alike). Residual: each layer is a branch that carries half of the energy after its
addition. Raw figures, with their standard deviations over the draws: [pattern-table.csv](pattern-table.csv)."""


def page(found: Sequence[Record]) -> str:
    """Return the page."""
    lines = [
        "# Every pattern by the ruler, at equal σ",
        "",
        METHOD,
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        for way in SHARES:
            mine = [row for row in found if (row["kernel"], row["way"]) == (kernel, way)]
            lines += ["", f"## {kernel}×{kernel} taps, {way}", "", _extremes(mine), ""]
            lines += ["| pattern | extent | σ | excess kurtosis | holes | roughness | isotropy |", "|---" * 7 + "|"]
            for name in dict.fromkeys(row["pattern"] for row in mine):
                three = [row for row in mine if row["pattern"] == name]
                cells = [" / ".join(_cell(key, row[key]) for row in three) for key in FIGURES]
                lines.append(f"| {name} | {three[0]['extent']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(key: str, value: float) -> str:
    return f"{value:.0%}" if key == "holes" else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Work out the figures and write them."""
    line = argparse.ArgumentParser("experiments.patterns.table", description=__doc__.split("\n")[0])
    line.add_argument("--out", type=Path, default=RESULTS, help="folder of the page and the figures")
    line.add_argument("--kernels", type=int, nargs="+", default=KERNELS, choices=KERNELS, help="taps per axis")
    options = line.parse_args(arguments)
    found = list(rows(options.kernels))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_whole(options.out / "pattern-table.csv", text.getvalue())
    write_whole(options.out / "pattern-table.md", page(found))
    print(f"page: {options.out / 'pattern-table.md'}")


if __name__ == "__main__":
    main_guard(main)
