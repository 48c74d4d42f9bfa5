"""Do the two roads agree? ``predict`` on one set of weights against ``measure`` averaged over redrawn weights.

    python -m experiments.roads.agreement --road measured --cache /tmp/agreement   # hours; picks up where it stopped
    python -m experiments.roads.agreement --road predicted --cache /tmp/agreement  # minutes
    python -m experiments.roads.agreement --road same --only convnext    # where single predictions scatter: why
    python -m experiments.roads.agreement --road table

Each case is measured with a fixed number of redraws, chosen for a standard error of std of at most 0.5 % and a map that
the truth would correlate with by at least 0.99. Rows go to ``docs/results/agreement.jsonl``, the table to
``docs/results/agreement.md``; measured maps stay in ``--cache``. A case that has a row with as many draws is skipped.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import widerf
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record
from experiments.roads.cases import SILENT, Case, built, cases, redraw
from widerf.erf.prediction import expected_energy
from widerf.trace.scene import Scene

ROADS = ("measured", "predicted")
SIGNS = 24  # draws of signs for one image and one set of weights
SETS = 8  # of weights, of road "same"
WEIGHT_DRAWS = 32  # sets of weights that predict is tried on, each with its own image, to show its scatter


HEADER = f"""# Do the two roads to the ERF agree?

Made by `python -m experiments.roads.agreement --road measured`, then `--road predicted`, then `--road table`; 2-core
AMD EPYC (Zen 1, AVX2), one thread, shared with other work, so that the seconds are upper bounds.

- *Measured*: `measure(redraw=...)`, each draw with new weights from the model's own initialisation, a new N(0, 1) image
  and random signs over the unit's channels; std of the energy map in input pixels with its 95 % interval.
- *Predicted*: `predict` on weights that the measurement never saw. One run takes one set of weights and one fixed image
  as they are: the figure for the first set, then that of the mean energy map of {WEIGHT_DRAWS} sets, each with an image
  of its own, with its standard error (jackknife): the ERF itself differs between weights and between images.
  Like the measured mean over redraws, that mean lets sets with large gradients count for more.
- The image leaves its mark: with one image for all sets, and 8 of them, the mean's correlation was 0.973 for
  convnext_atto and 0.951 for efficientnet_b0 in train mode, where scatter alone let expect 0.988 and 0.973
  (this page as it was at commit f977fdc).
- *Map correlation* over all pixels, of the first set's map and of the mean of the sets' maps with the measured map; in
  brackets what scatter alone lets expect of the latter if both roads had the same true map (product of the correlations
  that it would have with the two means). The scatter of the sets' total energy is counted in, so that this is rather
  too low where that is large.
- Batch norm in train mode sees one image on both roads.
- The weights of mobilenetv3_large_100 in eval mode, where batch norm does not normalise, have gradients whose energies
  differ by a factor of 10⁴ between sets; a mean of energies is then that of very few sets, and neither 160 draws nor 8
  sets tell it. The second table has that case with the weights fixed.
- How many draws: the numbers are fixed before a case is measured. The first plan (512, 256 and, at 224², 128) was cut
  to 32 at 224² for time; four cases measured so had standard errors of up to 0.74 % in std and noise that kept the true
  map's own correlation at 0.955 to 0.983. They were thrown away for that noise, not for their agreement, and all cases
  at 224² measured anew with 128 draws, 160 where the noise of those four asked for more. At those 160, three networks
  in train mode kept the true map's own correlation at 0.991, too near to the wanted 0.99, and were measured with 480.

