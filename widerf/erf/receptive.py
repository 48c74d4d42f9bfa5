"""The theoretical receptive field: size, jump and centre through every path of any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from widerf.erf.coordinates import Reading, read, read_all
from widerf.errors import UntreatedOperatorError
from widerf.report import cell, html_table
from widerf.trace.ambient import plain_arithmetic
from widerf.trace.arguments import check_unit
from widerf.trace.scene import Scene
from widerf.trace.tape import Tape


@dataclass(frozen=True)
class ReceptiveField:
    """The input pixels that have any path to a unit. Pixel i has its centre at i; all figures are per axis.

    Attributes:
        layer: name of the module whose output the units are.
        size: pixels from the first to the last that the unit sees, also beyond the border where padding stands in for
            the image. Where units see differently (windows, interpolation), that of the centre unit.
        jump: input pixels between two neighbouring units; on an irregular map what the strides say, or, where that is
            far from it, the size of a cell if the units' cells tile the image.
        regular: whether all units see boxes of one size, one jump apart.
        global_paths: modules through which a unit sees the whole image besides (squeeze-excite, attention, global
            pooling, statistics of a group or instance norm); ``size`` is that of the local paths.
        misaligned: modules that join paths whose centres differ → offset of the second path in input pixels.
    """

    layer: str
    size: tuple[int, ...]
    jump: tuple[float, ...]
    regular: bool
    global_paths: tuple[str, ...]
    misaligned: Mapping[str, tuple[float, ...]]
    _first: Tensor = field(repr=False, compare=False)
    _last: Tensor = field(repr=False, compare=False)

    def center(self, unit: Sequence[int] | int | None = None) -> tuple[float, ...]:
        """Middle of what a unit sees, in input pixels; units beyond the map are counted on by the jump.

        Args:
            unit: index on the map, ``n // 2`` per axis by default; an integer on a map with one axis.

        Raises:
            ValueError: if the unit has the wrong number of axes or, on an irregular map, lies outside it.

        Example:
            >>> receptive_field(nn.Conv2d(1, 1, 7, stride=2, padding=3), (1, 32, 32)).center((16, 16))
            (32.0, 32.0)
        """
        first, last = self.interval(unit)
        return tuple((a + b) / 2 for a, b in zip(first, last, strict=True))

    def _repr_html_(self) -> str:
        rows = {
            "layer": self.layer or "the output", "size": "the whole image" if self.global_paths else cell(self.size),
            "size by local paths": cell(self.size) if self.global_paths else "", "jump": cell(self.jump),
            "centre of the centre unit": ", ".join(f"{c:g}" for c in self.center()),
            "global paths": ", ".join(self.global_paths), "misaligned joins": ", ".join(self.misaligned),
        }  # fmt: skip
        return html_table(["theoretical field", "input pixels"], [[k, v] for k, v in rows.items() if v])

    def interval(self, unit: Sequence[int] | int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First and last pixel that a unit sees, per axis; they lie beyond the border where the map was padded."""
        shape = tuple(self._first.shape[1:])
        if not self.regular or unit is None:
            index = check_unit(unit, shape)
            place: tuple[Any, ...] = (slice(None), *index)
            start, stop = self._first[place], self._last[place]
            return tuple(int(x) for x in start.floor()), tuple(int(x) for x in stop.ceil())
        index = (unit,) if isinstance(unit, int) else tuple(unit)
        if len(index) != len(shape):
            check_unit(unit, shape)
        origin: tuple[Any, ...] = (slice(None), *(0 for _ in shape))
        first = tuple(round(float(x) + j * i) for x, j, i in zip(self._first[origin], self.jump, index, strict=True))
        return first, tuple(a + n - 1 for a, n in zip(first, self.size, strict=True))


