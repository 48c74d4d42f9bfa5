"""Sizes of tiles for the kernels of `widerf.kernels.box_kernels`: a table by shape class, and what was measured better.

The table holds what was fastest on one H200 among the `candidates` (docs/results/gpu-nvidia-h200-sweep.jsonl: all
three maps, 16-bit numbers and TF32, maps of 56² to 7²), and for full float32 what compiles without spilling; nothing is
timed to choose from it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from widerf.kernels.boxes import ceil_div, power

PROCESSORS = 132  # of an H100: fewer programs leave some idle
SMALL = 196  # pixels of a map
SHARED = 227 * 1024  # bytes of a block
LEAST = 16  # the narrowest side of a matrix product


class Shape(NamedTuple):
    """What a configuration is chosen by."""

    map: str  # "forward", "grad_input", "grad_weight", "depthwise" or "depthwise_weight"
    numbers: str  # "16-bit", "tf32" or "float32"
    ins: int  # most channels that a step may take: those that share taps, or all
    outs: int  # most outputs that a program may take
    images: int
    pixels: int  # of one map
    columns: int  # all outputs


@dataclass(frozen=True)
class Configuration:
    """Sizes of one program, and how the compiler is to build it.

    Attributes:
        pixels: of a tile; of a step in a weight gradient.
        outs: output channels of a program.
        ins: channels of a step; of a program in a weight gradient and in a depthwise layer.
        warps: of a program.
        stages: steps that are under way at once.
        programs: into about how many programs a weight gradient is cut.
    """

    pixels: int
    outs: int
    ins: int
    warps: int
    stages: int
    programs: int = 1056


# For at most so many outputs, or any number (0).
_Class = tuple[tuple[int, Configuration], ...]
TABLE: dict[tuple[str, str], _Class] = {
    ("forward", "16-bit"): ((64, Configuration(128, 64, 64, 4, 4)), (0, Configuration(128, 128, 64, 8, 4))),
    ("grad_input", "16-bit"): ((64, Configuration(256, 64, 64, 8, 3)), (0, Configuration(128, 128, 64, 8, 4))),
    ("grad_weight", "16-bit"): ((0, Configuration(64, 64, 64, 4, 4)),),
    ("forward", "tf32"): ((64, Configuration(256, 64, 32, 8, 3)), (0, Configuration(128, 128, 32, 8, 4))),
    ("grad_input", "tf32"): ((64, Configuration(256, 64, 32, 8, 3)), (0, Configuration(128, 128, 32, 8, 4))),
    ("grad_weight", "tf32"): ((0, Configuration(64, 64, 64, 4, 3)),),
    ("forward", "float32"): ((0, Configuration(64, 64, 16, 4, 3)),),
    ("grad_input", "float32"): ((0, Configuration(64, 64, 16, 4, 3)),),
    ("grad_weight", "float32"): ((0, Configuration(32, 64, 32, 4, 3)),),
}
DEPTHWISE = {
    "depthwise": Configuration(128, 1, 32, 4, 3),
    "depthwise_weight": Configuration(128, 1, 32, 8, 3, 2112),
}
_measured: dict[Shape, Configuration] = {}
_asked: list[list[Shape]] = []


def numbers_of(itemsize: int, precision: str) -> str:
    """Return the class of numbers: "16-bit", "tf32" or "float32"."""
    return "16-bit" if itemsize == 2 else {"tf32": "tf32", "ieee": "float32"}[precision]


def fit(shape: Shape, wanted: Configuration) -> Configuration:
    """Return the configuration with sides no longer than the problem's.

    Example:
        >>> fit(Shape("forward", "16-bit", 32, 48, 1, 49, 48), Configuration(256, 128, 64, 8, 3))
        Configuration(pixels=256, outs=64, ins=32, warps=8, stages=3, programs=1056)
    """
    outs = max(LEAST, min(wanted.outs, power(shape.outs)))
    ins = max(LEAST, min(wanted.ins, power(shape.ins)))
    return replace(wanted, outs=outs, ins=ins)


def _programs(shape: Shape, c: Configuration) -> int:
    return ceil_div(shape.images * shape.pixels, c.pixels) * ceil_div(shape.columns, c.outs)


@functools.lru_cache(maxsize=4096)
def from_table(shape: Shape) -> Configuration:
    """Return the table's configuration, the tiles halved while there are fewer than the device has processors.

    Example:
        >>> from_table(Shape("forward", "16-bit", 64, 256, 128, 196, 256))
        Configuration(pixels=128, outs=128, ins=64, warps=8, stages=4, programs=1056)
    """
    if shape.map in DEPTHWISE:
        return fit(shape, DEPTHWISE[shape.map])
    rows = TABLE[shape.map, shape.numbers]
    c = fit(shape, next(c for most, c in rows if shape.outs <= most or not most))
    # A tile of 256 pixels of a small map is mostly images that share nothing.
    if shape.map == "grad_input" and c.pixels == 256 and shape.pixels <= SMALL:
        c = replace(c, pixels=128)
    while shape.map != "grad_weight" and _programs(shape, c) < PROCESSORS and c.pixels > 64:
        c = replace(c, pixels=c.pixels // 2, warps=min(c.warps, 4))
    return c


def choose(shape: Shape) -> Configuration:
    """Return the configuration that `remember` was told for this shape, or the table's."""
    for shapes in _asked:
        shapes.append(shape)
    return _measured.get(shape) or from_table(shape)


@contextmanager
def asked() -> Iterator[list[Shape]]:
    """List the shapes that a configuration is chosen for within the block."""
    shapes: list[Shape] = []
    _asked.append(shapes)
    try:
        yield shapes
    finally:
        _asked.remove(shapes)


def remember(shape: Shape, found: Configuration) -> None:
    """Use ``found`` for problems of this shape from now on, in this process."""
    _measured[shape] = found


# Worth measuring: (pixels, outs, ins, warps, stages).
PRODUCTS = (
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (256, 64, 64, 8, 3),
    (256, 64, 64, 8, 4),
    (128, 64, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
)
WEIGHTS = ((64, 64, 64, 4, 4), (64, 64, 64, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 8, 4), (128, 64, 64, 4, 3))
SUMS = (
    (32, 1, 32, 2, 3),
    (64, 1, 32, 2, 3),
    (64, 1, 32, 4, 3),
    (128, 1, 32, 4, 3),
    (128, 1, 32, 8, 3),
    (256, 1, 32, 8, 3),
)
SPLITS = (528, 1056, 2112, 4224)


def candidates(shape: Shape) -> list[Configuration]:
    """Return configurations worth measuring for this shape, the table's first."""
    depthwise = shape.map in DEPTHWISE
    sides = SUMS if depthwise else WEIGHTS if shape.map == "grad_weight" else PRODUCTS
    programs = SPLITS if shape.map in ("grad_weight", "depthwise_weight") else SPLITS[1:2]
    # float32 has twice the bytes: half of the channels a step.
    half = 2 if shape.numbers != "16-bit" and not depthwise else 1
    tried = [fit(shape, Configuration(m, n, c // half, w, s, p)) for m, n, c, w, s in sides for p in programs]
    return list(dict.fromkeys([from_table(shape), *(c for c in tried if depthwise or _held(shape, c))]))


def _held(shape: Shape, c: Configuration) -> bool:
    """Whether the steps that are under way fit the shared memory of a multiprocessor of 9.0."""
    step = c.pixels * (c.ins + c.outs) if shape.map == "grad_weight" else c.ins * (c.pixels + c.outs)
    return step * (2 if shape.numbers == "16-bit" else 4) * (c.stages - 1) <= SHARED
