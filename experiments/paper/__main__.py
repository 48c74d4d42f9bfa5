"""Every claim that takes minutes, and the page about them all: ``python -m experiments.paper``.

What has a row in ``paper.jsonl`` is kept (``--again`` does it anew), so that a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from experiments.harness.inputs import main_guard
from experiments.harness.ledger import RESULTS
from experiments.harness.runs import write_whole
from experiments.paper import activations, architecture, fields, fig1, fig2, growth, subsampling, trained
from experiments.paper.common import ledger
from experiments.paper.page import page

PARTS = tuple(module.PART for module in (fig1, activations, fig2, subsampling, growth, architecture, fields))


def write(out: Path) -> None:
    """Write the page of the rows that are there."""
    rows = {row["part"]: row for row in ledger(out).rows()}
    write_whole(out / "paper.md", page(PARTS, rows, trained.ledger(out).rows()))


def main() -> None:
    """Do what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows, the figures and the page")
    parser.add_argument("--again", action="store_true", help="also what has a row")
    parser.add_argument("--page", action="store_true", help="only write the page of what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums run in one order, so that the same seeds give the same page
    for part in () if options.page else PARTS:
        part.fill(options.out, options.again)
        write(options.out)
    write(options.out)


if __name__ == "__main__":
    main_guard(main)
