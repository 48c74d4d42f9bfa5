"""Which input pixels each element of each tensor of a recording can see: the forward reading of the tape.

An element's view of the input is a box, first and last pixel per axis. It is kept as one tensor ``reach`` of shape
``(2·D, *shape)``: the first pixels of the D axes, then minus the last ones, so that the union of two boxes is one
minimum, and +∞ is the empty box. Boxes reach beyond the image where padding does: a receptive field is a property of
the network, not of the border.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from widerf.operators import axis_matrices, kind_of, reduced_dims
from widerf.trace import Step, Tape

_PERIODS = 16  # longest period along an axis that is looked for: beyond upsampling by 16 the mean slope stands in
_EMPTY = math.inf
Jump = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Field:
    """What the elements of one tensor see.

    Attributes:
        reach: ``(2·D, *shape)``, boxes as above.
        jump: input pixels between neighbours per axis, as the strides say; used where a single unit tells nothing.
        global_paths: modules through which the tensor sees the whole image besides its boxes.
    """

    reach: Tensor
    jump: tuple[float, ...]
    global_paths: frozenset[str] = frozenset()


@dataclass
class Reading:
    """The forward reading: the map's field, and what was met on the way."""

    result: Field
    misaligned: dict[str, tuple[float, ...]] = field(default_factory=dict)


def read(tape: Tape) -> Reading:
    """Walk the tape forwards from the input, one box per pixel, to the map.

    Raises:
        UntreatedOperatorError: for an operator without a rule.
    """
    steps = tape.needed()
    last_use = {value: index for index, step in enumerate(steps) for value in step.inputs.values()}
    image = tape.values[0]
    spatial = tuple(image.shape[2:])
    fields: dict[int, Field] = {0: Field(_pixels(image), (1.0,) * len(spatial))}
    misaligned: dict[str, tuple[float, ...]] = {}
    for index, step in enumerate(steps):
        kind = kind_of(step.op)
        if kind is None or kind not in _RULES:
            raise step.untreated("receptive_field")
        inputs = {position: fields[value] for position, value in step.inputs.items() if value in fields}
        if inputs:
            shift = _misalignment(list(inputs.values())) if len(inputs) > 1 else None
            if shift is not None and kind in ("pointwise", "moves"):
                misaligned.setdefault(step.module, shift)
            fields.update(_advance(step, kind, tape, inputs, spatial))
        for value in set(step.inputs.values()):
            if last_use[value] == index and value != tape.target:
                fields.pop(value, None)
    return Reading(fields[tape.target], misaligned)


def _advance(step: Step, kind: str, tape: Tape, inputs: dict[int, Field], spatial: tuple[int, ...]) -> dict[int, Field]:
    jump = tuple(max(jumps) for jumps in zip(*(f.jump for f in inputs.values()), strict=True))
    paths = frozenset[str]().union(*(f.global_paths for f in inputs.values()))
    shapes = [tuple(tape.values[out].shape) if out is not None else None for out in step.outputs]
    arguments = step.arguments(tape.values)
    reaches, jump = _RULES[kind](step, arguments, {i: f.reach for i, f in inputs.items()}, shapes, jump)
    if kind in _MIXING:
        outputs = [r for r in reaches if r is not None]
        if _merges_positions(outputs, [f.reach for f in inputs.values()], spatial, jump):
            paths |= {step.module}
            reaches = [None if r is None else torch.full_like(r, _EMPTY) for r in reaches]
    if kind == "normalisation" and _normalises_space(step, arguments):
        paths |= {step.module}
    return {
        out: Field(reach, jump, paths) for out, reach in zip(step.outputs, reaches, strict=False)
        if out is not None and reach is not None
    }  # fmt: skip


def _pixels(image: Tensor) -> Tensor:
    rank = image.ndim - 2
    axes = [torch.arange(n, dtype=torch.float32) for n in image.shape[2:]]
    first = torch.stack(torch.meshgrid(*axes, indexing="ij")).view(rank, 1, 1, *image.shape[2:])
    return torch.cat([first, -first]).expand(-1, *image.shape)


def _thin(reach: Tensor) -> Tensor:
    """The same boxes with one element in place of each axis along which they are known to be equal (stride 0)."""
    for dim in range(1, reach.ndim):
        if reach.stride(dim) == 0 and reach.shape[dim] > 1:
            reach = reach.narrow(dim, 0, 1)
    return reach


