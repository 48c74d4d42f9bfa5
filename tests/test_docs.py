"""The documents and the code say the same: equations are numbered and cited, every page can be reached."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("seeing", "widening", "sparse", "doctor")
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


def heading_names(page: Path) -> set[str]:
    """Names by which a page's headings can be linked to, as GitHub and MyST make them."""
    heads = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head) for head in heads]
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in plain}


def test_every_link_to_a_heading_finds_it() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, target, anchor)
        for page in pages
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert links
    broken = [
        f"{page.name}: {target}#{anchor}"
        for page, target, anchor in links
        if anchor not in heading_names((page.parent / target) if target else page)
    ]
    assert broken == []


def test_notebooks_are_kept_without_outputs_and_are_pages_of_the_documentation() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    notebooks = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert {path.stem for path in notebooks} == set(NOTEBOOKS)
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
        assert f"notebooks/{path.stem}" in index


@pytest.mark.slow  # it runs the notebooks; `make docs`, a part of CI, does so too
def test_the_built_pages_link_names_render_lists_of_terms_and_show_what_notebooks_drew(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=600)
    pages = {
        page.relative_to(tmp_path).with_suffix("").as_posix(): page.read_text(encoding="utf-8")
        for page in tmp_path.rglob("*.html")
    }
    assert 'href="api.html#widerf.summary"' in pages["seeing"] and 'href="api.html#widerf.advise"' in pages["recipes"]
    assert "<dt>Extras</dt>" in pages["install"]
    assert all(
        '<div class="output' in pages[f"notebooks/{name}"] and ".png" in pages[f"notebooks/{name}"]
        for name in ("seeing", "widening", "sparse")
    )
    assert "skip_dominates" in pages["notebooks/doctor"] and "promised a std of" in pages["notebooks/doctor"]
