"""What the sweeps over timm share: a table of one row a model, filled where it lacks one, and a page about it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record
from experiments.timm.models import SmallModel, read


def ledger(name: str, columns: Sequence[str], folder: Path = RESULTS) -> Ledger:
    """Return the table of a sweep, one row for each module of timm."""
    return Ledger(folder / f"{name}.csv", ("module",), tuple(columns))


def sweep(
    name: str,
    columns: Sequence[str],
    look_at: Callable[[SmallModel], Record],
    page: Callable[[list[Record]], str],
    about: str | None,
) -> None:
    """Fill ``NAME.csv`` with the models that it lacks, small ones first, and write ``NAME.md`` after each.

    Args:
        name: of both files.
        columns: of the table; ``module`` is the key of a row.
        look_at: makes the row of a model.
        page: makes the page from all rows.
        about: docstring of the sweep; its first paragraph is the help.
    """
    parser = argparse.ArgumentParser(description=(about or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {name}.csv and {name}.md")
    parser.add_argument("--only", nargs="*", default=[], help="modules under timm.models; by default all")
    parser.add_argument("--again", action="store_true", help="also the models that have a row")
    options = parser.parse_args()
    table = ledger(name, columns, options.out)
    models = sorted(read(), key=lambda model: model.parameters)  # what is quick comes first
    jobs = {(model.module,): model for model in models if not options.only or model.module in options.only}

    def write(_: Record) -> None:
        (options.out / f"{name}.md").write_text(page(table.rows()), encoding="utf-8")

    table.fill(jobs, look_at, again=options.again, after=write)
    write({})


def convolutions(model: nn.Module) -> list[str]:
    """Return the modules that hold a convolution weight, found without the library."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) or type(module).__name__ == "CondConv2d"
    ]
