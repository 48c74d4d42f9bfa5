"""A page that a browser shows without any other file: lines, figures inside it, and a report's table."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import widerf

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_page(
    path: Path, title: str, lines: Sequence[str], figures: Mapping[str, Figure], body: str, command: str
) -> None:
    """Write the page.

    Args:
        path: the file.
        title: its heading.
        lines: sentences under the heading.
        figures: caption of each figure and the figure.
        body: HTML, already escaped where it must be.
        command: what made the page.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(loader=jinja2.PackageLoader("widerf.cli"), autoescape=True)
    shown = [{"caption": caption, "data": _encoded(figure)} for caption, figure in figures.items()]
    text = environment.get_template("page.html").render(
        title=title, lines=lines, figures=shown, body=Markup(body), command=command,
        version=widerf.__version__,
    )  # fmt: skip
    path.write_text(text + "\n", encoding="utf-8")


def _encoded(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return base64.b64encode(stream.getvalue()).decode("ascii")
