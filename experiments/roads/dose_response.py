"""Dose and response: the measured std of the ERF against strength, with the theory's curve.

``python -m experiments.roads.dose_response`` draws the rows of ``docs/results/gain.jsonl`` (made by ``python -m
experiments.roads.gain``) as ``docs/results/dose_response.png``, with a table in ``docs/results/dose_response.md`` and
the raw figures in ``docs/results/dose_response.csv``. Theory: variance is linear in strength, so that std(s)/std(0) =
√(1 + s·(g² − 1)), where g is the gain that the prediction gives for strength 1.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.harness.ledger import RESULTS
from experiments.roads.gain import IMAGES, SERIES, foretold, ledger, ratio

STRENGTHS = ("0.25", "0.5", "0.75", "1")
COLUMNS = ["network", "strength", "sets_of_weights", "measured", "standard_error", "predicted", "theory"]


def theory(strength: float, full: float) -> float:
    """Return std(s)/std(0) for the ratio ``full`` at strength 1: variance is linear in strength."""
    return math.sqrt(1 + strength * (full**2 - 1))


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line for each network and strength."""
    lines: list[dict[str, Any]] = []
    for series in SERIES:
        mine = [row for row in rows if row["series"] == series.name]
        if len(mine) < 2 or len(series.strengths) < len(STRENGTHS):
            continue
        full = foretold(mine, "1")
        lines.append(dict(zip(COLUMNS, (series.name, 0.0, len(mine), 1.0, 0.0, 1.0, 1.0), strict=True)))
        for strength in STRENGTHS:
            gain, error = ratio(mine, strength)
            told, law = foretold(mine, strength), theory(float(strength), full)
            lines.append(
                dict(zip(COLUMNS, (series.name, float(strength), len(mine), gain, error, told, law), strict=True))
            )
    return lines


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw measured points with their standard errors over the theory's curve, one panel for each network."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(line["network"] for line in lines))
    made = Figure(figsize=(9.6, 2.9 * math.ceil(len(names) / 2)), layout="constrained")
    panels = made.subplots(math.ceil(len(names) / 2), 2, squeeze=False, sharex=True).ravel()
    for panel, name in zip(panels, names, strict=False):
        mine = [line for line in lines if line["network"] == name]
        dose = [line["strength"] for line in mine]
        full = next(line["predicted"] for line in mine if line["strength"] == 1.0)
        grid = [i / 50 for i in range(51)]
        panel.plot(
            grid, [theory(s, full) for s in grid], color="tab:orange", label="theory: variance linear in strength"
        )
        panel.plot(dose, [line["predicted"] for line in mine], "x", color="tab:green", label="predicted")
        panel.errorbar(
            dose, [line["measured"] for line in mine], yerr=[1.96 * line["standard_error"] for line in mine],
            fmt="o", color="tab:blue", capsize=3, label="measured, 95 % interval",
        )  # fmt: skip
        panel.set_title(f"{name} ({mine[0]['sets_of_weights']} sets of weights)", fontsize="small")
        panel.set_ylabel("ERF std / std at 0")
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    panels[0].legend(fontsize="x-small")
    for panel in panels[-2:]:
        panel.set_xlabel("strength")
    made.savefig(path, dpi=90)


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    text = [
        "# Dose and response",
        "",
        "![Measured std of the ERF against strength, with the theory's curve, on four networks](dose_response.png)",
        "",
        f"Ratio of the ERF's std to that at strength 0. Measured: `widerf.measure`, {IMAGES} images for each set of",
        "weights, the same at all strengths; ratio of mean maps, ± standard error over sets of weights (jackknife).",
        "Predicted: `widerf.predict`. Theory: √(1 + s·(g² − 1)), g the predicted ratio at strength 1. Made by",
        "`python -m experiments.roads.gain` and `python -m experiments.roads.dose_response`; raw figures in",
        "[dose_response.csv](dose_response.csv).",
        "",
        "| network | sets of weights | strength | measured | predicted | theory |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        if line["strength"]:
            cells = [line["network"], line["sets_of_weights"], f"{line['strength']:g}"]
            cells += [f"{line['measured']:.3f} ± {line['standard_error']:.3f}"]
            cells += [f"{line['predicted']:.3f}", f"{line['theory']:.3f}"]
            text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Draw what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows, the figure and the table")
    out = parser.parse_args().out
    lines = figures(ledger(out).rows())
    with (out / "dose_response.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    draw(lines, out / "dose_response.png")
    (out / "dose_response.md").write_text(table(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
