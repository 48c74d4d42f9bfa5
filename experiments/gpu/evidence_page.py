"""The page of what a card's evidence says so far: ``python -m experiments.gpu.evidence_page nvidia-h200``.

Every figure comes from the rows ``docs/results/evidence-CARD-PART.jsonl``. The settings of the pattern study have a
page of their own, ``python -m experiments.patterns.regret``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.harness.inputs import InputError, main_guard
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record, write_whole
from experiments.harness.statistics import Estimate, holm, restricted_ratio, sign_flip

LEVEL = 0.05


def read(folder: Path, card: str) -> dict[str, list[Record]]:
    """Return the rows of each part that ran on a card, those of runs that failed left out."""
    files = sorted(folder.glob(f"evidence-{card}-*.jsonl"))
    found = {path.stem.removeprefix(f"evidence-{card}-"): Ledger(path, ("run", "arm", "seed")).rows() for path in files}
    return {part: [row for row in rows if "failed" not in row] for part, rows in found.items()}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def _by_arm(rows: Sequence[Record], run: str) -> dict[str, dict[int, Record]]:
    arms: dict[str, dict[int, Record]] = defaultdict(dict)
    for row in rows:
        if row["run"] == run:
            arms[row["arm"].partition(": ")[2]][row["seed"]] = row
    return arms


class Compared(NamedTuple):
    """An arm of a far-pair cell against He: ratio of restricted means over paired seeds, p after Holm, misses of n."""

    arm: str
    ratio: Estimate
    p: float
    missed: int

    def __str__(self) -> str:
        clear = self.p < LEVEL and not self.ratio.low <= 1 <= self.ratio.high
        text = f"{self.ratio.mean:.2f} ({self.ratio.low:.2f}–{self.ratio.high:.2f})"
        return f"**{text}**" if clear else text


def compare(rows: Sequence[Record], run: str) -> list[Compared]:
    """Return the arms of one far-pair cell against He."""
    arms = _by_arm(rows, run)
    base, budget = arms["he"], next(iter(arms["he"].values()))["budget"]
    found = []
    for name in (name for name in arms if name != "he"):
        seeds = sorted(set(arms[name]) & set(base))
        new, old = ([side[seed]["steps_to_target"] for seed in seeds] for side in (arms[name], base))
        logs = [[math.log(step or budget) for step in side] for side in (new, old)]
        missed = sum(step is None for step in new)
        found.append(Compared(name, restricted_ratio(new, old, budget), sign_flip(*logs), missed))
    return [each._replace(p=p) for each, p in zip(found, holm([each.p for each in found]), strict=True)]


def cell(rows: Sequence[Record], run: str) -> list[str]:
    """Return the table of one far-pair cell."""
    base = _by_arm(rows, run)["he"]
    budget = next(iter(base.values()))["budget"]
    found = compare(rows, run)
    table = [[each.arm, str(each), f"{each.p:.2g}", f"{each.missed} of {each.ratio.n}"] for each in found]
    missed = sum(row["steps_to_target"] is None for row in base.values())
    median = statistics.median(row["steps_to_target"] or budget for row in base.values())
    told = f"He: median {median:.0f} steps, {missed} of {len(base)} never arrive within {budget}."
    return [f"### {run}", "", told, "", *_table(["arm", "steps / He's", "p (Holm)", "never"], table)]


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
        for run in dict.fromkeys(row["run"] for row in parts["far-pair"]):
            lines += ["", *cell(parts["far-pair"], run)]
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
