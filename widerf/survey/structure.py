"""Faults of a network's structure: strided grids, windows off their maps, skips that dominate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from widerf.conversion.swap import convert
from widerf.convolutions.convolution import Convolution
from widerf.convolutions.padding import border_loss
from widerf.convolutions.places import Place, find_places
from widerf.convolutions.selection import find_convolutions
from widerf.erf.prediction import expected_energy
from widerf.survey.findings import Finding, Look, Remedy, call_of, mended, spaced
from widerf.trace.scene import Scene
from widerf.trace.tape import Call, Tape

_DOMINATES = 0.5  # share of the head's energy that comes through the skip


def strided_grids(model: nn.Module, kernels: Sequence[Convolution]) -> Iterator[Finding]:
    """Find dilated convolutions whose spacing shares a factor with their stride: they never read most pixels."""
    for kernel in kernels:
        seen = _seen(kernel)
        if kernel.transposed or kernel.offsets is not None or seen == 1:
            continue
        finding = Finding(
            "strided_grid",
            f"{kernel.name}: stride {_text(kernel.stride)} and dilation {_text(kernel.dilation)} share a factor: "
            f"all its units together read {seen:.0%} of their input",
            "greatest common divisor of stride and dilation",
            (kernel.name,), figure="share of the input that is read", before=seen,
        )  # fmt: skip
        pairs = zip(kernel.stride, kernel.dilation, strict=True)
        remedy = spaced(model, kernel.name, kernel.dilation, [next_coprime(d, s) for s, d in pairs])
        look: Look = lambda model, name=kernel.name: _seen(_kernel(model, name))  # type: ignore[misc]  # noqa: E731
        yield finding if remedy is None else mended(model, finding, remedy, look)


def next_coprime(dilation: int, stride: int) -> int:
    """Return the least spacing from ``dilation`` on that shares no factor with ``stride``.

    Example:
        >>> next_coprime(2, 2), next_coprime(4, 3)
        (3, 4)
    """
    return next(d for d in range(dilation, dilation + stride + 1) if math.gcd(d, stride) == 1)


def _seen(kernel: Convolution) -> float:
    axes = zip(kernel.kernel_size, kernel.stride, kernel.dilation, strict=True)
    return math.prod(1 / math.gcd(s, d) for k, s, d in axes if k > 1)


def off_the_map(scene: Scene, kernels: Sequence[Convolution], places: Mapping[str, Place]) -> Iterator[Finding]:
    """Find convolutions whose windows are wider than the map that they slide over: taps there read padding only.

    A dilated window is drawn in. One that is wide by its taps alone is left as it is: there is nothing to mend in the
    layer, only in the size of the image, and the call shows the least size at which the window lies on its map.
    """
    model = scene.model
    for kernel in kernels:
        place = places.get(kernel.name)
        if place is None or kernel.transposed or kernel.offsets is not None:
            continue
        axes = list(zip(kernel.kernel_size, kernel.dilation, place.before, strict=True))
        window = tuple(d * (k - 1) + 1 for k, d, _ in axes)
        if all(w <= n for w, (k, _, n) in zip(window, axes, strict=True) if k > 1):
            continue
        look: Look = lambda model, name=kernel.name, place=place: _met(_kernel(model, name), place)  # type: ignore[misc]  # noqa: E731
        finding = Finding(
            "off_the_map",
            f"{kernel.name}: its window of {_text(window)} is wider than its map of {_text(place.before)}: "
            f"{1 - look(model):.0%} of what its taps read is padding",
            "dilation and the size of the recorded map",
            (kernel.name,), figure="share of taps that meet the map", before=look(model),
        )  # fmt: skip
        fitting = [min(d, max(1, (n - 1) // (k - 1))) if k > 1 else d for k, d, n in axes]
        if fitting != list(kernel.dilation):
            remedy = spaced(model, kernel.name, kernel.dilation, fitting)
            yield finding if remedy is None else mended(model, finding, remedy, look)
        else:
            yield _at_a_larger_size(
                scene, kernel, finding, max(w / n for w, (_, _, n) in zip(window, axes, strict=True))
            )


def _at_a_larger_size(scene: Scene, kernel: Convolution, finding: Finding, ratio: float) -> Finding:
    channels, *spatial = scene.input_size
    larger = (channels, *(math.ceil(n * ratio - 1e-9) for n in spatial))

    def look(model: nn.Module) -> float:
        own = Scene.of(model, larger, scene.site.name or None)
        return _met(_kernel(model, kernel.name), find_places(own, [_kernel(model, kernel.name)])[kernel.name])

    text = f"widerf.summary(model, {larger}, layers=[{kernel.name!r}])"
    told = replace(finding, what=f"{finding.what}; nothing to mend in the layer: larger images give it a larger map")
    return mended(scene.model, told, Remedy(text, lambda model: None), look)


def _met(kernel: Convolution, place: Place) -> float:
    lost = border_loss(kernel, place, torch.ones(kernel.kernel_size, dtype=torch.float64))
    return 1.0 if lost is None else 1 - lost


def _kernel(model: nn.Module, name: str) -> Convolution:
    return next(kernel for kernel in find_convolutions(model) if kernel.name == name)


def _text(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


@dataclass(frozen=True)
class Skip:
    """A join of a path that stayed fine with one that came back from coarser maps.

    Attributes:
        module: where they are joined.
        map_size: positions there.
        share: of the energy of the unit that comes through the fine path.
    """

    module: str
    map_size: tuple[int, ...]
    share: float

    @property
    def dominates(self) -> bool:
        """Whether most of the energy comes through the fine path."""
        return self.share > _DOMINATES


def skip_dominates(scene: Scene, skip: Skip, fine: Sequence[str], look: Look) -> Finding:
    """Return the finding on a skip that dominates; ``fine``: the layers at its resolution, see :func:`fine_layers`."""
    finding = Finding(
        "skip_dominates",
        f"{skip.share:.0%} of what the head sees comes through the skip at {_text(skip.map_size)} that "
        f"{skip.module or 'the model'} joins: wider layers below it hardly show",
        "predicted energy without that path, against that with it",
        tuple(fine), figure="ERF std, input pixels", before=look(scene.model),
    )  # fmt: skip
    if not fine:
        return finding
    remedy = call_of("convert", convert, only=list(fine), input_size=scene.input_size)
    return mended(scene.model, finding, remedy, look)


def fine_layers(skip: Skip, kernels: Sequence[Convolution], places: Mapping[str, Place]) -> list[str]:
    """Return the convolutions with taps on maps of the skip's size: those that what comes through it can widen at."""
    return [
        kernel.name for kernel in kernels
        if max(kernel.kernel_size) > 1 and kernel.name in places and places[kernel.name].before == skip.map_size
    ]  # fmt: skip


