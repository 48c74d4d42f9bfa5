"""One table for every report: rows of a dataclass as text, HTML or JSON.

A report is a sequence of rows, some lines above them, and warnings below. The initialiser and the conversion each give
their own row class and columns; everything about showing them is here.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

from widerf._checks import require_known

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

Row = TypeVar("Row")
PATIENCE = 2.0  # seconds after which one wants to see that something goes on

_TABLE = """\
<table>
<thead><tr>{% for title in titles %}<th style="text-align:left">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in rows %}
<tr>{% for cell in row %}<td style="text-align:left">{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table>"""
_HTML = f"""\
<div class="widerf-report">
{{%- for line in lines %}}
<p>{{{{ line }}}}</p>
{{%- endfor %}}
{_TABLE}
{{%- if warnings %}}
<ul>
{{%- for warning in warnings %}}
<li><strong>Warning:</strong> {{{{ warning }}}}</li>
{{%- endfor %}}
</ul>
{{%- endif %}}
</div>"""


def cell(value: object) -> str:
    """Return one table cell as text: numbers short, tuples as 3×3, nothing for ``None``.

    Example:
        >>> [cell(value) for value in (0.8164966, (3, 5), None, 4, True)]
        ['0.816', '3×5', '', '4', 'yes']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) and abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, (tuple, list)):
        return "×".join(map(cell, value))
    return str(value)


def plain(value: object) -> Any:
    """Return ``value`` as what JSON can hold; numbers that JSON has no word for become ``None``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.repr}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str, bool)) or value is None else str(value)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text with aligned columns.

    Example:
        >>> print(table(["layer", "strength"], [["conv1", "0.5"]]))
        layer  strength
        ───────────────
        conv1  0.5
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (titles, *rows)]
    lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(line.rstrip() for line in lines)


def html_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML, its text escaped."""
    return rendered(_TABLE, titles=titles, rows=rows)


def rendered(template: str, **content: object) -> str:
    """Return a jinja2 template with its content, escaped."""
    import jinja2

    return jinja2.Environment(autoescape=True).from_string(template).render(**content)


