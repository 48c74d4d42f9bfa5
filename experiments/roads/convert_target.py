"""``convert(target=1.5)`` on well-known models: is the wanted ERF met, or the largest possible one named?

``python -m experiments.roads.convert_target`` converts each model, fresh, and writes ``docs/results/convert-target.md``
with its rows, ``convert-target.jsonl``. A model that has a row is not done again; ``--models`` picks some. Nothing is
trained; the figures are those of `widerf.predict` before and after, and of a look at every sparse layer.
"""

from __future__ import annotations

import argparse
import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import widerf
from experiments.harness.inputs import InputError, main_guard
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record, write_whole
from widerf.sparse.layer import SparseConv

TARGET, TOLERANCE = 1.5, 0.03
_REFUSED = re.compile(r"target must be at most ([\d.]+), the largest predicted gain")


class UNet(nn.Module):
    """Two levels down and up again, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.down1, self.down2 = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1)
        self.bottom = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2, self.join1 = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, 3, h, w), h and w multiples of 4, to (batch, 5, h, w)."""
        a = self.enter(x).relu()
        b = self.down1(a).relu()
        y = self.bottom(self.down2(b).relu())
        y = self.join2(torch.cat([self.up2(y), b], 1)).relu()
        return self.head(self.join1(torch.cat([self.up1(y), a], 1)).relu())  # type: ignore[no-any-return]


class TCN(nn.Module):
    """Residual blocks on one axis, dilations 1, 2, 4 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(4, 32, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv1d(32, 32, 3, padding=d, dilation=d) for d in (1, 2, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, 4, length) to (batch, 32, length)."""
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x.relu())
        return x


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        if name.startswith("deeplab"):
            made: nn.Module = getattr(models.segmentation, name)(weights=None, weights_backbone=None)
        else:
            made = getattr(models, name)(weights=None, **options)
        return made

    return build


@dataclass(frozen=True)
class Case:
    """A model and the size of its input, (channels, *spatial)."""

    build: Callable[[], nn.Module]
    size: tuple[int, ...]


CASES = {
    "TCN": Case(TCN, (4, 256)),
    "U-Net": Case(UNet, (3, 64, 64)),
    **{name: Case(_torchvision(name), (3, 448, 448)) for name in ("mobilenet_v3_large", "efficientnet_b0", "resnet50")},
    "convnext_tiny": Case(_torchvision("convnext_tiny"), (3, 224, 224)),
    "convnext_tiny, layer_scale 1": Case(_torchvision("convnext_tiny", layer_scale=1.0), (3, 224, 224)),
    "deeplabv3_resnet50": Case(_torchvision("deeplabv3_resnet50"), (3, 224, 224)),
}


def shared_factor(layer: SparseConv) -> int:
    """Return the largest factor that the spacing of some group's taps shares with the stride: 1 is as it should be."""
    worst = 1
    for axis, (stride, dilation) in enumerate(zip(layer.stride, layer.dilation, strict=True)):
        for places in (layer.offsets[..., axis] * dilation).tolist():
            spacing = math.gcd(*(place - places[0] for place in places))
            worst = max(worst, math.gcd(spacing, stride) if spacing else 1)
    return worst


def examine(case: Case) -> Record:
    """Convert a fresh model to the target, or to the largest possible, and say what came of it."""
    torch.manual_seed(0)
    model, started, largest = case.build().eval(), time.process_time(), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", widerf.ClippedWarning)
        try:
            report = widerf.convert(model, target=TARGET, input_size=case.size)
        except ValueError as error:
            refused = _REFUSED.match(str(error))
            if refused is None:
                raise
            largest = float(refused[1])
            wanted = largest if largest > 1 else None  # with silent branches no window shows: those by the maps, then
            report = widerf.convert(model, target=wanted, input_size=case.size)
    sparse = [(row, model.get_submodule(row.name)) for row in report if row.converted]
    wide = [
        row.name
        for row, layer in sparse
        if any((s - 1) * d + 1 > m for s, d, m in zip(layer.extent, layer.dilation, row.map_size, strict=True))
    ]
    assert report.erf_std is not None
    return {
        "size": list(case.size),
        "convolutions": len(report.rows),
        "sparse": len(sparse),
        "widest": max(max(row.extent or (0,)) for row, _ in sparse),
        "asked": TARGET,
        "largest": largest,
        "gain": report.gain,
        "std": list(report.erf_std),
        "kurtosis": None if report.erf_kurtosis is None else list(report.erf_kurtosis),
        "off_map": wide,
        "strided_grids": [row.name for row, layer in sparse if shared_factor(layer) > 1],
        "weights": list(report.weights or ()),
        "warnings": list(report.warnings),
        "seconds": round(time.process_time() - started, 1),
    }


