"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(titles: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    r"""Return the lines of a table; None is an empty cell.

    Example:
        >>> print(*table(("arm", "p"), [("he", None), ("wide", 0.5)]), sep="\n")
        | arm | p |
        | --- | --- |
        | he |  |
        | wide | 0.5 |
    """
    lines = (titles, ["---"] * len(titles), *rows)
    return [f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines]
