"""What each kind of operator does to the expected energy of a gradient: its squared Jacobian, one rule per kind.

A rule takes (step, arguments, tracked inputs, energies of the outputs) and yields the position of each tracked leaf
with its energy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from widerf.operators.names import axis_matrices
from widerf.trace.tape import Step, transposed_jacobian

Parts = Iterator[tuple[int, Tensor]]
Rule = Callable[[Step, dict[str, Any], dict[int, Tensor], list[Tensor | None]], Parts]


def _moves(step: Step, _: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]) -> Parts:
    """Entries of J are 0 and 1, their own squares."""
    yield from transposed_jacobian(step, inputs, outputs).items()


def _reduction(step: Step, _: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]) -> Parts:
    """Each input enters one element of an output, with derivative d: d² · energy = (Jᵀ1)(Jᵀ energy)."""
    for index, energy in enumerate(outputs):
        if energy is None:
            continue
        alone: list[Tensor | None] = [None] * len(outputs)
        alone[index] = torch.ones_like(energy)
        slopes = transposed_jacobian(step, inputs, alone)
        alone[index] = energy
        for position, part in transposed_jacobian(step, inputs, alone).items():
            yield position, slopes[position] * part


def _convolution(
    step: Step, arguments: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]
) -> Parts:
    (energy,) = outputs
    assert energy is not None
    image, weight = arguments["input"], arguments["weight"]
    geometry = [arguments[k] for k in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    wanted = [position in inputs for position in (0, 1, 2)]
    parts = torch.ops.aten.convolution_backward(
        energy, image.square() if wanted[1] else image, weight.square(), [weight.shape[0]], *geometry, wanted
    )
    for position in inputs:
        yield position, parts[position]


def _matmul(step: Step, arguments: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]) -> Parts:
    (energy,) = outputs
    assert energy is not None
    if step.name not in ("mm", "bmm", "addmm", "baddbmm"):
        raise step.untreated("predict")
    names = {
        "mm": ("self", "mat2"), "bmm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
    }[step.name]  # fmt: skip
    added = len(step.name) > 3
    left, right = (arguments[name] for name in names)
    scale = float(arguments.get("alpha", 1)) ** 2
    for position in inputs:
        if added and position == 0:
            yield position, (float(arguments["beta"]) ** 2 * energy).sum_to_size(arguments["self"].shape)
        elif position == int(added):
            yield position, scale * energy @ right.square().mT
        else:
            yield position, scale * left.square().mT @ energy


def _pooling(step: Step, arguments: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]) -> Parts:
    if step.name.startswith("max"):
        yield from _moves(step, arguments, inputs, outputs)
    else:
        yield from _resampling(step, arguments, inputs, outputs)


def _resampling(
    step: Step, arguments: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]
) -> Parts:
    """Linear along each axis by itself: the squares of the axes' matrices."""
    if step.name.startswith("adaptive_max"):
        yield from _moves(step, arguments, inputs, outputs)
        return
    ((position, image),) = inputs.items()
    energy = outputs[0]
    assert energy is not None
    rank = int("".join(c for c in step.name if c.isdigit())[0])
    like = image.new_zeros((1, 1, *image.shape[-rank:]))
    for axis, matrix in enumerate(axis_matrices(lambda x: step.call({0: x})[0], like, rank)):
        dim = energy.ndim - rank + axis
        energy = torch.tensordot(energy, matrix.square(), ([dim], [0])).movedim(-1, dim)
    yield position, energy


def _softmax(step: Step, arguments: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]) -> Parts:
    """J = diag(p) − p pᵀ."""
    ((position, scores),) = inputs.items()
    (energy,) = outputs
    assert energy is not None
    dim = arguments["dim"]
    square = scores.softmax(dim).nan_to_num(0.0).square()
    p = square.sqrt()
    yield position, square * ((1 - 2 * p) * energy + (square * energy).sum(dim, keepdim=True))


def _dropout(step: Step, arguments: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]) -> Parts:
    """Mean square of the mask: keep / keep²."""
    (position,) = inputs
    assert outputs[0] is not None
    keep = 1 - float(arguments["p"]) if arguments["train"] is not False else 1.0
    yield position, outputs[0] / keep


def _normalisation(
    step: Step, arguments: dict[str, Any], inputs: dict[int, Tensor], outputs: list[Tensor | None]
) -> Parts:
    energy = outputs[0]
    if set(inputs) != {0} or energy is None:
        raise step.untreated("predict (scale or shift that depends on the input)")
    x = inputs[0]
    weight: Tensor | None = arguments.get("weight")
    eps: Any = arguments.get("eps", arguments.get("epsilon"))
    if "batch_norm" in step.name:
        per_channel = (1, -1, *(1 for _ in range(x.ndim - 2)))
        scale = x.new_ones(x.shape[1]) if weight is None else weight.square()
        if not arguments.get("training", "no_training" not in step.name):
            yield 0, energy * (scale / (arguments["running_var"] + eps)).view(per_channel)
            return
        energy = energy * scale.view(per_channel)
        yield 0, _standardised(x, energy, (0, *range(2, x.ndim)), eps)
    elif step.name == "native_group_norm":
        if weight is not None:
            energy = energy * weight.square().view(1, -1, *(1 for _ in range(x.ndim - 2)))
        grouped = (x.shape[0], arguments["group"], -1)
        yield 0, _standardised(x.reshape(grouped), energy.reshape(grouped), (2,), eps).reshape(x.shape)
    else:
        if weight is not None:
            energy = energy * weight.square()
        dims = tuple(range(x.ndim - len(arguments["normalized_shape"]), x.ndim))
        centred = "rms" not in step.name
        yield 0, _standardised(x, energy, dims, torch.finfo(x.dtype).eps if eps is None else eps, centred)


def _standardised(x: Tensor, energy: Tensor, dims: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    r"""Energy before x̂ = (x − mean)/std over n elements: J = (δ_ij − (1 + x̂_i x̂_j)/n)/std, each entry squared.

    Without centring, as in RMSNorm, the 1 is missing.
    """
    n = 1
    for dim in dims:
        n *= x.shape[dim]
    middle = x.mean(dims, keepdim=True) if centred else torch.zeros_like(x)
    variance = (x - middle).square().mean(dims, keepdim=True) + eps
    z = (x - middle) * variance.rsqrt()
    one = 1.0 if centred else 0.0
    sums = [(energy * z**k).sum(dims, keepdim=True) for k in (0, 1, 2)]
    spread = (one * sums[0] + 2 * one * z * sums[1] + z.square() * sums[2]) / n**2
    kept = energy * (1 - 2 * (one + z.square()) / n)
    return ((kept + spread) / variance).clamp(min=0)


RULES: dict[str, Rule] = {
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