@dataclasses.dataclass(frozen=True)
class Report(Sequence[Row], Generic[Row]):
    """A sequence of rows that shows itself as a table.

    ``print(report)`` and notebooks show it, ``rich.print(report)`` to a terminal's width and in its colours;
    ``report["layer1.0.conv1"]`` is the row of that name; ``to_json()`` gives everything to a machine, ``to_pandas()``
    and ``to_csv()`` the rows; ``save("report.html")`` writes it (``.html``, ``.json``, ``.csv`` or plain text).

    Subclasses set ``columns``, may add fields, and say their own lines above the table in :meth:`lines`.

    Attributes:
        rows: one row per layer, in the order of the model's modules. Row classes are dataclasses with a ``name``.
        warnings: sentences that the user ought to read.
        columns: titles of the table's columns, each with the attribute of the row that fills it, or a function of it.
    """

    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {"name": "name"}

    def lines(self) -> list[str]:
        """Return what is said above the table."""
        return []

    def style(self, row: Row) -> str:
        """Return the ``rich`` style of a row: none, where nothing is the matter."""
        return ""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int | str) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | str | slice) -> Row | Sequence[Row]:
        if isinstance(index, str):
            names = {getattr(row, "name", ""): row for row in self.rows}
            require_known(index, names, "name")
            return names[index]
        return self.rows[index]

    def _shown(self) -> tuple[list[str], list[list[str]]]:
        """Return titles and cells of the columns that hold anything."""
        cells = [
            [cell(getattr(row, source, None) if isinstance(source, str) else source(row)) for source in sources]
            for row in self.rows
            for sources in [self.columns.values()]
        ]
        kept = [i for i in range(len(self.columns)) if i == 0 or any(row[i] for row in cells)]
        return [list(self.columns)[i] for i in kept], [[row[i] for i in kept] for row in cells]

    def __str__(self) -> str:
        warnings = [
            textwrap.fill(f"Warning: {text}", 120, subsequent_indent="  ", break_on_hyphens=False)
            for text in self.warnings
        ]
        return "\n".join([*self.lines(), table(*self._shown()), *warnings])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        yield from map(Text, self.lines())
        yield self._rich_rows(options.max_width)
        yield from (Text(f"Warning: {text}", "yellow") for text in self.warnings)

    def _rich_rows(self, width: int) -> RenderableType:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        titles, cells = self._shown()
        shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        for title in titles:
            shown.add_column(title, overflow="fold")
        for row, texts in zip(self.rows, cells, strict=True):
            shown.add_row(*map(Text, texts), style=self.style(row))
        return shown

    def _repr_html_(self) -> str:
        titles, rows = self._shown()
        return rendered(_HTML, lines=self.lines(), titles=titles, rows=rows, warnings=self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain lists, dictionaries, numbers and strings."""
        content = plain(self)
        assert isinstance(content, dict)
        return content

    def to_json(self, indent: int | None = 2) -> str:
        """Return all fields as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_records(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries of numbers and strings; entries with one value per axis get a key per axis.

        Keys are the same in all rows: those that a row has no value for hold ``None``.
        """
        plains = [plain(row) for row in self.rows]
        lengths: dict[str, int] = {}
        for row in plains:
            for key, value in row.items():
                lengths[key] = max(lengths.get(key, 0), len(value) if isinstance(value, list) else 0)
        return [
            {name: entry for key, length in lengths.items() for name, entry in _apart(key, row[key], length)}
            for row in plains
        ]

    def to_csv(self) -> str:
        """Return the rows as comma-separated values with a header."""
        records = self.to_records()
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(records[0]) if records else ["name"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return stream.getvalue().rstrip("\n")

    def to_pandas(self) -> Any:
        """Return the rows as a ``pandas.DataFrame``.

        Raises:
            ImportError: without pandas, which widerf does not ask for.
        """
        import pandas

        return pandas.DataFrame.from_records(self.to_records())

    def save(self, path: str | Path) -> None:
        """Write the report; the ending of ``path`` says how: ``.html``, ``.json``, ``.csv``, else plain text."""
        target = Path(path)
        ways = {".html": self._repr_html_, ".json": self.to_json, ".csv": self.to_csv}
        written = ways.get(target.suffix, self.__str__)()
        target.write_text(written + "\n", encoding="utf-8")


def progress_bar(
    steps: Iterable[Any] | None = None, *, shown: bool, what: str, unit: str, total: int | None = None, delay: float = 0
) -> Any:
    """Return a bar on stderr over some steps, or to be updated by hand, that appears after ``delay`` seconds."""
    from tqdm import tqdm

    return tqdm(steps, total=total, disable=not shown, desc=what, unit=unit, delay=delay)


def _apart(key: str, value: Any, length: int) -> list[tuple[str, Any]]:
    """Return an entry as it is, or, where some row has ``length`` values, one entry for each."""
    if not length:
        return [(key, value)]
    values = value if isinstance(value, list) else []
    return [(f"{key}_{axis}", values[axis] if axis < len(values) else None) for axis in range(length)]


class Verdict(str):
    """What became of one layer: a code for programs to read, and a sentence for people, which it is as a string.

    Attributes:
        code: a fixed word; nothing in widerf looks at the sentence.
        notes: codes of what should be known besides.

    Example:
        >>> verdict = Verdict("widened", "widened").noting("undone", "undone in part")
        >>> print(verdict, "|", verdict.code, verdict.notes)
        widened, undone in part | widened ('undone',)
    """

    code: str
    notes: tuple[str, ...]

    def __new__(cls, code: str, text: str, notes: tuple[str, ...] = ()) -> Verdict:
        """Make the sentence ``text`` that bears ``code``."""
        verdict = super().__new__(cls, text)
        verdict.code, verdict.notes = code, notes
        return verdict

    def __getnewargs__(self) -> tuple[str, str, tuple[str, ...]]:  # type: ignore[override]  # copies and pickles
        return self.code, str(self), self.notes

    def noting(self, note: str, text: str) -> Verdict:
        """Return the verdict with a further note, after a comma."""
        return Verdict(self.code, f"{self}, {text}", (*self.notes, note))


def counted(number: int, what: str, plural: str = "") -> str:
    """Return how many of something there are.

    Example:
        >>> counted(1, "layer"), counted(2, "layer"), counted(3, "branch", "branches")
        ('1 layer', '2 layers', '3 branches')
    """
    return f"{number} {what}" if number == 1 else f"{number} {plural or what + 's'}"


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names and how many there are.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b, … (3 in all)'
    """
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
