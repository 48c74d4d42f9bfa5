"""Boxes of input pixels, and what sliding windows make of them.

An element's view of the input is a box, first and last pixel per axis. It is kept as one tensor ``reach`` of shape
``(2·D, *shape)``: the first pixels of the D axes, then minus the last ones, so that the union of two boxes is one
minimum, and +∞ is the empty box. Boxes reach beyond the image where padding does: a receptive field is a property of
the network, not of the border.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_PERIODS = 16  # longest period along an axis that is looked for: beyond upsampling by 16 the mean slope stands in
EMPTY = math.inf
Jump = tuple[float, ...]


def pixels(image: Tensor) -> Tensor:
    """Each pixel of each channel sees itself."""
    rank = image.ndim - 2
    axes = [torch.arange(n, dtype=torch.float32) for n in image.shape[2:]]
    first = torch.stack(torch.meshgrid(*axes, indexing="ij")).view(rank, 1, 1, *image.shape[2:])
    return torch.cat([first, -first]).expand(-1, *image.shape)


def thin(reach: Tensor) -> Tensor:
    """The same boxes with one element in place of each axis along which they are known to be equal (stride 0)."""
    for dim in range(1, reach.ndim):
        if reach.stride(dim) == 0 and reach.shape[dim] > 1:
            reach = reach.narrow(dim, 0, 1)
    return reach


def stacked(components: list[Tensor]) -> Tensor:
    """The components of boxes in one tensor, still with stride 0 along axes along which all of them have it."""
    shape = components[0].shape
    equal = [d for d in range(len(shape)) if shape[d] > 1 and all(c.stride(d) == 0 for c in components)]
    for dim in equal:
        components = [component.narrow(dim, 0, 1) for component in components]
    return torch.stack(components).expand(-1, *shape)


def reshaped(reach: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One component of boxes in another shape; a last axis along which all are equal is not copied."""
    if reach.ndim and reach.stride(-1) == 0 and shape and shape[-1] == reach.shape[-1]:
        return reach[..., 0].reshape(shape[:-1]).unsqueeze(-1).expand(shape)
    return reach.reshape(shape)


