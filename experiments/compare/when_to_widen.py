"""``docs/results/when-to-widen.md``: the sentences are a template, every figure in them comes from the raw rows.

python -m experiments.compare.when_to_widen
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import jinja2

from experiments.compare.protocol import protocol
from experiments.compare.study import ledger
from experiments.compare.study_page import accuracies, verdict_of
from experiments.compare.verdict import Row, Verdict
from experiments.gpu.evidence_page import cells, ratio, read
from experiments.harness.ledger import RESULTS
from experiments.harness.runs import write_whole
from experiments.harness.statistics import Estimate, paired_difference

CARD = "nvidia-h200"
FIRST = {"first cifar10": (0.5, 600)}  # series before the studies: target and budget


@cache
def verdict(study: str, depth: int = 0, radius: int = 0) -> Verdict | None:
    """Return the verdict on a cell of a study, or on a first series; None without that cell or its baseline."""
    if study == CARD:
        found = cells(read(RESULTS, CARD).get("far-pair", []))
        return found.get(f"far-pair depth {depth} radius {radius}")
    if study in FIRST:
        lines = (RESULTS / f"{study.removeprefix('first ')}.jsonl").read_text().splitlines()
        return Verdict([json.loads(line) for line in lines], *FIRST[study])
    about = protocol(study)
    rows = ledger(about, RESULTS / f"study-{study}.jsonl").rows()
    wanted = {"depth": depth, "radius": radius} if depth else about.cells[0].options
    cell = next((cell for cell in about.cells if cell.options == wanted), None)
    return None if cell is None else verdict_of(cell, about, rows)


def row(study: str, arm: str, depth: int = 0, radius: int = 0) -> Row | None:
    """Return an arm's row; None where it was not run."""
    found = verdict(study, depth, radius)
    return None if found is None else next((row for row in found.rows if row.arm == arm), None)


def interval(estimate: Estimate, digits: int = 2) -> str:
    """Write an estimate with its interval."""
    return f"{estimate.mean:.{digits}f} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def steps(study: str, arm: str, depth: int = 0, radius: int = 0) -> str:
    """Write an arm's ratio of steps; bold where it is clear, with runs that never arrived."""
    found = row(study, arm, depth, radius)
    if found is None:
        return "not run"
    never = f", {found.missed} of {found.n} never" if found.missed else ""
    if found.steps_ratio is None:
        return f"1{never}"
    base = row(study, "he", depth, radius)
    if base is not None and base.missed == base.n and found.missed == found.n:
        return f"none of {found.n} arrives, He neither"
    return ratio(found) + never


def seconds(study: str, arm: str, depth: int = 0, radius: int = 0) -> str:
    """Write an arm's ratio of seconds to the target."""
    found = row(study, arm, depth, radius)
    return "not run" if found is None or found.seconds_ratio is None else interval(found.seconds_ratio)


def points(study: str, arm: str) -> str:
    """Write an arm's difference of accuracy, in points, with p after Holm and the number of pairs."""
    found = verdict(study)
    for each, gap, p in accuracies(found) if found else []:
        if each.arm == arm and gap is not None and p is not None:
            return f"{gap.mean:+.1f} points ({gap.low:+.1f} to {gap.high:+.1f}, n {gap.n}, p {p:.2g})"
    return "not run"


def after(study: str, arm: str, depth: int, radius: int) -> str:
    """Write the difference of an arm's measured ERF std after training to He's, in pixels, paired by seed."""
    found = verdict(study, depth, radius)
    pairs = zip(*found.pairs(arm), strict=True) if found else ()
    stds = [[end["erf_after"]["std"] for end in pair] for pair in pairs if all(end["erf_after"] for end in pair)]
    if not stds:
        return "not run"
    gap = paired_difference(*zip(*stds, strict=True))
    return f"{gap.mean:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"


def text() -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # Markdown, nothing of it from outside
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("when-to-widen.md").render(
        steps=steps, seconds=seconds, points=points, row=row, verdict=verdict, after=after, CARD=CARD
    )


if __name__ == "__main__":
    write_whole(RESULTS / "when-to-widen.md", text())
    print(RESULTS / "when-to-widen.md")
