"""Is the gain that the initialiser's report predicts the gain that is measured? And what does strength buy?

``python -m experiments.roads.gain`` builds each network with weights drawn from a seed, measures its ERF, widens it to
each strength in turn and measures again with the same images. Rows go to ``docs/results/gain.jsonl`` (what is there
already is skipped, so that a run can be broken off); ``--table`` writes ``docs/results/gain.md``.
``experiments.roads.dose_response`` draws the same rows as a figure.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import widerf
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record
from experiments.roads.cases import Case, built, cases

STRENGTH = 0.5  # of the table of gains
IMAGES = 4


@dataclass(frozen=True)
class Series:
    """One network: its case, how many sets of weights, and the strengths."""

    name: str
    case: str
    seeds: int
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)


SERIES = (
    Series("plain, 20 layers", "plain 20, ReLU", 32),
    Series("ResNet of 17 blocks, no downsampling", "ResNet of 17 blocks, BN in train mode", 8),
    Series("resnet18, zero_init_last=False", "resnet18, train", 8),
    Series("convnext_atto, layer scale 1", "convnext_atto, layer scale 1", 8),
    Series("resnet50, zero_init_last=False", "resnet50, train", 6, (0.5,)),
)


def moments(energy: Tensor) -> list[float]:
    """Return Σ p and Σ p² of the normalised map, p the position on each axis from the map's middle: [y, y², x, x²]."""
    share, found = energy.double() / energy.double().sum(), []
    for axis, n in enumerate(share.shape):
        marginal = share.sum(dim=tuple(i for i in range(share.ndim) if i != axis))
        place = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
        found += [float((marginal * place).sum()), float((marginal * place**2).sum())]
    return found


def std_of(rows: Iterable[Sequence[float]]) -> float:
    """Return the std of the mean of the maps that the moments belong to."""
    mean = np.mean(np.asarray(list(rows)), axis=0)
    return math.sqrt(float(np.mean(mean[1::2] - mean[0::2] ** 2)))


def one(series: Series, case: Case, seed: int) -> Record:
    """Measure one set of weights at all strengths; strength 0 is the network as it was drawn."""
    model = built(case, seed)

    def measured() -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        # With batch statistics a unit sees all images of its batch: take the prediction's, which is one image.
        batch = 1 if case.training else IMAGES
        erf = widerf.measure(model, case.input_size, samples=IMAGES, batch_size=batch, generator=generator)
        return moments(erf.map)

    row: Record = {"measured": {"0": measured()}, "predicted": {}}
    row["predicted"]["0"] = widerf.predict(model, case.input_size).std
    for strength in series.strengths:
        report = widerf.init.apply(model, strength, input_size=case.input_size if strength == STRENGTH else None)
        row["measured"][f"{strength:g}"] = measured()
        told = report.erf_std[1] if report.erf_std else widerf.predict(model, case.input_size).std
        row["predicted"][f"{strength:g}"] = told
    return row


def ratio(rows: Sequence[Record], strength: str) -> tuple[float, float]:
    """Return the measured gain over all seeds and its standard error (jackknife, which keeps pairs together)."""

    def gain(kept: Sequence[Record]) -> float:
        return std_of(r["measured"][strength] for r in kept) / std_of(r["measured"]["0"] for r in kept)

    left = np.array([gain([r for r in rows if r is not out]) for out in rows])
    return gain(rows), math.sqrt((len(rows) - 1) * float(((left - left.mean()) ** 2).mean()))


def foretold(rows: Sequence[Record], strength: str) -> float:
    """Return the predicted gain over all seeds, variances averaged as in the measurement."""
    after, before = (np.mean([r["predicted"][s] ** 2 for r in rows]) for s in (strength, "0"))
    return math.sqrt(after / before)


def ledger(folder: Path) -> Ledger:
    """Return the table of the rows."""
    return Ledger(folder / "gain.jsonl", ("series", "seed"))


def table(rows: Sequence[Record]) -> str:
    """Return the table in Markdown."""
    lines = [
        "# Predicted against measured gain",
        "",
        f"`widerf.init.apply(model, {STRENGTH})`: the ratio of ERF stds, after over before, that its report",
        f"predicts against `widerf.measure` on {IMAGES} images for each set of weights, the same before and after. The",
        "measured ratio is that of the mean maps; ± is its standard error over sets of weights",
        "(jackknife). Made by `python -m experiments.roads.gain`; rows in [gain.jsonl](gain.jsonl).",
        "",
        "| network | sets of weights | std before | measured gain | predicted gain | predicted/measured |",
        "|---|---|---|---|---|---|",
    ]
    for series in SERIES:
        mine = [row for row in rows if row["series"] == series.name]
        if len(mine) > 1:
            gain, error = ratio(mine, f"{STRENGTH:g}")
            told = foretold(mine, f"{STRENGTH:g}")
            before = std_of(row["measured"]["0"] for row in mine)
            cells = [series.name, str(len(mine)), f"{before:.2f}", f"{gain:.4f} ± {error:.4f}", f"{told:.4f}"]
            lines.append("| " + " | ".join([*cells, f"{told / gain:.4f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do the rows that are missing, a few seeds of every network at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and the table")
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    arguments = parser.parse_args()
    known = {case.name: case for case in cases()}
    seeds = range(max(series.seeds for series in SERIES))
    jobs = {(s.name, seed): (s, known[s.case], seed) for seed in seeds for s in SERIES if seed < s.seeds}
    warnings.simplefilter("ignore", UserWarning)
    rows = ledger(arguments.out).fill({} if arguments.table else jobs, lambda job: one(*job))
    (arguments.out / "gain.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
