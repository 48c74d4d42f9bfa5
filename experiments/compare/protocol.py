"""The protocol of the evidence: one file, written before the runs, whose hash stands in every record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("protocol.json")


@dataclass(frozen=True)
class Cell:
    """One task of the far-pair map: ``depth`` layers, markers at ``radius``, at most ``steps`` steps."""

    depth: int
    radius: int
    steps: int


@dataclass(frozen=True)
class Protocol:
    """What was fixed before the runs.

    Attributes:
        hash: first 16 hex digits of the SHA-256 of the file.
        choose, confirm: seeds that choose learning rates, and seeds that the figures come from; none is in both.
        rest: everything that the file says, for the report.
    """

    hash: str
    target: float
    baseline: str
    choose: tuple[int, ...]
    confirm: tuple[int, ...]
    rates: tuple[float, ...]
    arms: tuple[str, ...]
    cells: tuple[Cell, ...]
    rest: dict[str, Any]


def read(path: Path) -> Protocol:
    """Read a protocol; ``confirm`` seeds are given there as first and last + 1."""
    content = path.read_bytes()
    said = json.loads(content)
    return Protocol(
        hash=hashlib.sha256(content).hexdigest()[:16],
        target=said["target"],
        baseline=said["baseline"],
        choose=tuple(said["seeds"]["choose"]),
        confirm=tuple(range(*said["seeds"]["confirm"])),
        rates=tuple(said["rates"]),
        arms=tuple(said["arms"]),
        cells=tuple(Cell(**cell) for cell in said["cells"]),
        rest=said,
    )


@cache
def protocol() -> Protocol:
    """Return the protocol of this project."""
    return read(PATH)
