"""Boxes of input pixels, and what sliding windows make of them.

An element's view of the input is a box, first and last pixel per axis. It is kept as one tensor ``reach`` of shape
``(2·D, *shape)``: the first pixels of the D axes, then minus the last ones, so that the union of two boxes is one
minimum, and +∞ is the empty box. Boxes reach beyond the image where padding does: a receptive field is a property of
the network, not of the border.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

_PERIODS = 16  # longest period along an axis that is looked for: beyond upsampling by 16 the mean slope stands in
EMPTY = math.inf
Jump = tuple[float, ...]
Terms = tuple[Tensor, ...]  # of a union, all of one shape


def pixels(image: Tensor) -> Tensor:
    """Each pixel of each channel sees itself."""
    rank = image.ndim - 2
    axes = [torch.arange(n, dtype=torch.float32) for n in image.shape[2:]]
    first = torch.stack(torch.meshgrid(*axes, indexing="ij")).view(rank, 1, 1, *image.shape[2:])
    return torch.cat([first, -first]).expand(-1, *image.shape)


def nothing(like: Tensor) -> Tensor:
    """Empty boxes in the place of others."""
    return like.new_full((len(like), *(1 for _ in like.shape[1:])), EMPTY).expand_as(like)


def thin(reach: Tensor, but: Collection[int] = ()) -> Tensor:
    """The same boxes with one element in place of each axis along which they are known to be equal (stride 0)."""
    for dim in range(1, reach.ndim):
        if reach.stride(dim) == 0 and reach.shape[dim] > 1 and dim not in but:
            reach = reach.narrow(dim, 0, 1)
    return reach


def stacked(components: list[Tensor]) -> Tensor:
    """The components of boxes in one tensor, still with stride 0 along axes along which all of them have it."""
    shape = components[0].shape
    equal = [d for d in range(len(shape)) if shape[d] > 1 and all(c.stride(d) == 0 for c in components)]
    for dim in equal:
        components = [component.narrow(dim, 0, 1) for component in components]
    return torch.stack(components).expand(-1, *shape)


def reshaped(reach: Tensor, shape: Sequence[int]) -> Tensor:
    """One component of boxes in another shape; axes along which all are equal are not copied."""
    if 0 in shape or 0 not in reach.stride():
        return reach.reshape(tuple(shape))
    kept, found = [], []
    for before, after in _blocks(reach.shape, shape):
        equal = all(reach.stride(dim) == 0 or reach.shape[dim] == 1 for dim in before)
        kept += [slice(1 if equal else None) for _ in before]
        found += [1 if equal else shape[dim] for dim in after]
    return reach[tuple(kept)].reshape(found).expand(*shape)


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Runs of axes of two shapes that hold the same elements, as short as may be."""
    i = j = 0
    while i < len(before) or j < len(after):
        starts, m, n = (i, j), 1, 1
        while (i, j) == starts or m != n:
            if i < len(before) and (m <= n or j == len(after)):
                m, i = m * before[i], i + 1
            else:
                n, j = n * after[j], j + 1
        yield range(starts[0], i), range(starts[1], j)


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


def apart(reaches: Sequence[Tensor]) -> Terms:
    """Terms of the union of boxes of one shape: those are united whose union takes no more room than they do.

    Element (i, j) of a product of matrices sees what row i and what column j see. As two terms these are n + m boxes;
    as one n·m, a box for each pair of tokens.
    """
    terms: list[Tensor] = []
    for reach in sorted(reaches, key=_room, reverse=True):
        for at, term in enumerate(terms):
            joined = math.prod(map(max, thin(term).shape, thin(reach).shape))
            if joined <= _room(term) + _room(reach):
                terms[at] = union_of([term, reach], tuple(reach.shape[1:]))
                break
        else:
            terms.append(reach)
    return tuple(terms)


def _room(reach: Tensor) -> int:
    return thin(reach).numel()


def greatest(terms: Terms, dims: Sequence[int]) -> Tensor:
    """Largest entries of a union along axes, which stay with one element.

    Along an axis on which one term alone varies, the largest minimum is the minimum of the largest: no pair is formed.
    """
    least = smallest(term.amax(own, keepdim=True) if own else term for own, term in alone(terms, dims))
    return least.amax(tuple(dims), keepdim=True) if dims else least


