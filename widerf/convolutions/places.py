"""Where each convolution stands in the network: its jump, the maps before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from widerf.convolutions.convolution import Convolution
from widerf.operators import rule_of
from widerf.trace.scene import Scene
from widerf.trace.tape import Call, Tape

_NEARLY = 1.4  # ratio of neighbouring map sizes below which a map was cropped or padded, not resampled


@dataclass(frozen=True)
class Place:
    """One convolution in the network, at its first call.

    Attributes:
        jump: input pixels of the network between neighbouring units of the layer's input; ``None`` off the path to
            the map.
        before: spatial shape of the layer's input.
        after: spatial shape of its output.
    """

    jump: tuple[float, ...] | None
    before: tuple[int, ...]
    after: tuple[int, ...]


def find_places(scene: Scene, kernels: Sequence[Convolution]) -> dict[str, Place]:
    """Return the place of each convolution on the way to the map, in the order in which they run."""
    jumps = _jumps(scene.tape)
    ranks = {kernel.name: kernel.rank for kernel in kernels}
    places = {}
    for name, (came, went) in scene.tape.shapes.items():
        if name in ranks:
            after = scene.site.spatial_shape if went is None else went[-ranks[name] :]  # None: it makes the map
            places[name] = Place(jumps.get(name), came[-ranks[name] :], after)
    return places


def _jumps(tape: Tape) -> dict[str, tuple[float, ...]]:
    """Return the jump of each convolution's input, by module name, as strides and map sizes tell it."""
    image = tape.values[0].shape[2:]
    rank = len(image)
    known: dict[int, tuple[float, ...]] = {0: (1.0,) * rank}
    found: dict[str, tuple[float, ...]] = {}
    for call in tape.needed():
        shapes = {value: tuple(tape.values[value].shape) for value in call.inputs.values()}
        maps = [value for value, shape in shapes.items() if len(shape) == rank + 2]
        if call.name == "convolution" and maps:
            guess = tuple(max(1.0, round(n / m)) for n, m in zip(image, shapes[maps[0]][2:], strict=True))
            known.setdefault(maps[0], guess)  # behind tokens or other layouts: from the sizes
            found.setdefault(call.module, known[maps[0]])
        source = next((value for value in maps if value in known), None)
        for out in call.outputs:
            if source is not None and out is not None and len(tape.values[out].shape) == rank + 2:
                ratio = _ratio(call, tape, shapes[source], tuple(tape.values[out].shape))
                known[out] = tuple(jump * r for jump, r in zip(known[source], ratio, strict=True))
    return found


def _ratio(call: Call, tape: Tape, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[float, ...]:
    """Return by how much a call multiplies the jump: as its rule says, else as the sizes of the maps tell it."""
    rule = rule_of(call.op)
    factors = rule.jump(call, call.arguments(tape.values), before, after) if rule is not None else None
    if factors is not None and len(factors) == len(before) - 2:
        return factors
    ratios = []
    for n, m in zip(before[2:], after[2:], strict=True):
        ratio = n / max(m, 1)
        snapped = round(ratio) if ratio >= 1 else 1.0 / round(1.0 / ratio) if ratio > 0 else 1.0
        ratios.append(1.0 if 1 / _NEARLY < ratio < _NEARLY else float(snapped))
    return tuple(ratios)
