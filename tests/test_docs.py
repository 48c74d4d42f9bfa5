"""The documents and the code say the same: equations are numbered and cited, every page can be reached."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAGS = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs/theory.md").read_text(encoding="utf-8"))]
# "docs/theory.md (3) and (13)" cites two; what comes after the next word cites none.
CITED = re.compile(r"docs/theory\.md((?:(?:,|\s|and)*\(\d+\))+)")


def cited(text: str) -> set[int]:
    return {int(n) for found in CITED.findall(text) for n in re.findall(r"\d+", found)}


def sources() -> list[Path]:
    return sorted(p for folder in ("widerf", "experiments") for p in (ROOT / folder).rglob("*.py"))


def test_citations_are_read_off_as_they_are_written() -> None:
    assert cited("by docs/theory.md (3) and\n    (13); paper (8)") == {3, 13}
    assert cited("docs/theory.md (1), (2) and (4), where (7)") == {1, 2, 4}
    assert cited("see docs/theory.md and (3)") == {3}
    assert cited("the paper's (3)") == set()


def test_the_equations_are_numbered_from_one_on_without_a_gap() -> None:
    assert len(TAGS) >= 13
    assert list(range(1, len(TAGS) + 1)) == TAGS


def test_every_equation_cited_is_there() -> None:
    strange = {path.name: more for path in sources() if (more := cited(path.read_text(encoding="utf-8")) - set(TAGS))}
    assert strange == {}


def test_every_equation_is_cited_by_what_stands_on_it() -> None:
    used = set().union(*(cited(path.read_text(encoding="utf-8")) for path in sources()))
    assert set(TAGS) - used == set()


def test_every_link_between_documents_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "widerf").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []
