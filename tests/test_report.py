"""Reports: rows that print, and lists of names that stay short."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from widerf.report import Report, Verdict, cell, listed, plain


@dataclass(frozen=True)
class Row:
    name: str
    size: tuple[int, ...] | None
    verdict: Verdict


@dataclass(frozen=True)
class Rows(Report[Row]):
    columns: ClassVar = {"layer": "name", "size": "size", "verdict": "verdict"}

    def lines(self) -> list[str]:
        return [f"{len(self.rows)} rows"]


REPORT = Rows((Row("a", (3, 3), Verdict("wide", "made <wide>")), Row("b", None, Verdict("left", "left"))), ("mind",))


def test_a_report_is_a_sequence_that_prints_every_row_and_warning() -> None:
    assert len(REPORT) == 2 and REPORT[1].name == "b"
    text = str(REPORT)
    assert all(word in text for word in ("layer", "3×3", "made <wide>", "left", "2 rows", "mind"))


def test_html_escapes_what_the_rows_say() -> None:
    assert "made &lt;wide&gt;" in REPORT._repr_html_() and "<wide>" not in REPORT._repr_html_()


def test_a_verdict_is_plain_text_in_json() -> None:
    assert json.loads(json.dumps(plain(REPORT[0].verdict))) == "made <wide>"


@given(st.lists(st.text("abc", min_size=1, max_size=5), max_size=12), st.integers(1, 6))
def test_a_list_shows_its_first_names_and_counts_all(names: list[str], limit: int) -> None:
    text = listed(names, limit)
    assert text.startswith(", ".join(names[:limit]))
    assert (f"({len(names)} in all)" in text) == (len(names) > limit)


def test_a_cell_without_a_value_is_empty() -> None:
    assert cell(None) in ("", "–", "-")