"""


def measured_map(case: Case, cache: Path) -> Path:
    """Where the measured map of the case lies."""
    return cache / f"{case.name}.npz"


def measured(case: Case, cache: Path) -> Record:
    """Std with its interval over redrawn weights; the map goes to ``cache``."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        erf = widerf.measure(
            built(case, 0), case.input_size, samples=case.draws, redraw=redraw(case),
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
    erf.save(measured_map(case, cache))
    assert erf.blocks is not None and erf.block_samples is not None
    low, high = erf.interval("std")
    return {
        "std": erf.std, "low": low, "high": high, "se": erf.standard_error("std"), "draws": erf.samples,
        "clipped": erf.clipped, "ceiling": ceiling(erf.blocks, torch.tensor(erf.block_samples)),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def predicted(case: Case, cache: Path) -> Record:
    """Std and map correlation for the first set of weights, for all sets, and for the mean of their maps."""
    truth = widerf.ERF.load(measured_map(case, cache))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        widerf.predict(built(case, 1000), case.input_size)
    seconds = time.perf_counter() - start
    pairs = [energy(built(case, 1000 + seed), case, seed) for seed in range(WEIGHT_DRAWS)]
    erfs = [widerf.ERF.from_energy(found, center=truth.center, clipped=0.0) for found, _ in pairs]
    weights = torch.tensor([log for _, log in pairs]).softmax(0) * len(pairs)
    stack = torch.stack([erf.map for erf in erfs]) * weights.view(-1, 1, 1)
    mean = widerf.ERF.from_energy(
        stack.mean(0), center=truth.center, clipped=0.0, blocks=stack, block_samples=[1] * len(stack)
    )
    return {
        "against": truth.samples, "stds": [erf.std for erf in erfs], "weights": weights.tolist(),
        "correlations": [correlation(erf.map, truth.map) for erf in erfs],
        "std_of_mean": mean.std, "se_of_mean": mean.standard_error("std"),
        "correlation_of_mean": correlation(mean.map, truth.map), "ceiling": ceiling(stack, torch.ones(len(stack))),
        "seconds": seconds,
    }  # fmt: skip


def energy(model: nn.Module, case: Case, image_seed: int) -> tuple[Tensor, float]:
    """Predicted energy map of the centre unit, and the logarithm of its sum on its true scale."""
    found, log_scale = expected_energy(replace(Scene.of(model, case.input_size), image_seed=image_seed))
    return found, math.log(float(found.sum())) + log_scale


def same(case: Case, cache: Path) -> Record:
    """Measure with the weights and the very image that each single prediction had: only signs are drawn."""
    image = torch.randn((1, *case.input_size), generator=torch.Generator().manual_seed(0)).expand(SIGNS, -1, -1, -1)
    stds, errors, guesses = [], [], []
    for seed in range(SETS):
        model = built(case, 1000 + seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            erf = widerf.measure(model, case.input_size, inputs=image, samples=SIGNS, batch_size=1)
            guesses.append(widerf.predict(model, case.input_size).std)
        stds.append(erf.std)
        errors.append(erf.standard_error("std"))
    return {"signs": SIGNS, "measured": stds, "errors": errors, "predicted": guesses}


def ceiling(blocks: Tensor, counts: Tensor) -> float:
    """Correlation that the true map would have with a mean of maps, from their scatter; ``blocks`` are sums of maps."""
    blocks, counts = blocks.double(), counts.double().view(-1, *(1 for _ in blocks.shape[1:]))
    mean = blocks.sum(0) / counts.sum()
    scatter = ((blocks / counts - mean) ** 2 * counts).sum(0) / (len(counts) - 1)
    noise = (scatter / counts.sum()).sum()
    return float((1 - noise / (mean - mean.mean()).square().sum()).clamp(min=0).sqrt())


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two maps over their pixels."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def done(case: Case, road: str, rows: dict[tuple[str, str], Record]) -> bool:
    """Whether the road has a row of the case at today's number of draws."""
    row = rows.get((case.name, road), {})
    if road == "same":
        return row.get("signs") == SIGNS
    return ("ceiling" if road == "measured" else "se_of_mean") in row and row.get(
        "draws" if road == "measured" else "against"
    ) == case.draws


def ledger(folder: Path) -> Ledger:
    """Table of the rows, one for each case and road."""
    return Ledger(folder / "agreement.jsonl", ("case", "road"))


def load(folder: Path) -> dict[tuple[str, str], Record]:
    """Latest row per case and road."""
    return {(row["case"], row["road"]): row for row in ledger(folder).rows()}


def table(rows: dict[tuple[str, str], Record]) -> str:
    """The table as Markdown."""
    lines = [
        "| case | measured std (95 % interval), draws | predicted std, first weights | off | mean of "
        f"{WEIGHT_DRAWS} weights ± standard error | off | map correlation, first / mean (expected) | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        truth, guess = rows.get((case.name, "measured")), rows.get((case.name, "predicted"))
        if truth is None or guess is None or not all(done(case, road, rows) for road in ROADS):
            continue
        first, mean, spread = guess["stds"][0], guess["std_of_mean"], guess["se_of_mean"]
        lines.append(
            f"| {case.name}, {case.size}² | {truth['std']:.2f} ({truth['low']:.2f} – {truth['high']:.2f}), "
            f"{truth['draws']} | {first:.2f} | {first / truth['std'] - 1:+.1%} | {mean:.2f} ± {spread:.2f} | "
            f"{mean / truth['std'] - 1:+.1%} | {guess['correlations'][0]:.4f} / "
            f"{guess['correlation_of_mean']:.4f} ({truth['ceiling'] * guess['ceiling']:.4f}) | "
            f"{truth['seconds']:.0f} / {guess['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n\n" + same_table(rows)


def same_table(rows: dict[tuple[str, str], Record]) -> str:
    """What is left of the scatter where both roads have the same weights and the same image."""
    lines = [
        "Single predictions against `measure` with the same weights and the same image, where only the signs are drawn",
        f"(`--road same`, {SIGNS} draws each): single predictions scatter because the ERF itself does, between images",
        "and between weights, as far as the two go along.",
        "",
        f"| case | measured, {SETS} sets of weights, mean ± sd | its standard error | predicted / measured "
        "± sd | correlation |",
        "|---|---|---|---|---|",
    ]
    for (name, road), row in rows.items():
        if road != "same":
            continue
        truth, guess = torch.tensor(row["measured"]), torch.tensor(row["predicted"])
        error, ratio = float(torch.tensor(row["errors"]).mean()), guess / truth
        lines.append(
            f"| {name} | {truth.mean():.2f} ± {truth.std():.2f} | {error:.2f} | {ratio.mean():.3f} ± {ratio.std():.3f} "
            f"| {correlation(truth, guess):.3f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run one road over all cases that lack it, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--road", choices=(*ROADS, "same", "table"), required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/agreement"), help="where measured maps lie")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--again", action="store_true", help="also where a row exists")
    options = parser.parse_args(argv)
    road, rows = options.road, load(RESULTS)
    if road == "table":
        (RESULTS / "agreement.md").write_text(HEADER + table(rows) + "\n")
        return
    options.cache.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in ([*cases(), SILENT] if road == "same" else cases()) if options.only in case.name]
    todo = [case for case in chosen if options.again or not done(case, road, rows)]
    if road == "predicted":
        for case in [case for case in todo if not measured_map(case, options.cache).exists()]:
            print(f"{case.name}: passed over, it has no measured map in {options.cache}")
            todo.remove(case)
    work = {"measured": measured, "predicted": predicted, "same": same}[road]
    ledger(RESULTS).fill(
        {(case.name, road): case for case in todo},
        lambda case: {"threads": torch.get_num_threads(), **work(case, options.cache)},
        again=True,  # what is done with fewer draws is done anew
        after=lambda row: print({k: v for k, v in row.items() if k != "correlations"}, flush=True),
    )


if __name__ == "__main__":
    main()