def last_skip(scene: Scene) -> Skip | None:
    """Return the last join of a fine and a coarser path on the way to the map, and how much comes through the fine."""
    tape = scene.tape
    coarsest = _coarsest(tape)
    for call in reversed(tape.needed()):
        out = next((out for out in call.outputs if out is not None), None)
        jumps = {value: coarsest[value] for value in call.inputs.values() if value in coarsest}
        if out is None or len(jumps) < 2 or call.name not in ("cat", "add") or not _is_map(tape, out):
            continue
        finest = min(jumps.values())
        if max(jumps.values()) < 2 * finest or _jump(tape, out) >= max(jumps.values()):
            continue
        fine = {value for value, jump in jumps.items() if jump == finest}
        without = replace(tape, calls=[_held(each, fine, tape) if each is call else each for each in tape.calls])
        whole, rest = (_total(replace(scene, _tape=each)) for each in (tape, without))
        return Skip(call.module, tuple(tape.values[out].shape[2:]), max(0.0, 1 - math.exp(rest - whole)))
    return None


def _total(scene: Scene) -> float:
    """Logarithm of the energy that reaches the input."""
    energy, log_scale = expected_energy(scene)
    total = float(energy.sum())
    return math.log(total) + log_scale if total > 0 else -math.inf


def _held(call: Call, values: set[int], tape: Tape) -> Call:
    """The call with some of its inputs taken for constants."""
    leaves = list(call.leaves)
    for position, value in call.inputs.items():
        if value in values:
            leaves[position] = tape.values[value]
    inputs = {position: value for position, value in call.inputs.items() if value not in values}
    return replace(call, leaves=tuple(leaves), inputs=inputs)


def _jump(tape: Tape, value: int) -> float:
    sizes = zip(tape.values[0].shape[2:], tape.values[value].shape[2:], strict=True)
    return max(n / max(m, 1) for n, m in sizes)


def _coarsest(tape: Tape) -> dict[int, float]:
    """Return for each map the largest jump that some path to it has gone through."""
    found = {0: 1.0}
    for call in tape.needed():
        came = max((found[value] for value in call.inputs.values() if value in found), default=1.0)
        for out in call.outputs:
            if out is not None:
                found[out] = max(came, _jump(tape, out)) if _is_map(tape, out) else came
    return found


def _is_map(tape: Tape, value: int) -> bool:
    shape = tape.values[value].shape
    image = tape.values[0]  # windows of attention lie in the batch
    return len(shape) == image.ndim and shape[0] == image.shape[0] and math.prod(shape[2:]) > 1
