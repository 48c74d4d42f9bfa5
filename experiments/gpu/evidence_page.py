"""The page of what a card's evidence says so far: ``python -m experiments.gpu.evidence_page nvidia-h200``.

Every figure comes from the rows ``docs/results/evidence-CARD-PART.jsonl``. The settings of the pattern study have a
page of their own, ``python -m experiments.patterns.regret``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from experiments.compare.protocol import protocol
from experiments.compare.verdict import Row, Verdict
from experiments.harness import markdown
from experiments.harness.inputs import InputError, main_guard
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record, write_whole


def read(folder: Path, card: str) -> dict[str, list[Record]]:
    """Return the rows of each part that ran on a card, those of runs that failed left out."""
    files = sorted(folder.glob(f"evidence-{card}-*.jsonl"))
    found = {path.stem.removeprefix(f"evidence-{card}-"): Ledger(path, ("run", "arm", "seed")).rows() for path in files}
    return {part: [row for row in rows if "failed" not in row] for part, rows in found.items()}


def cells(rows: Sequence[Record]) -> dict[str, Verdict]:
    """Return the verdict on each far-pair cell, by its name; seconds and ERFs are not in these rows."""
    by: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        aside = {"task": row["run"], "seconds": None, "erf_before": None, "erf_after": None}
        by[row["run"]].append({**row, **aside, "arm": row["arm"].partition(": ")[2]})
    return {run: Verdict(those, protocol("far-pair").target, those[0]["budget"]) for run, those in by.items()}


def _cell(run: str, verdict: Verdict) -> list[str]:
    """Return the table of one far-pair cell."""
    base, *others = sorted(verdict.rows, key=lambda row: row.arm != verdict.baseline)
    table = [
        (row.arm, ratio(row), f"{row.p_adjusted:.2g}", f"{row.missed} of {row.n}")
        for row in others
        if row.p_adjusted is not None
    ]
    told = f"He: median {base.steps:.0f} steps, {base.missed} of {base.n} never arrive within {verdict.longest}."
    return [f"### {run}", "", told, "", *markdown.table(("arm", "steps / He's", "p (Holm)", "never"), table)]


def ratio(row: Row) -> str:
    """Write the ratio of an arm's steps with its interval, bold where it is clear."""
    assert row.steps_ratio is not None, row.arm
    text = f"{row.steps_ratio.mean:.2f} ({row.steps_ratio.low:.2f}–{row.steps_ratio.high:.2f})"
    return f"**{text}**" if row.clear else text


def page(parts: dict[str, list[Record]], card: str) -> str:
    """Return the page in Markdown."""
    row = next(row for rows in parts.values() for row in rows)
    lines = [
        f"# Evidence from a card: {row['device'].removeprefix('cuda: ')}",
        "",
        f"PyTorch {row['torch']}. Made by `python -m experiments.gpu evidence --part N`, this page by "
        f"`python -m experiments.gpu.evidence_page {card}`; every row is beside it. Several parts shared the card.",
    ]
    if "far-pair" in parts:
        lines += [
            "",
            "## Far-pair: do the weights pay?",
            "",
            "Steps to the target against He's, as ratios of restricted means over paired seeds, BCa 95 % intervals; "
            "one rate, fixed beforehand; all networks of an arm stacked, all arms on the same batches. **Bold**: the "
            "interval is clear of 1 and p after Holm over the arms of the cell is below .05.",
        ]
        for run, verdict in cells(parts["far-pair"]).items():
            lines += ["", *_cell(run, verdict)]
    if any(part.startswith("patterns-") for part in parts):
        lines += ["", "## Patterns", "", "See [what each pattern loses at worst](patterns-regret.md)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line and write the page."""
    line = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    line.add_argument("card", help="as in the names of the files, such as nvidia-h200")
    line.add_argument("--folder", type=Path, default=RESULTS, help="of the rows and the page")
    options = line.parse_args()
    parts = read(options.folder, options.card)
    if not any(parts.values()):
        raise InputError(f"--folder must hold evidence-{options.card}-*.jsonl with rows, got {str(options.folder)!r}")
    path = options.folder / f"evidence-{options.card}.md"
    write_whole(path, page(parts, options.card))
    print(path)


if __name__ == "__main__":
    main_guard(main)