def expanded(reach: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Boxes broadcast to ``shape``."""
    lacking = len(shape) - (reach.ndim - 1)
    return reach.reshape(reach.shape[0], *(1 for _ in range(lacking)), *reach.shape[1:]).expand(-1, *shape)


def union_of(reaches: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Union of boxes that broadcast to ``shape``."""
    return smallest(thin(expanded(reach, shape)) for reach in reaches).expand(-1, *shape)


def smallest(reaches: Iterable[Tensor]) -> Tensor:
    """Union of boxes, element by element."""
    return functools.reduce(torch.minimum, reaches)


def _sees_all(reach: Tensor, whole: Tensor, how: Callable[[Tensor], Tensor] = torch.all) -> bool:
    """Whether every element, or with ``torch.any`` some element, sees a whole box."""
    return bool(how((thin(reach).reshape(len(reach), -1) <= whole[:, None]).all(0)))


def _all_that_is_seen(inputs: list[Tensor], spatial: tuple[int, ...]) -> Tensor | None:
    """The box that the inputs see together, within the image; ``None`` if they see nothing."""
    together = smallest(thin(reach).reshape(len(reach), -1).amin(1) for reach in inputs)
    if not bool(together.isfinite().all()):
        return None
    return torch.maximum(together, together.new_tensor([0.0 for _ in spatial] + [1.0 - n for n in spatial]))


def merges_positions(outputs: list[Tensor], inputs: list[Tensor], spatial: tuple[int, ...], jump: Jump) -> bool:
    """Whether every output sees all that the inputs saw in the same way, which not all inputs did.

    All that the inputs saw need not be the whole image: a stride may leave the last pixels out. "The same way" is tried
    strictly and with some slack: channels may see differently (part of them went through a further layer), and so may
    neighbours, by one jump (attention among every second position). Where no input saw all, it is enough that every
    output does.
    """
    seen = _all_that_is_seen(inputs, spatial)
    if seen is None:
        return False
    whole = [reach for reach in outputs if _sees_all(reach, seen)]
    if not whole:
        return False
    if not any(_sees_all(reach, seen, torch.any) for reach in inputs):
        return True
    channels = 2 if outputs and outputs[0].ndim == len(spatial) + 3 and len(spatial) > 1 else None
    for axis in {None, channels}:
        for slack in (0.0, max(jump)):
            same = [_is_constant(reach, axis, slack) for reach in inputs]
            if not all(same) and any(_is_constant(reach, axis, slack) for reach in whole):
                return True
    return False


def _is_constant(reach: Tensor, free: int | None = None, slack: float = 0.0) -> bool:
    """Whether boxes differ by no more than ``slack`` along all axes but ``free``."""
    reach = thin(reach)
    dims = [dim for dim in range(1, reach.ndim) if dim != free]
    if not dims:
        return True
    first = reach
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return bool(((reach == first) | ((reach - first).abs() <= slack)).all())


def is_constant_along(reach: Tensor, dim: int) -> bool:
    """Whether boxes are equal along one axis."""
    return reach.stride(dim) == 0 or bool((reach == reach.narrow(dim, 0, 1)).all())


def misalignment(reaches: list[Tensor]) -> tuple[float, ...] | None:
    """Offset between the centres of two tensors that are joined, where it is the same everywhere and not zero."""
    centres = []
    for reach in map(thin, reaches):
        rank = reach.shape[0] // 2
        seen = reach.isfinite().all(0)
        if not bool(seen.any()):
            continue
        centre = (reach[:rank] - reach[rank:]) / 2
        centres.append(centre.reshape(rank, -1)[:, seen.flatten()])
    for other in centres[1:]:
        alike = other.shape == centres[0].shape
        # Joined along channels: compare the centres of mass.
        shift = other - centres[0] if alike else (other.mean(1) - centres[0].mean(1))[:, None]
        if bool((shift - shift[:, :1]).abs().max() < 1e-3) and bool(shift.abs().max() > 1e-2):
            return tuple(round(float(s), 4) for s in shift[:, 0])
    return None


def extend(reach: Tensor, dim: int, before: int, after: int, jump: Jump) -> Tensor:
    """Continue the boxes beyond a map's border along one axis, as if the map went on; negative amounts crop."""
    n = reach.shape[dim]
    if before < 0 or after < 0:
        reach = reach.narrow(dim, max(-before, 0), n - max(-before, 0) - max(-after, 0))
        return extend(reach, dim, max(before, 0), max(after, 0), jump)
    if before == after == 0:
        return reach
    period, slope = _slope(reach, dim, jump)
    beyond = 0.0 if bool(slope.any()) else EMPTY  # what is added along an axis that is none of the image's sees nothing
    index = torch.arange(-before, n + after)
    turns = torch.where(
        index < 0, -((-index + period - 1) // period), torch.where(index >= n, (index - n) // period + 1, 0)
    )
    source = (index - turns * period).clamp(0, n - 1)
    shape = [1] * reach.ndim
    shape[dim] = len(index)
    steps = turns.to(reach.dtype).view(shape) * slope
    taken = reach.index_select(dim, source)
    return torch.where(taken.isfinite() & (turns.view(shape) != 0), taken + steps + beyond, taken)


def _slope(reach: Tensor, dim: int, jump: Jump) -> tuple[int, Tensor]:
    """Shortest period along an axis after which boxes repeat, shifted by the returned amount."""
    n = reach.shape[dim]
    if n == 1:
        rank = len(jump)
        slope = reach.new_zeros(2 * rank, *(1 for _ in range(reach.ndim - 1)))
        axis = dim - (reach.ndim - rank)
        if 0 <= axis < rank and reach.ndim == rank + 3 and _is_constant(reach[axis : axis + 1]):
            slope[axis], slope[rank + axis] = jump[axis], -jump[axis]
        return 1, slope  # 0 along an axis that was inserted: the image's own lies elsewhere
    for period in range(1, min(n // 2, _PERIODS) + 1):
        later, sooner = reach.narrow(dim, period, n - period), reach.narrow(dim, 0, n - period)
        difference = later - sooner  # not a number between two elements that see nothing
        first = difference.nan_to_num(-EMPTY).amax(dim, keepdim=True)
        steady = (difference - first).abs().nan_to_num(0.0) < 1e-3
        if bool((steady & (later.isfinite() == sooner.isfinite())).all()):
            return period, first.nan_to_num(0.0, 0.0, 0.0)
    mean = (reach.narrow(dim, n - 1, 1) - reach.narrow(dim, 0, 1)) / (n - 1)
    return 1, mean.nan_to_num(0.0, 0.0, 0.0)


def slide(
    reach: Tensor, jump: Jump, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    shape: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Union over a sliding window; ``reach`` is (2·D, batch, channels, *spatial)."""
    rank = len(kernel)
    for axis in range(rank):
        dim = reach.ndim - rank + axis
        count = shape[axis]
        last = (count - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] - padding[axis]
        reach = extend(reach, dim, padding[axis], last - (reach.shape[dim] - 1), jump)
        starts = torch.arange(0, (count - 1) * stride[axis] + 1, stride[axis])
        reach = smallest(reach.index_select(dim, starts + t * dilation[axis]) for t in range(kernel[axis]))
    return reach


def slide_transposed(
    reach: Tensor, jump: Jump, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    shape: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Output o reads input i wherever o = i·stride − padding + t·dilation for some tap t."""
    for axis in range(len(kernel)):
        dim = reach.ndim - len(kernel) + axis
        s, p, d = stride[axis], padding[axis], dilation[axis]
        margin = (kernel[axis] * d + p) // s + 2
        extended = extend(reach, dim, margin, margin + shape[axis] // s, jump)
        taps = []
        for t in range(kernel[axis]):
            place = torch.arange(shape[axis]) + p - t * d
            source = torch.div(place, s, rounding_mode="floor") + margin
            tap = extended.index_select(dim, source.clamp(0, extended.shape[dim] - 1))
            view = [1] * tap.ndim
            view[dim] = len(place)
            taps.append(torch.where((place % s == 0).view(view), tap, tap.new_tensor(EMPTY)))
        reach = smallest(taps)
    return reach


def per_axis(value: int | Sequence[int], rank: int) -> list[int]:
    """One number per axis out of what torch takes for it: a number, or a list of one or of all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def scaled(jump: Jump, factors: Jump | None) -> Jump:
    """Jump behind a layer on the last axes; one on fewer axes than the image has, on tokens say, tells nothing."""
    if factors is None or len(factors) < len(jump):
        return jump
    return tuple(j * f for j, f in zip(jump, factors[len(factors) - len(jump) :], strict=True))
