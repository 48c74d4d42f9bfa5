"""Pooling over a sliding window, and resizing by weights that depend on the sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from widerf.operators.boxes import Jump, per_axis, slide, smallest, thin
from widerf.operators.flow import Energies, averaged, carried
from widerf.operators.moves import energy as _of_one
from widerf.operators.rule import Arguments, Inputs, Parts, Rule, Shape, joined, named
from widerf.trace.tape import Call


def _rank(call: Call) -> int:
    """Spatial axes that an operator such as ``max_pool2d_with_indices`` works on."""
    return int(next(c for c in call.name if c.isdigit()))


# ── pooling ─────────────────────────────────────────────────────────────────────────────────────────────


def _window(call: Call, arguments: Arguments) -> tuple[list[int], list[int]]:
    rank = _rank(call)
    kernel = per_axis(arguments["kernel_size"], rank)
    return kernel, per_axis(arguments["stride"] or kernel, rank)


def _pooled(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    (reach,) = reaches.values()
    kernel, stride = _window(call, arguments)
    padding = per_axis(arguments["padding"], len(kernel))
    dilation = per_axis(arguments.get("dilation", 1), len(kernel))
    reach = slide(thin(reach), jump, kernel, stride, padding, dilation, shapes[0][-len(kernel) :])
    return [reach.expand(-1, *shapes[0])]


def _stride(call: Call, arguments: Arguments, before: Shape, after: Shape) -> Jump:
    return tuple(float(s) for s in _window(call, arguments)[1])


# ── resizing ────────────────────────────────────────────────────────────────────────────────────────────


def axis_matrices(op: Callable[[Tensor], Tensor], image: Tensor, rank: int) -> list[Tensor]:
    """Weights of a linear operator that acts on each spatial axis by itself, such as bilinear interpolation.

    The operator is probed with indicator images of each index along one axis.

    Args:
        op: maps ``(batch, channels, *spatial)`` to ``(batch, channels, *spatial')``, linear, the same for all channels.
        image: any image of the shape, type and device that ``op`` is used on.
        rank: number of spatial axes.

    Returns:
        Per axis a matrix ``(out, in)``; element (o, i) is the weight of input index i in output index o.

    Example:
        >>> op = lambda x: torch.nn.functional.avg_pool2d(x, 2)
        >>> [m.tolist() for m in axis_matrices(op, torch.zeros(1, 1, 4, 2), 2)]
        [[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], [[0.5, 0.5]]]
    """
    spatial = image.shape[-rank:]
    flat = op(image.new_ones((1, 1, *spatial)))[0, 0]
    centre = tuple(n // 2 for n in flat.shape)
    matrices = []
    for axis, n in enumerate(spatial):
        shape = [n, 1, *(1 for _ in spatial)]
        shape[2 + axis] = n
        probes = torch.eye(n, dtype=image.dtype, device=image.device).reshape(shape).expand(n, 1, *spatial)
        index: list[Any] = [slice(None), 0, *centre]
        index[2 + axis] = slice(None)
        matrices.append(op(probes.contiguous())[tuple(index)].T)
    # Each probe bears the other axes' sums at the centre; together they bear rank − 1 of these too many.
    excess = flat[centre]
    return [matrices[0], *(m / excess for m in matrices[1:])]


def _linear(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    """Linear along each axis by itself: the squares of the axes' matrices."""
    ((position, image),) = inputs.items()
    energy = energies[0]
    assert energy is not None
    rank = _rank(call)
    like = image.new_zeros((1, 1, *image.shape[-rank:]))
    for axis, matrix in enumerate(axis_matrices(lambda x: call.run({0: x})[0], like, rank)):
        dim = energy.ndim - rank + axis
        energy = torch.tensordot(energy, matrix.square(), ([dim], [0])).movedim(-1, dim)
    yield position, energy


def _resampled(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    ((position, reach),) = reaches.items()
    rank = _rank(call)
    probe = torch.zeros(1, 1, *reach.shape[-rank:])
    return [_united(reach, axis_matrices(lambda x: call.run({position: x})[0], probe, rank))]


def _cells(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    """Any element of a cell may be the largest."""
    (reach,) = reaches.values()
    rank = _rank(call)
    sizes = zip(reach.shape[-rank:], shapes[0][-rank:], strict=True)
    return [_united(reach, [_adaptive(n, m) for n, m in sizes])]


def _united(reach: Tensor, matrices: list[Tensor]) -> Tensor:
    """What each output sees, along one axis after the other: all inputs that have a weight in it."""
    for axis, matrix in enumerate(matrices):
        rows = [row.nonzero().flatten() for row in matrix.abs() > 1e-6]
        most = max(len(row) for row in rows)
        padded = torch.stack([torch.cat([row, row[-1:].expand(most - len(row))]) for row in rows])
        dim = reach.ndim - len(matrices) + axis
        reach = smallest(reach.index_select(dim, padded[:, k]) for k in range(most))
    return reach


def _adaptive(n: int, m: int) -> Tensor:
    matrix = torch.zeros(m, n)
    for o in range(m):
        matrix[o, o * n // m : -((o + 1) * n // -m)] = 1
    return matrix


def _ratio(call: Call, arguments: Arguments, before: Shape, after: Shape) -> Jump:
    rank = _rank(call)
    return tuple(n / m for n, m in zip(before[-rank:], after[-rank:], strict=True))


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────

NAMES = joined(
    [
        named(
            Rule("pooling", _pooled, _of_one, carried, _stride),
            "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices max_pool2d",
        ),
        named(Rule("pooling", _pooled, _linear, carried, _stride), "avg_pool1d avg_pool2d avg_pool3d"),
        named(
            Rule("resampling", _resampled, _linear, averaged, _ratio, mixes=True),
            "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d",
        ),
        named(
            Rule("resampling", _cells, _of_one, averaged, _ratio, mixes=True), "adaptive_max_pool2d adaptive_max_pool3d"
        ),
        named(
            Rule("resampling", _resampled, _linear, carried, _ratio, mixes=True),
            "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
            "_upsample_bicubic2d_aa",
        ),
    ]
)
