"""What a command found: printed as tables or JSON, written to a folder as figures and a page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from widerf.report import Report, plain, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from widerf.erf.map import ERF


@dataclass
class Found:
    """What a command found.

    Attributes:
        title: heading of the page.
        lines: sentences above everything else.
        told: the facts, for machines.
        erfs: by the name of their column.
        report: a report with a table of its own.
        figures: further figures by their captions.
        compared: titles and rows of a table of several models, which says the ERFs' figures already.
    """

    title: str
    lines: Sequence[str]
    told: dict[str, Any]
    erfs: Mapping[str, ERF] = field(default_factory=dict)
    report: Report[Any] | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)
    compared: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


def text(value: object) -> str:
    """Return a fact as text, tuples as 3×5."""
    return "×".join(f"{entry:g}" for entry in value) if isinstance(value, tuple) else str(value)


def figures_of(erf: ERF) -> dict[str, Any]:
    """Return the figures of an ERF, in input pixels where they are lengths."""
    figures: dict[str, Any] = {
        "std": erf.std, "std per axis": erf.std_per_axis, "2-sigma size": erf.size(),
        "area ratio at 0.5": erf.area_ratio(0.5), "excess kurtosis": erf.excess_kurtosis, "clipped": erf.clipped,
    }  # fmt: skip
    if erf.samples is not None and erf.blocks is not None and len(erf.blocks) > 1:
        figures["std 95 % interval"] = erf.interval("std")
    return figures


def short(value: object) -> str:
    """Return a figure in four digits, several of them with dots between."""
    if isinstance(value, tuple):
        return " … ".join(short(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else ("" if value is None else str(value))


def give(options: argparse.Namespace, found: Found) -> None:
    """Print what was found, and write it to the folder if there is one."""
    figures = {} if found.compared else {name: figures_of(erf) for name, erf in found.erfs.items()}
    told = found.told | ({"erf": figures} if figures else {})
    keys = list(dict.fromkeys(key for each in figures.values() for key in each))
    rows = [[key, *(short(each.get(key)) for each in figures.values())] for key in keys]
    if options.json:
        print(json.dumps(plain(told), indent=2, ensure_ascii=False))
    else:
        tables = [table(["ERF (input pixels)", *figures], rows)] if figures else []
        tables += [table(*found.compared)] if found.compared else []
        print("\n".join([*found.lines, *tables]))
        if found.report is not None:
            print()
            show(found.report)
    if options.out is not None:
        _write(options, found, told, rows)
        print(f"widerf: wrote {options.out / 'report.html'}", file=sys.stderr)


def show(report: Report[Any]) -> None:
    """Print a report: to a terminal's width and in its colours, elsewhere as plain text."""
    if sys.stdout.isatty():
        import rich

        rich.print(report)
    else:
        print(report)


def _write(options: argparse.Namespace, found: Found, told: dict[str, Any], rows: Sequence[Sequence[str]]) -> None:
    from widerf.cli.page import write_page
    from widerf.erf import plot
    from widerf.report import html_table

    options.out.mkdir(parents=True, exist_ok=True)
    drawn = dict(found.figures)
    if found.erfs:
        made = plot.compare(found.erfs)
        plot.save(made, options.out / "erf.png")
        models = [f"{number}: {each['model']}" for number, each in enumerate(told.get("models", ()), 1)]
        drawn = {", ".join(models or found.erfs): made, **drawn}
    for name, erf in found.erfs.items():
        erf.save(options.out / f"{name}.npz")
    (options.out / "report.json").write_text(json.dumps(plain(told), indent=2, ensure_ascii=False), encoding="utf-8")
    body = html_table(["ERF (input pixels)", *found.erfs], rows) if rows else ""
    body += html_table(*found.compared) if found.compared else ""
    body += "" if found.report is None else found.report._repr_html_()
    write_page(options.out / "report.html", found.title, found.lines, drawn, body, options.shown)
