"""What each kind of operator does to the boxes that its inputs see: one rule per kind.

A rule takes (step, arguments, reaches of tracked leaves, shapes of outputs, jump) and returns the outputs' reaches and
jump. :mod:`widerf.operators.boxes` says what a reach is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from widerf.operators.boxes import (
    EMPTY,
    Jump,
    expanded,
    extend,
    scaled,
    slide,
    slide_transposed,
    smallest,
    thin,
    union_of,
)
from widerf.operators.names import axis_matrices, reduced_dims
from widerf.trace.tape import Step

Outcome = tuple[list[Tensor | None], Jump]
Rule = Callable[[Step, dict[str, Any], dict[int, Tensor], list[Any], Jump], Outcome]


def _pointwise(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    if step.name == "where":  # a choice, not a union
        return _moves(step, arguments, {i: r.contiguous() for i, r in reaches.items()}, shapes, jump)
    union = union_of(list(reaches.values()), shapes[0])
    return [union if shape == shapes[0] else None for shape in shapes], jump


def _moves(step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump) -> Outcome:
    """The operator itself moves the boxes, one component of the box at a time."""
    if step.name == "constant_pad_nd" or "_pad" in step.name:
        (reach,) = reaches.values()
        pad = list(arguments["pad"] if "pad" in arguments else arguments["padding"])
        for back in range(len(pad) // 2):
            reach = extend(reach, reach.ndim - 1 - back, pad[2 * back], pad[2 * back + 1], jump)
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
                filled[i] = torch.full_like(leaf, EMPTY, dtype=torch.float32)
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


def _convolution(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    if 0 not in reaches:
        raise step.untreated("receptive_field (weights that depend on the input)")
    reach, weight, groups = reaches[0], arguments["weight"], arguments["groups"]
    kernel, spatial = list(weight.shape[2:]), shapes[0][2:]
    reach = thin(reach)
    components, batch, channels = reach.shape[:3]
    groups = 1 if channels == 1 else groups
    reach = reach.reshape(components, batch, groups, channels // groups, *reach.shape[3:]).amin(3)
    stride, padding, dilation = (_per_axis(arguments[n], len(kernel)) for n in ("stride", "padding", "dilation"))
    if arguments["transposed"]:
        reach, jump = slide_transposed(reach, jump, kernel, stride, padding, dilation, spatial)
    else:
        reach, jump = slide(reach, jump, kernel, stride, padding, dilation, spatial)
    if groups == 1:
        return [reach.expand(-1, *shapes[0])], jump
    return [reach.repeat_interleave(shapes[0][1] // groups, 2)], jump


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
    reach, jump = slide(thin(reach), jump, kernel, stride, padding, dilation, shapes[0][-rank:])
    return [reach.expand(-1, *shapes[0])], jump


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
        reach = smallest(reach.index_select(dim, padded[:, k]) for k in range(most))
    return [reach], scaled(jump, [n / m for n, m in zip(sizes, shapes[0][-rank:], strict=True)])


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
        reach = extend(reach, reach.ndim - 2 + axis, padding, padding, jump)
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
    folded = torch.full((columns.shape[0], count, height * width + 1), EMPTY)
    folded = folded.scatter_reduce(2, target.expand_as(flat), flat, "amin")
    return folded[..., 1:].reshape(-1, *shape)


def _matmul(
    step: Step, arguments: dict[str, Any], reaches: dict[int, Tensor], shapes: list[Any], jump: Jump
) -> Outcome:
    """Element (i, k) of a product sees what row i of the left and column k of the right factor see."""
    parts = []
    added = step.name in ("addmm", "baddbmm")
    for position, reach in reaches.items():
        if added and position == 0:
            parts.append(expanded(reach, shapes[0]))
        elif position == (1 if added else 0):
            parts.append(reach.amin(-1, keepdim=True).expand(-1, *shapes[0]) if shapes[0] else reach.amin(-1))
        else:
            parts.append(reach.amin(-2, keepdim=True).expand(-1, *shapes[0]))
    return [smallest(parts)], jump


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
    if "normalized_shape" in arguments and not normalises_space(step, arguments):
        dims = tuple(range(reach.ndim - len(arguments["normalized_shape"]), reach.ndim))
        reach = reach.amin(dims, keepdim=True).expand_as(reach)
    return [reach, *(None for _ in shapes[1:])], jump


def normalises_space(step: Step, arguments: dict[str, Any]) -> bool:
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


MIXING = ("reduction", "matmul", "softmax", "resampling")
RULES: dict[str, Rule] = {
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
