"""Where a tracker writes: JSON lines, TensorBoard, or whatever can be called."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from widerf._checks import require
from widerf.erf.map import ERF

FIGURES = ("std", "size", "excess_kurtosis", "clipped")  # what is logged as a scalar
_CELLS = 32  # per axis, of the maps in JSON lines


class Log(Protocol):
    """Takes one measurement of one layer; ``erf`` is ``None`` where there was nothing to measure."""

    def write(self, row: dict[str, Any], erf: ERF | None) -> None:
        """Write it down."""


def open_log(log: Any) -> Log | None:
    """Return what writes to ``log``: a path, an object with ``add_scalar`` and ``add_figure``, or a callable.

    Raises:
        TypeError: if it is none of these.
    """
    if log is None:
        return None
    if isinstance(log, str | Path):
        return _JSONLines(Path(log)) if Path(log).suffix == ".jsonl" else _TensorBoard(_summary_writer(Path(log)))
    able = hasattr(log, "add_scalar") and hasattr(log, "add_figure")
    require(able or callable(log), "log", "be a path, a SummaryWriter or None, or a callable", log, TypeError)
    return _TensorBoard(log) if able else _Callable(log)


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


class _Callable:
    """Whatever the user calls his logger with: one dict a measurement."""

    def __init__(self, log: Callable[[dict[str, Any]], object]) -> None:
        self.log = log

    def write(self, row: dict[str, Any], erf: ERF | None) -> None:
        self.log(row)


class _JSONLines:
    """One line per measurement: the scalars, and the map summed over cells so that a line stays short."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, row: dict[str, Any], erf: ERF | None) -> None:
        line = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        if erf is not None:
            cells = coarse(erf.map)
            line |= {"map": [float(f"{share:.4g}") for share in cells.flatten()], "map_shape": list(cells.shape)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, row: dict[str, Any], erf: ERF | None) -> None:
        from widerf.erf import plot

        tag = f"erf/{row['layer']}".rstrip("/")
        for name in FIGURES:
            self.writer.add_scalar(f"{tag}/{name}", row[name], row["step"])
        if erf is not None:
            self.writer.add_figure(f"{tag}/map", plot.figure(erf), row["step"])
        self.writer.flush()


def coarse(share: Tensor, cells: int = _CELLS) -> Tensor:
    """Sum a map over cells of equal extent, at most ``cells`` per axis; the total stays.

    Example:
        >>> coarse(torch.ones(5), 2).tolist()
        [3.0, 2.0]
    """
    for axis, n in enumerate(share.shape):
        side = -(-n // cells)
        index = torch.arange(n) // side
        shape = [*share.shape[:axis], int(index[-1]) + 1, *share.shape[axis + 1 :]]
        share = torch.zeros(shape, dtype=share.dtype).index_add_(axis, index, share)
    return share
