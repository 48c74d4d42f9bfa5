"""ReLU, tanh and sigmoid, 20 layers, 100 runs. ``python -m experiments.paper.activations``."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn

from experiments.harness.runs import Record
from experiments.harness.statistics import Estimate, paired_difference
from experiments.paper.common import Part, about, estimate, maps, measured, ratio, row
from experiments.paper.fig1 import NEAR, r2, std
from experiments.roads.cases import Case, built, plain
from widerf import ERF

ACTIVATIONS = {"ReLU": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
NOTE = f"""20 layers of 3×3, 32 channels, He for ReLU and gain 1 for the others, 100 draws of weights and inputs
together. "A lot more Gaussian-like" is read as r² ≥ {NEAR} of the least-squares fit, and as an r² above that of 20
draws, which is Fig. 1's number. Std beside eq. 11's √(n(k²−1)/12). The last row is the mean of σ'² over all units of
the ReLU networks, for which § 2.4 says 1/4."""


def open_share(depth: int, channels: int, runs: int) -> Estimate:
    """Mean of σ'², the share of units that are on, over the layers; the interval is over draws of weights."""
    shares = []
    for seed in range(runs):
        x = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(seed))
        on = []
        with torch.no_grad():
            for layer in built(Case("", partial(plain, nn.ReLU, channels, depth), 33, False), seed).children():
                on += [(x > 0).double().mean().item()] if isinstance(layer, nn.ReLU) else []
                x = layer(x)
        shares.append(sum(on) / len(on))
    return paired_difference(shares, [0.0] * runs)


def rows(out: Path, *, depth: int = 20, runs: int = 100, channels: int = 32) -> list[Record]:
    """Measure each activation; draw the maps."""
    found: list[Record] = []
    panels: dict[str, ERF] = {}
    law = math.sqrt(depth * 8 / 12)
    for name, activation in ACTIVATIONS.items():
        erf = panels[name] = measured(partial(plain, activation, channels, depth), 2 * depth + 5, runs)
        found.append(row(f"{name}: Gaussian-like, r²", "a lot more", estimate(erf, r2), (NEAR, None)))
        found.append(row(f"{name}: std", f"{law:.3g}", estimate(erf, std), about(law)))
    few = measured(partial(plain, nn.ReLU, channels, depth), 2 * depth + 5, max(2, runs // 5), seed=1)
    found.append(row("ReLU: r² / r² of a fifth of the runs", "> 1", ratio(panels["ReLU"], few, r2), (1, None)))
    share = open_share(depth, channels, min(runs, 20))
    found.append(row("ReLU: mean of σ'² (§ 2.4)", "1/4", share, about(0.25), 0.5))
    maps(panels, 3, PART.figure(out), depth)
    return found


PART = Part("activations", "Activations", NOTE, rows)

if __name__ == "__main__":
    PART.main()
