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
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import widerf
from widerf.erf.prediction import expected_energy
from widerf.trace.site import check_unit, spatial_layer

RESULTS = Path(__file__).parents[2] / "docs" / "results"
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


class Block(nn.Module):
    """Two 3×3 convolutions with a skip; the ReLU comes after the addition, as in the paper."""

    def __init__(self, channels: int, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(2):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels)] if norm else []
            layers += [nn.ReLU()] if index == 0 else []
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum."""
        return torch.relu(x + self.branch(x))


def plain(activation: type[nn.Module], channels: int = 32, depth: int = 20) -> nn.Module:
    """A stack of 3×3 convolutions, He-normal."""
    layers: list[nn.Module] = []
    for index in range(depth):
        conv = nn.Conv2d(3 if index == 0 else channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu" if activation is nn.ReLU else "linear")
        layers += [conv, activation()]
    return nn.Sequential(*layers)


def residual(norm: bool, channels: int = 32, blocks: int = 17) -> nn.Module:
    """The paper's ResNet of 17 blocks without downsampling."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.ReLU(), *(Block(channels, norm) for _ in range(blocks))
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def timm_model(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    """Builder of a timm model with its own initialisation."""

    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **arguments)
        return model

    return build


def convnext() -> nn.Module:
    """ConvNeXt-atto at layer scale 1: at timm's 1e-6 its branches are silent."""
    model = timm_model("convnext_atto")()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    return model


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    training: bool
    draws: int = 128

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size of the images."""
        return (3, self.size, self.size)


def cases() -> list[Case]:
    """All rows, cheap ones first."""
    resnets = {n: timm_model(n, zero_init_last=False) for n in ("resnet18", "resnet50")}
    others: dict[str, Callable[[], nn.Module]] = {
        "mobilenetv3_large_100": timm_model("mobilenetv3_large_100"),
        "regnety_002, no zero init": timm_model("regnety_002", zero_init_last=False),
        "efficientnet_b0": timm_model("efficientnet_b0"),
        "densenet121": timm_model("densenet121"),
    }
    rows = [
        Case("plain 20, linear", lambda: plain(nn.Identity), 61, False, 512),
        Case("plain 20, ReLU", lambda: plain(nn.ReLU), 61, False, 512),
        Case("ResNet of 17 blocks, no BN", lambda: residual(norm=False), 97, False, 256),
        Case("ResNet of 17 blocks, BN in train mode", lambda: residual(norm=True), 97, True, 256),
        Case("convnext_atto, layer scale 1", convnext, 224, False),
    ]
    for training in (True, False):
        mode = "train" if training else "eval"
        rows += [Case(f"{n}, {mode}", b, 224, training) for n, b in (resnets | others).items()]
    order = {"densenet121": 2, "resnet50": 1}
    return sorted((noisy(row) for row in rows), key=lambda row: order.get(row.name.split(",")[0], 0))


# For road "same" only: batch statistics are nearly all that widens this one's ERF.
SILENT = Case("resnet18, silent branches, train", timm_model("resnet18"), 224, True)


def noisy(case: Case) -> Case:
    """More draws for networks with few depthwise channels, whose maps scatter most."""
    few_channels = case.name.startswith(("mobilenetv3", "regnety", "efficientnet"))
    return replace(case, draws=480 if case.training else 160) if few_channels else case


def built(case: Case, seed: int) -> nn.Module:
    """The case's model with weights drawn from ``seed``."""
    torch.manual_seed(seed)
    return case.build().train(case.training)


def redraw(case: Case) -> Callable[[nn.Module, torch.Generator], None]:
    """Re-initialise by building the model anew."""

    def again(model: nn.Module, generator: torch.Generator) -> None:
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        model.load_state_dict(case.build().state_dict())

    return again


def measured(case: Case, cache: Path) -> dict[str, Any]:
    """Std with its interval over redrawn weights; the map goes to ``cache``."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        erf = widerf.measure(
            built(case, 0), case.input_size, samples=case.draws, redraw=redraw(case),
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
    erf.save(cache / f"{case.name}.npz")
    assert erf.blocks is not None and erf.block_samples is not None
    low, high = erf.interval("std")
    return {
        "std": erf.std, "low": low, "high": high, "se": erf.standard_error("std"), "draws": erf.samples,
        "clipped": erf.clipped, "ceiling": ceiling(erf.blocks, torch.tensor(erf.block_samples)),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def predicted(case: Case, cache: Path) -> dict[str, Any]:
    """Std and map correlation for the first set of weights, for all sets, and for the mean of their maps."""
    truth_file = cache / f"{case.name}.npz"
    if not truth_file.exists():
        return {}
    truth = widerf.ERF.load(truth_file)
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
    site = spatial_layer(model, case.input_size)
    unit = check_unit(None, site.spatial_shape)
    _, found, log_scale = expected_energy(model, case.input_size, site, unit, image_seed)
    return found, math.log(float(found.sum())) + log_scale


def same(case: Case, cache: Path) -> dict[str, Any]:
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


def done(case: Case, road: str, rows: dict[tuple[str, str], dict[str, Any]]) -> bool:
    """Whether the road has a row of the case at today's number of draws."""
    row = rows.get((case.name, road), {})
    if road == "same":
        return row.get("signs") == SIGNS
    return ("ceiling" if road == "measured" else "se_of_mean") in row and row.get(
        "draws" if road == "measured" else "against"
    ) == case.draws


def load(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Latest row per case and road."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["case"], row["road"]): row for row in rows}


def table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
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


def same_table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
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
    file = RESULTS / "agreement.jsonl"
    if options.road == "table":
        (RESULTS / "agreement.md").write_text(HEADER + table(load(file)) + "\n")
        return
    options.cache.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for case in [*cases(), SILENT] if options.road == "same" else cases():
        if options.only not in case.name or (done(case, options.road, load(file)) and not options.again):
            continue
        row = {"measured": measured, "predicted": predicted, "same": same}[options.road](case, options.cache)
        if row:
            with file.open("a") as out:
                out.write(
                    json.dumps({"case": case.name, "road": options.road, "threads": torch.get_num_threads(), **row})
                    + "\n"
                )
            print(case.name, options.road, {k: v for k, v in row.items() if k != "correlations"}, flush=True)


if __name__ == "__main__":
    main()