def verdict(row: Record) -> str:
    """Say whether the target was met, or which largest gain was named and met."""
    if row["largest"] is not None and row["largest"] <= 1:
        return f"refused; largest named {row['largest']:.3f}"
    wanted = row["asked"] if row["largest"] is None else row["largest"]
    off = row["gain"] / wanted - 1
    met = "met" if abs(off) <= TOLERANCE else "MISSED"
    return (
        f"{met} ({off:+.1%})" if row["largest"] is None else f"refused; largest named {wanted:.3f}, {met} ({off:+.1%})"
    )


METHOD = f"""\
Made by `python -m experiments.roads.convert_target`: each model fresh (seed 0, the initialisation it is built
with, in eval mode), one draw of taps; target: a predicted ERF {TARGET:g} times as wide, within {TOLERANCE:.0%}.
Where no windows within their maps reach it, `convert` refuses and names the largest gain, which is asked for then; if
that is 1, the branches are silent at these weights (ConvNeXt's layer scale of 1e-6), and the windows are those by the
maps. Std in input pixels and excess kurtosis are those of `widerf.predict`, before → after. *Off the map*: sparse
layers whose window is wider than their map. *Strided grids*: sparse layers whose taps' spacing shares a factor with the
stride. Seconds of processor time. Raw rows: [convert-target.jsonl](convert-target.jsonl)."""


def page(rows: Sequence[Record]) -> str:
    """Return the page."""
    bad = [row["model"] for row in rows if row["off_map"] or row["strided_grids"] or "MISSED" in verdict(row)]
    met = sum(row["largest"] is None and row["model"] not in bad for row in rows)
    named = sum(row["largest"] is not None and row["model"] not in bad for row in rows)
    missing = [name for name in CASES if name not in {row["model"] for row in rows}]
    head = f"{met} of {len(rows)} models meet ×{TARGET:g}, {named} name the largest possible"
    lines = [
        f"# `convert(target={TARGET:g})`: {head}" + (f"; faults in {', '.join(bad)}" if bad else ""),
        "",
        METHOD,
        "",
        "| model | input | sparse layers | widest window | target | gain | std | excess kurtosis | off the map | "
        "strided grids | seconds |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        kurtosis = "–" if row["kurtosis"] is None else "{:+.2f} → {:+.2f}".format(*row["kurtosis"])
        cells = [row["model"], "×".join(map(str, row["size"])), f"{row['sparse']} of {row['convolutions']}"]
        cells += [str(row["widest"]), verdict(row), f"{row['gain']:.3f}", "{:.2f} → {:.2f}".format(*row["std"])]
        cells += [kurtosis, str(len(row["off_map"])), str(len(row["strided_grids"])), f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {row['model']}: {note}." for row in rows for note in row["warnings"]]
    lines += ["", "What the reports warn of:", "", *notes] if notes else []
    lines += ["", f"Not run yet: {'; '.join(missing)}."] if missing else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Convert what has no row yet, and write the page."""
    line = argparse.ArgumentParser("experiments.roads.convert_target", description=__doc__.split("\n")[0])
    line.add_argument("--models", nargs="+", default=list(CASES), metavar="MODEL", help=", ".join(CASES))
    line.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and the page")
    line.add_argument("--again", action="store_true", help="also models that have a row")
    options = line.parse_args(arguments)
    if unknown := [name for name in options.models if name not in CASES]:
        raise InputError(f"--models must be of {', '.join(CASES)}, got {unknown[0]}")
    ledger = Ledger(options.out / "convert-target.jsonl", ("model",))
    there = options.out / "convert-target.md"

    def write(_: object = None) -> None:
        by = {row["model"]: row for row in ledger.rows()}
        write_whole(there, page([by[name] for name in CASES if name in by]))

    ledger.fill({(name,): CASES[name] for name in options.models}, examine, again=options.again, after=write)
    write()
    print(f"page: {there}")


if __name__ == "__main__":
    main_guard(main)