def _union(reaches: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Union of boxes that broadcast to ``shape``."""
    union = _thin(_expand(reaches[0], shape))
    for reach in reaches[1:]:
        union = torch.minimum(union, _thin(_expand(reach, shape)))
    return union.expand(-1, *shape)


def _sees_all(reach: Tensor, spatial: tuple[int, ...], how: Callable[[Tensor], Tensor] = torch.all) -> bool:
    """Whether every element, or with ``torch.any`` some element, sees the whole image."""
    whole = torch.tensor([0.0 for _ in spatial] + [1.0 - n for n in spatial])
    return bool(how((_thin(reach).flatten(1) <= whole[:, None]).all(0)))


def _merges_positions(outputs: list[Tensor], inputs: list[Tensor], spatial: tuple[int, ...], jump: Jump) -> bool:
    """Whether every output sees the whole image in the same way, which not all inputs did.

    "The same way" is tried strictly and with some slack: channels may see differently (part of them went through a
    further layer), and so may neighbours, by one jump (attention among every second position). Where no input saw
    the whole image, it is enough that every output does.
    """
    whole = [reach for reach in outputs if _sees_all(reach, spatial)]
    if whole and not any(_sees_all(reach, spatial, torch.any) for reach in inputs):
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
    reach = _thin(reach)
    dims = [dim for dim in range(1, reach.ndim) if dim != free]
    if not dims:
        return True
    first = reach
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return bool(((reach == first) | ((reach - first).abs() <= slack)).all())


def _misalignment(fields: list[Field]) -> tuple[float, ...] | None:
    """Offset between the centres of two tensors that are joined, where it is the same everywhere and not zero."""
    centres = []
    for item in fields:
        reach = _thin(item.reach)
        rank = reach.shape[0] // 2
        seen = reach.isfinite().all(0)
        if not bool(seen.any()):
            continue
        centre = (reach[:rank] - reach[rank:]) / 2
        centres.append(centre.flatten(1)[:, seen.flatten()])
    for other in centres[1:]:
        alike = other.shape == centres[0].shape
        # Joined along channels: compare the centres of mass.
        shift = other - centres[0] if alike else (other.mean(1) - centres[0].mean(1))[:, None]
        if bool((shift - shift[:, :1]).abs().max() < 1e-3) and bool(shift.abs().max() > 1e-2):
            return tuple(round(float(s), 4) for s in shift[:, 0])
    return None


# ── rules: (step, arguments, reaches of tracked leaves, shapes of outputs, jump) → reaches of outputs, jump ──

Outcome = tuple[list[Tensor | None], Jump]
Rule = Callable[[Step, dict[str, Any], dict[int, Tensor], list[Any], Jump], Outcome]


def _pointwise(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    if step.name == "where":  # a choice, not a union
        return _moves(step, arguments, {i: r.contiguous() for i, r in reaches.items()}, shapes, jump)
    union = _union(list(reaches.values()), shapes[0])
    return [union if shape == shapes[0] else None for shape in shapes], jump


def _expand(reach: Tensor, shape: tuple[int, ...]) -> Tensor:
    lacking = len(shape) - (reach.ndim - 1)
    return reach.reshape(reach.shape[0], *(1 for _ in range(lacking)), *reach.shape[1:]).expand(-1, *shape)


def _moves(step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump) -> Outcome:
    """The operator itself moves the boxes, one component of the box at a time."""
    if step.name == "constant_pad_nd" or "_pad" in step.name:
        (reach,) = reaches.values()
        pad = list(arguments["pad"] if "pad" in arguments else arguments["padding"])
        for back in range(len(pad) // 2):
            reach = _extend(reach, reach.ndim - 1 - back, pad[2 * back], pad[2 * back + 1], jump)
        return [reach], jump
    if step.name == "im2col":
        return [_unfolded(arguments, next(iter(reaches.values())), jump)], jump
    parts: list[list[Tensor | None]] = []
    for component in range(next(iter(reaches.values())).shape[0]):
        leaves = {i: reach[component] for i, reach in reaches.items()}
        filled = _with_empty_constants(step, leaves)
        parts.append([out if isinstance(out, Tensor) else None for out in _move(step, arguments, filled, shapes)])
    moved = []
    for outs in zip(*parts, strict=True):
        whole = [o for o in outs if o is not None]
        moved.append(torch.stack(whole) if len(whole) == len(outs) and whole[0].is_floating_point() else None)
    if step.name.startswith(("upsample", "_upsample")):
        size_in, size_out = next(iter(reaches.values())).shape[3:], shapes[0][2:]
        jump = tuple(j * a / b for j, a, b in zip(jump, size_in, size_out, strict=True))
    return moved, jump


def _with_empty_constants(step: Step, leaves: dict[int, Tensor]) -> dict[int, Tensor]:
    """Constants that are joined to boxes (a class token, zeros to be filled) see nothing."""
    filled = dict(leaves)
    if step.name in ("cat", "stack", "copy", "slice_scatter", "select_scatter", "index_put", "where"):
        for i, leaf in enumerate(step.leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and i not in filled:
                filled[i] = torch.full_like(leaf, _EMPTY, dtype=torch.float32)
    return filled


def _move(step: Step, arguments: dict[str, Any], leaves: dict[int, Tensor], shapes: list[Any]) -> tuple[Any, ...]:
    if step.name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        # A view of the recorded tensor need not be one of the boxes, which are laid out differently.
        return (next(iter(leaves.values())).reshape(shapes[0]),)
    if step.name in ("clone", "alias", "detach", "_to_copy", "contiguous", "lift_fresh"):
        return (next(iter(leaves.values())),)
    if step.name == "as_strided":
        tensor = arguments["self"]
        (position,) = step.inputs
        laid = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32).copy_(leaves[position])
        return (laid.as_strided(arguments["size"], arguments["stride"]),)
    if step.name in ("topk", "sort"):  # any element may come out
        (reach,) = leaves.values()
        dim = arguments["dim"]
        return (reach.amin(dim, keepdim=True).expand(shapes[0]),)
    return step.call(leaves)


def _extend(reach: Tensor, dim: int, before: int, after: int, jump: Jump) -> Tensor:
    """Continue the boxes beyond a map's border along one axis, as if the map went on; negative amounts crop."""
    n = reach.shape[dim]
    if before < 0 or after < 0:
        reach = reach.narrow(dim, max(-before, 0), n - max(-before, 0) - max(-after, 0))
        return _extend(reach, dim, max(before, 0), max(after, 0), jump)
    if before == after == 0:
        return reach
    period, slope = _slope(reach, dim, jump)
    index = torch.arange(-before, n + after)
    turns = torch.where(
        index < 0, -((-index + period - 1) // period), torch.where(index >= n, (index - n) // period + 1, 0)
    )
    source = (index - turns * period).clamp(0, n - 1)
    shape = [1] * reach.ndim
    shape[dim] = len(index)
    steps = turns.to(reach.dtype).view(shape) * slope
    taken = reach.index_select(dim, source)
    return torch.where(taken.isfinite() & (turns.view(shape) != 0), taken + steps, taken)


def _slope(reach: Tensor, dim: int, jump: Jump) -> tuple[int, Tensor]:
    """Shortest period along an axis after which boxes repeat, shifted by the returned amount."""
    n = reach.shape[dim]
    if n == 1:
        rank = len(jump)
        slope = reach.new_zeros(2 * rank, *(1 for _ in range(reach.ndim - 1)))
        axis = dim - (reach.ndim - rank)
        if 0 <= axis < rank:
            slope[axis], slope[rank + axis] = jump[axis], -jump[axis]
        return 1, slope
    for period in range(1, min(n // 2, _PERIODS) + 1):
        difference = reach.narrow(dim, period, n - period) - reach.narrow(dim, 0, n - period)
        first = difference.narrow(dim, 0, 1)
        if bool(((difference - first).abs().nan_to_num(0.0) < 1e-3).all()):
            return period, first.nan_to_num(0.0, 0.0, 0.0)
    mean = (reach.narrow(dim, n - 1, 1) - reach.narrow(dim, 0, 1)) / (n - 1)
    return 1, mean.nan_to_num(0.0, 0.0, 0.0)


def _window(
    reach: Tensor, jump: Jump, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    shape: tuple[int, ...],
) -> Outcome:  # fmt: skip
    """Union over a sliding window; ``reach`` is (2·D, batch, channels, *spatial)."""
    rank = len(kernel)
    for axis in range(rank):
        dim = reach.ndim - rank + axis
        count = shape[axis]
        last = (count - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] - padding[axis]
        reach = _extend(reach, dim, padding[axis], last - (reach.shape[dim] - 1), jump)
        taps = [
            reach.narrow(dim, t * dilation[axis], (count - 1) * stride[axis] + 1).index_select(
                dim, torch.arange(0, (count - 1) * stride[axis] + 1, stride[axis])
            )
            for t in range(kernel[axis])
        ]
        union = taps[0]
        for tap in taps[1:]:
            union = torch.minimum(union, tap)
        reach = union
    return [reach], _scaled(jump, [float(s) for s in stride])


def _scaled(jump: Jump, factors: list[float]) -> Jump:
    """Jump behind a layer on the last axes; one on fewer axes than the image has, on tokens say, tells nothing."""
    if len(factors) < len(jump):
        return jump
    return tuple(j * f for j, f in zip(jump, factors[len(factors) - len(jump) :], strict=True))


def _convolution(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    if 0 not in reaches:
        raise step.untreated("receptive_field (weights that depend on the input)")
    reach, weight, groups = reaches[0], arguments["weight"], arguments["groups"]
    kernel, spatial = list(weight.shape[2:]), shapes[0][2:]
    reach = _thin(reach)
    components, batch, channels = reach.shape[:3]
    groups = 1 if channels == 1 else groups
    reach = reach.reshape(components, batch, groups, channels // groups, *reach.shape[3:]).amin(3)
    stride, padding, dilation = (_per_axis(arguments[n], len(kernel)) for n in ("stride", "padding", "dilation"))
    if arguments["transposed"]:
        reach, jump = _transposed(reach, jump, kernel, stride, padding, dilation, spatial)
    else:
        outs, jump = _window(reach, jump, kernel, stride, padding, dilation, spatial)
        assert outs[0] is not None
        reach = outs[0]
    if groups == 1:
        return [reach.expand(-1, *shapes[0])], jump
    return [reach.repeat_interleave(shapes[0][1] // groups, 2)], jump


def _transposed(
    reach: Tensor, jump: Jump, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    shape: tuple[int, ...],
) -> tuple[Tensor, Jump]:  # fmt: skip
    """Output o reads input i wherever o = i·stride − padding + t·dilation for some tap t."""
    for axis in range(len(kernel)):
        dim = reach.ndim - len(kernel) + axis
        n, s, p, d = reach.shape[dim], stride[axis], padding[axis], dilation[axis]
        margin = (kernel[axis] * d + p) // s + 2
        extended = _extend(reach, dim, margin, margin + shape[axis] // s, jump)
        out = None
        for t in range(kernel[axis]):
            place = torch.arange(shape[axis]) + p - t * d
            source = torch.div(place, s, rounding_mode="floor") + margin
            tap = extended.index_select(dim, source.clamp(0, extended.shape[dim] - 1))
            view = [1] * tap.ndim
            view[dim] = len(place)
            tap = torch.where((place % s == 0).view(view), tap, tap.new_tensor(_EMPTY))
            out = tap if out is None else torch.minimum(out, tap)
        assert out is not None and n > 0
        reach = out
    return reach, _scaled(jump, [1 / s for s in stride])


def _per_axis(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _pooling(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    (reach,) = reaches.values()
    rank = _rank(step)
    kernel = _per_axis(arguments["kernel_size"], rank)
    stride = _per_axis(arguments["stride"] or kernel, rank)
    padding = _per_axis(arguments["padding"], rank)
    dilation = _per_axis(arguments.get("dilation", 1), rank)
    outs, jump = _window(_thin(reach), jump, kernel, stride, padding, dilation, shapes[0][-rank:])
    return [out.expand(-1, *shapes[0]) if out is not None else None for out in outs], jump


def _resampling(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    (reach,) = reaches.values()
    rank = _rank(step)
    sizes = reach.shape[-rank:]
    if step.name == "adaptive_max_pool2d":
        matrices = [_adaptive(n, m) for n, m in zip(sizes, shapes[0][-rank:], strict=True)]
    else:
        matrices = axis_matrices(lambda x: step.call({0: x})[0], torch.zeros(1, 1, *sizes), rank)
    for axis, matrix in enumerate(matrices):
        dim = reach.ndim - rank + axis
        rows = [row.nonzero().flatten() for row in matrix.abs() > 1e-6]
        most = max(len(row) for row in rows)
        padded = torch.stack([torch.cat([row, row[-1:].expand(most - len(row))]) for row in rows])
        taken = [reach.index_select(dim, padded[:, k]) for k in range(most)]
        union = taken[0]
        for tap in taken[1:]:
            union = torch.minimum(union, tap)
        reach = union
    return [reach], _scaled(jump, [n / m for n, m in zip(sizes, shapes[0][-rank:], strict=True)])


def _rank(step: Step) -> int:
    """Spatial axes that an operator such as ``max_pool2d_with_indices`` works on."""
    return int(next(c for c in step.name if c.isdigit()))


def _adaptive(n: int, m: int) -> Tensor:
    matrix = torch.zeros(m, n)
    for o in range(m):
        matrix[o, o * n // m : -((o + 1) * n // -m)] = 1
    return matrix


def _reduction(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    (reach,) = reaches.values()
    if step.name == "col2im":
        return [_folded(arguments, reach, shapes[0])], jump
    dims = tuple(d + 1 for d in reduced_dims(arguments, reach.ndim - 1))
    union = reach.amin(dims)
    return [None if shape is None else union.reshape(-1, *shape) for shape in shapes], jump


def _unfolded(arguments: dict[str, Any], reach: Tensor, jump: Jump) -> Tensor:
    """Patches side by side as columns; boxes go on beyond the border."""
    for axis, padding in enumerate(_per_axis(arguments["padding"], 2)):
        reach = _extend(reach, reach.ndim - 2 + axis, padding, padding, jump)
    window, dilation, stride = (arguments[name] for name in ("kernel_size", "dilation", "stride"))
    columns = [torch.nn.functional.unfold(part, window, dilation, 0, stride) for part in reach]
    return torch.stack(columns)


def _folded(arguments: dict[str, Any], columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Overlapping patches, laid side by side as columns, are put back: a pixel sees what all of its patches see."""
    height, width = shape[-2:]
    pixels = torch.arange(1.0, height * width + 1).view(1, 1, height, width)  # 0 is the padding
    geometry = [arguments[name] for name in ("kernel_size", "dilation", "padding", "stride")]
    target = torch.nn.functional.unfold(pixels, *geometry).long().flatten()
    count = math.prod(shape[:-2])
    flat = columns.reshape(columns.shape[0], count, len(target))
    folded = torch.full((columns.shape[0], count, height * width + 1), _EMPTY)
    folded = folded.scatter_reduce(2, target.expand_as(flat), flat, "amin")
    return folded[..., 1:].reshape(-1, *shape)


def _matmul(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    """Element (i, k) of a product sees what row i of the left and column k of the right factor see."""
    union = None
    added = step.name in ("addmm", "baddbmm")
    for position, reach in reaches.items():
        if added and position == 0:
            part = _expand(reach, shapes[0])
        elif position == (1 if added else 0):
            part = reach.amin(-1, keepdim=True).expand(-1, *shapes[0]) if shapes[0] else reach.amin(-1)
        else:
            part = reach.amin(-2, keepdim=True).expand(-1, *shapes[0])
        union = part if union is None else torch.minimum(union, part)
    return [union], jump


def _softmax(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    (reach,) = reaches.values()
    dim = arguments["dim"] % (reach.ndim - 1) + 1
    return [reach.amin(dim, keepdim=True).expand_as(reach)], jump


def _normalisation(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    """Boxes stay; only what is normalised at each position by itself, over channels, joins its elements."""
    reach = next(iter(reaches.values()))
    if "normalized_shape" in arguments and not _normalises_space(step, arguments):
        dims = tuple(range(reach.ndim - len(arguments["normalized_shape"]), reach.ndim))
        reach = reach.amin(dims, keepdim=True).expand_as(reach)
    return [reach, *(None for _ in shapes[1:])], jump


def _normalises_space(step: Step, arguments: dict[str, Any]) -> bool:
    """Whether statistics are taken over positions of one image (batch statistics in training are left aside)."""
    if step.name == "native_group_norm":
        return bool(arguments["HxW"] > 1)
    if "normalized_shape" in arguments:
        return len(arguments["normalized_shape"]) > 1
    return step.name == "_native_batch_norm_legit" and arguments.get("running_mean") is None


def _dropout(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    (reach,) = reaches.values()
    return [reach, *(None for _ in shapes[1:])], jump


_MIXING = ("reduction", "matmul", "softmax", "resampling")
_RULES: dict[str, Rule] = {
    "pointwise": _pointwise,
    "moves": _moves,
    "convolution": _convolution,
    "matmul": _matmul,
    "pooling": _pooling,
    "resampling": _resampling,
    "reduction": _reduction,
    "normalisation": _normalisation,
    "softmax": _softmax,
    "dropout": _dropout,
}
