"""The protocols of the evidence: one file each, written before the runs, whose hash stands in every record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.harness.inputs import InputError

FOLDER = Path(__file__).with_name("protocols")


@dataclass(frozen=True)
class Cell:
    """One task of a protocol.

    Attributes:
        steps: longest training.
        task: name of the task.
        options: of that task.
    """

    steps: int
    task: str = "far-pair"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def said(cls, words: dict[str, Any]) -> Cell:
        """Read a cell; what is no field of its own is an option of the task."""
        own = {name: value for name, value in words.items() if name in ("steps", "task", "options")}
        options = {name: value for name, value in words.items() if name not in own} | own.pop("options", {})
        return cls(**own, options=options)

    def __str__(self) -> str:
        return " ".join([self.task, *(f"{name} {value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Protocol:
    """What was fixed before the runs.

    Attributes:
        hash: first 16 hex digits of the SHA-256 of the file.
        choose, confirm: seeds that choose learning rates, and seeds that the figures come from; none is in both.
        by_seed: whether confirming runs go seed by seed (a stopped series has whole pairs) or arm by arm.
        said: everything that the file says, for the report.
    """

    name: str
    hash: str
    target: float
    baseline: str
    choose: tuple[int, ...]
    confirm: tuple[int, ...]
    rates: tuple[float, ...]
    arms: tuple[str, ...]
    cells: tuple[Cell, ...]
    by_seed: bool
    said: dict[str, Any]


def read(path: Path) -> Protocol:
    """Read a protocol; ``confirm`` seeds are given there as first and last + 1."""
    content = path.read_bytes()
    said = json.loads(content)
    return Protocol(
        name=path.stem,
        hash=hashlib.sha256(content).hexdigest()[:16],
        target=said["target"],
        baseline=said["baseline"],
        choose=tuple(said["seeds"]["choose"]),
        confirm=tuple(range(*said["seeds"]["confirm"])),
        rates=tuple(said["rates"]),
        arms=tuple(said["arms"]),
        cells=tuple(Cell.said(cell) for cell in said["cells"]),
        by_seed=said.get("order") == "seeds",
        said=said,
    )


def names() -> list[str]:
    """Return the names of this project's protocols."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def protocol(name: str) -> Protocol:
    """Return the protocol of that name.

    Raises:
        InputError: there is none.
    """
    if name not in names():
        raise InputError(f"protocol must be one of {', '.join(names())}, got {name!r}")
    return read(FOLDER / f"{name}.json")