def receptive_field(
    model: nn.Module, input_size: Sequence[int] = (3, 224, 224), *, layer: str | nn.Module | None = None
) -> ReceptiveField:
    r"""Theoretical receptive field of a layer's units, through every path of the model.

    One forward pass is recorded and walked with the box of pixels that each tensor element can see; boxes of joined
    paths are united. For a chain of layers with kernel k, dilation d and stride s this is
    :math:`\mathrm{size} = 1 + \sum_l (k_l - 1)\, d_l \prod_{m<l} s_m`.

    Args:
        model: takes one tensor ``(batch, *input_size)``; it comes back as it was.
        input_size: ``(channels, *spatial)`` of the image, spatial rank 1 to 3.
        layer: a module or its name; by default the last spatial map before global pooling.

    Returns:
        Size, jump and centres per axis; global paths and misaligned joints by name.

    Raises:
        ValueError: for an unknown layer, one without a spatial map, or an input size that the model refuses.
        UntreatedOperatorError: for an operator without a rule; the message names it and its module.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.MaxPool2d(3, stride=2, padding=1))
        >>> found = receptive_field(net, (3, 64, 64))
        >>> found.size, found.jump, found.center((4, 4))
        ((11, 11), (4.0, 4.0), (16.0, 16.0))
    """
    scene = Scene.of(model, input_size, layer)
    return from_tape(scene.tape, scene.site.name)


def from_tape(tape: Tape, layer: str) -> ReceptiveField:
    """Receptive field of the map of a recording."""
    with plain_arithmetic(gradients=False):
        return _from_reading(read(tape), tuple(tape.values[0].shape[2:]), layer)


def from_marks(tape: Tape, layers: Sequence[str]) -> dict[str, Reading | UntreatedOperatorError]:
    """Walk one recording once to marked maps; the error stands where an operator on the way has no rule."""
    with plain_arithmetic(gradients=False):
        found = read_all(tape, [tape.marks[layer] for layer in layers])
    return {layer: found[tape.marks[layer]] for layer in layers}


def field_of(reading: Reading, tape: Tape, layer: str) -> ReceptiveField:
    """Receptive field of one of the maps that :func:`from_marks` went to."""
    with plain_arithmetic(gradients=False):
        return _from_reading(reading, tuple(tape.values[0].shape[2:]), layer)


def _from_reading(reading: Reading, sizes: tuple[int, ...], layer: str) -> ReceptiveField:
    reach = reading.result.reach
    rank = reach.shape[0] // 2
    blind = ~reach.isfinite().all(0)
    if bool(blind.any()):  # only global paths lead here: the whole image is seen
        whole = torch.tensor([0.0 for _ in sizes] + [1.0 - n for n in sizes])
        reach = torch.where(blind, whole.view(-1, *(1 for _ in sizes)), reach)
    first, last = reach[:rank].double(), -reach[rank:].double()
    jump, regular = _jump(first, last, reading.result.jump)
    if not regular:  # units differ or all see the same: their cells tell how far apart they are
        cells = tuple(n / m for n, m in zip(sizes, first.shape[1:], strict=True))
        jump = tuple(j if 2 / 3 < j / cell < 3 / 2 else cell for j, cell in zip(jump, cells, strict=True))
    centre = tuple(n // 2 for n in first.shape[1:])
    place: tuple[Any, ...] = (slice(None), *centre)
    box = (last - first)[place]
    return ReceptiveField(
        layer=layer,
        size=tuple(int(x.ceil()) + 1 for x in box),
        jump=jump,
        regular=regular,
        global_paths=tuple(sorted(reading.result.global_paths)),
        misaligned=dict(reading.misaligned),
        _first=first,
        _last=last,
    )


def _jump(first: Tensor, last: Tensor, told: tuple[float, ...]) -> tuple[tuple[float, ...], bool]:
    """Jump per axis as the boxes show it (on an axis with one unit: as strides tell it), and whether it is regular."""
    jumps = []
    regular = True
    rank = first.shape[0]
    for axis in range(rank):
        n = first.shape[1 + axis]
        shown = told[axis]
        if n > 1:
            steps = first[axis].diff(dim=axis)
            shown = float(steps.mean())
            # Boxes that do not move (a global path that was not told from a local one) tell no jump.
            regular &= bool((steps - shown).abs().max() < 1e-3) and shown > 0
        regular &= bool((last[axis] - first[axis]).std(correction=0) < 1e-3)
        for other in range(rank):
            if other != axis and first.shape[1 + other] > 1:
                regular &= bool(first[axis].diff(dim=other).abs().max() < 1e-3)
        jumps.append(shown)
    return (tuple(float(round(j, 6)) for j in jumps) if regular else tuple(float(j) for j in told)), regular