def alone(terms: Terms, dims: Sequence[int]) -> list[tuple[tuple[int, ...], Tensor]]:
    """Each term, thin, behind those of some axes along which no other varies."""
    kept = [thin(term) for term in terms]
    others = [kept[:at] + kept[at + 1 :] for at in range(len(kept))]
    return [
        (tuple(dim for dim in dims if all(other.shape[dim] == 1 for other in rest)), term)
        for term, rest in zip(kept, others, strict=True)
    ]


def is_constant(terms: Terms, free: int | None = None, slack: float = 0.0) -> bool:
    """Whether boxes differ by no more than ``slack`` along all axes but ``free``."""
    dims = [dim for dim in range(1, terms[0].ndim) if dim != free]
    if not dims:
        return True
    place = (slice(None), *(slice(1 if dim in dims else None) for dim in range(1, terms[0].ndim)))
    first = smallest(term[place] for term in terms)
    low = smallest(thin(term).amin(dims, keepdim=True) for term in terms)
    high = greatest(terms, dims)
    within = ((low == first) | (first - low <= slack)) & ((high == first) | (high - first <= slack))
    return bool(within.all())


def is_constant_along(reach: Tensor, dim: int) -> bool:
    """Whether boxes are equal along one axis."""
    return reach.stride(dim) == 0 or bool((reach == reach.narrow(dim, 0, 1)).all())


def extend(reach: Tensor, dim: int, before: int, after: int, jump: Jump) -> Tensor:
    """Continue the boxes beyond a map's border along one axis, as if the map went on; negative amounts crop."""
    n, shape = reach.shape[dim], list(reach.shape[1:])
    if before < 0 or after < 0:
        reach = reach.narrow(dim, max(-before, 0), n - max(-before, 0) - max(-after, 0))
        return extend(reach, dim, max(before, 0), max(after, 0), jump)
    if before == after == 0:
        return reach
    reach = thin(reach, but=[dim])
    period, slope = _slope(reach, dim, jump)
    beyond = 0.0 if bool(slope.any()) else EMPTY  # what is added along an axis that is none of the image's sees nothing
    index = torch.cat([torch.arange(-before, 0), torch.arange(n, n + after)])
    turns = torch.where(index < 0, -((-index + period - 1) // period), (index - n) // period + 1)
    taken = reach.index_select(dim, (index - turns * period).clamp(0, n - 1))
    steps = turns.to(reach.dtype).view([-1 if axis == dim else 1 for axis in range(reach.ndim)]) * slope
    added = torch.where(taken.isfinite(), taken + steps + beyond, taken)
    whole = torch.cat([added.narrow(dim, 0, before), reach, added.narrow(dim, before, after)], dim)
    shape[dim - 1] += before + after
    return whole.expand(-1, *shape)


def _slope(reach: Tensor, dim: int, jump: Jump) -> tuple[int, Tensor]:
    """Shortest period along an axis after which boxes repeat, shifted by the returned amount."""
    n = reach.shape[dim]
    if n == 1:
        rank = len(jump)
        slope = reach.new_zeros(2 * rank, *(1 for _ in range(reach.ndim - 1)))
        axis = dim - (reach.ndim - rank)
        if 0 <= axis < rank and reach.ndim == rank + 3 and is_constant((reach[axis : axis + 1],)):
            slope[axis], slope[rank + axis] = jump[axis], -jump[axis]
        return 1, slope  # 0 along an axis that was inserted: the image's own lies elsewhere
    line = reach[tuple(slice(None if axis in (0, dim) else 1) for axis in range(reach.ndim))]
    for period in range(1, min(n // 2, _PERIODS) + 1):
        # One line tells most wrong periods.
        if _step(line, dim, period) is not None and (step := _step(reach, dim, period)) is not None:
            return period, step
    mean = (reach.narrow(dim, n - 1, 1) - reach.narrow(dim, 0, 1)) / (n - 1)
    return 1, mean.nan_to_num(0.0, 0.0, 0.0)


def _step(reach: Tensor, dim: int, period: int) -> Tensor | None:
    """By how much boxes shift after a period along an axis, if they do so everywhere on it."""
    count = reach.shape[dim] - period
    later, sooner = reach.narrow(dim, period, count), reach.narrow(dim, 0, count)
    difference = later - sooner  # not a number between two elements that see nothing
    first = difference.nan_to_num(-EMPTY).amax(dim, keepdim=True)
    steady = (difference - first).abs().nan_to_num(0.0) < 1e-3
    repeats = bool((steady & (later.isfinite() == sooner.isfinite())).all())
    return first.nan_to_num(0.0, 0.0, 0.0) if repeats else None


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
