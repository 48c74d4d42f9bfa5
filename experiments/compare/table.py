"""The rows of a verdict as text, the same on the terminal, in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.compare.verdict import Row
from experiments.harness.statistics import Estimate

HEAD = (
    "arm", "smallest budget", "never", "× baseline, steps", "p (Holm)", "× baseline, seconds", "accuracy, %",
    "difference, points", "ERF std before", "after",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """Write a row of the table as text, in the order of ``HEAD``."""
    gap = row.accuracy_difference
    return (
        row.arm,
        "none" if row.budget is None else str(row.budget),
        f"{row.missed} of {row.n}" if row.missed else "0",
        _interval(row.steps_ratio) if row.steps_ratio else "1",
        "" if row.p_adjusted is None else f"{row.p_adjusted:.2g}",
        _interval(row.seconds_ratio) if row.seconds_ratio else "" if row.steps_ratio else "1",
        f"{row.accuracy:.1f}",
        f"{gap.mean:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})" if gap else "0",
        f"{row.std_before:.2f}",
        f"{row.std_after:.2f}",
    )


def _interval(ratio: Estimate) -> str:
    return f"{ratio.mean:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def plain(rows: Sequence[Row]) -> str:
    """Return the rows as columns for a terminal."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
