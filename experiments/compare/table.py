"""The rows of a verdict as text, the same on the terminal, in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.compare.verdict import Row
from experiments.harness.markdown import table
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


ACCURACY = ("accuracy, %", "difference, points")  # says nothing where a run ends at its target


def lines_of(rows: Sequence[Row], accuracy: bool = True) -> list[tuple[str, ...]]:
    """Return the head and the rows, without the columns on accuracy if they say nothing."""
    kept = [i for i, name in enumerate(HEAD) if accuracy or name not in ACCURACY]
    return [tuple(line[i] for i in kept) for line in (HEAD, *map(cells, rows))]


def plain(rows: Sequence[Row], accuracy: bool = True) -> str:
    """Return the rows as columns for a terminal."""
    lines = lines_of(rows, accuracy)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: Sequence[Row], accuracy: bool = True) -> str:
    """Return the rows as a table in Markdown."""
    head, *others = lines_of(rows, accuracy)
    return "\n".join(table(head, others))
