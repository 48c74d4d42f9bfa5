"""Normalisation by statistics of the activations, softmax, and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from widerf.operators.boxes import Jump, thin
from widerf.operators.flow import Energies, Flow, root, scattered
from widerf.operators.rule import Arguments, CommonParts, Inputs, Parts, Rule, in_place, joined, named, once
from widerf.trace.tape import Call, Tape

# ── boxes ───────────────────────────────────────────────────────────────────────────────────────────────


def _stay(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    if set(reaches) != {0}:
        raise call.untreated("receptive_field (scale or shift that depends on the input)")
    return [reaches[0], *(None for _ in shapes[1:])]


def _join_channels(
    call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump
) -> list[Tensor | None]:
    """Boxes stay; only what is normalised at each position by itself, over channels, joins its elements."""
    reach, *statistics = _stay(call, arguments, reaches, shapes, jump)
    if reach is not None and not _over_many_axes(call, arguments):
        reach = thin(reach).amin(-1, keepdim=True).expand_as(reach)
    return [reach, *statistics]


def _join_scores(
    call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump
) -> list[Tensor | None]:
    (reach,) = reaches.values()
    dim = arguments["dim"] % (reach.ndim - 1) + 1
    return [thin(reach).amin(dim, keepdim=True).expand_as(reach)]


# ── statistics over the positions of one image (batch statistics in training are left aside) ────────────


def _without_running_mean(call: Call, arguments: Arguments) -> bool:
    return arguments.get("running_mean") is None


def _over_positions(call: Call, arguments: Arguments) -> bool:
    return bool(arguments["HxW"] > 1)


def _over_many_axes(call: Call, arguments: Arguments) -> bool:
    return len(arguments["normalized_shape"]) > 1


# ── energy ──────────────────────────────────────────────────────────────────────────────────────────────


def _only_the_image(call: Call, inputs: Inputs, energies: Energies) -> tuple[Tensor, Tensor]:
    energy = energies[0]
    if set(inputs) != {0} or energy is None:
        raise call.untreated("predict (scale or shift that depends on the input, or statistics that are read)")
    return inputs[0], energy


def _epsilon(arguments: Arguments) -> Any:
    return arguments.get("eps", arguments.get("epsilon"))


def _per_channel(values: Tensor, ndim: int) -> Tensor:
    return values.view(1, -1, *(1 for _ in range(ndim - 2)))


def _trains(call: Call, arguments: Arguments) -> bool:
    return bool(arguments.get("training", "no_training" not in call.name))


def _of_batch(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    x, energy = _only_the_image(call, inputs, energies)
    scale = once(arguments, "scale", lambda: _squared_scale(arguments, x, _trains(call, arguments)))
    energy = energy * _per_channel(scale, x.ndim)
    if not _trains(call, arguments):
        yield 0, energy
    else:
        yield 0, _standardised(x, energy, (0, *range(2, x.ndim)), _epsilon(arguments))


def _squared_scale(arguments: Arguments, x: Tensor, trains: bool) -> Tensor:
    weight: Tensor | None = arguments.get("weight")
    scale = x.new_ones(x.shape[1]) if weight is None else weight.square()
    return scale if trains else scale / (arguments["running_var"] + _epsilon(arguments))


def _of_group(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    x, energy = _only_the_image(call, inputs, energies)
    if arguments["weight"] is not None:
        energy = energy * _per_channel(arguments["weight"].square(), x.ndim)
    grouped = (x.shape[0], arguments["group"], -1)
    yield 0, _standardised(x.reshape(grouped), energy.reshape(grouped), (2,), arguments["eps"]).reshape(x.shape)


def _of_layer(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    x, energy = _only_the_image(call, inputs, energies)
    if arguments["weight"] is not None:
        energy = energy * arguments["weight"].square()
    dims = tuple(range(x.ndim - len(arguments["normalized_shape"]), x.ndim))
    eps = _epsilon(arguments)
    centred = "rms" not in call.name
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


def _of_softmax(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    """J = diag(p) − p pᵀ."""
    ((position, scores),) = inputs.items()
    (energy,) = energies
    assert energy is not None
    dim = arguments["dim"]
    square = scores.softmax(dim).nan_to_num(0.0).square()
    p = square.sqrt()
    yield position, square * ((1 - 2 * p) * energy + (square * energy).sum(dim, keepdim=True))


def _of_dropout(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    """Mean square of the mask: keep / keep²."""
    (position,) = inputs
    assert energies[0] is not None
    keep = 1 - float(arguments["p"]) if arguments["train"] is not False else 1.0
    yield position, energies[0] / keep


# ── what positions have in common ───────────────────────────────────────────────────────────────────────


def batch_statistics(call: Call, tape: Tape) -> bool:
    """Whether a call normalises by the statistics of all positions of a channel."""
    return call.name in _BATCH_NORMS and _trains(call, call.arguments(tape.values))


def _common_of_batch(
    call: Call, arguments: Arguments, inputs: Inputs, energies: Energies, commons: Energies
) -> CommonParts:
    if not _trains(call, arguments) or energies[0] is None:
        return scattered(call, arguments, inputs, energies, commons)
    x, energy = _only_the_image(call, inputs, energies)
    return [None for _ in energies], _through_statistics(arguments, x, energy, commons[0])


def _through_statistics(
    arguments: Arguments, x: Tensor, energy: Tensor, common: Tensor | None
) -> Iterator[tuple[int, Flow]]:
    r"""J = (δ_ij − (1 + x̂_i x̂_j)/n)·γ/std. The term in 1 makes the common part, all else is energy."""
    dims = (0, *range(2, x.ndim))
    n = x.numel() // x.shape[1]
    weight: Tensor | None = arguments.get("weight")
    middle = x.mean(dims, keepdim=True)
    scale = ((x - middle).square().mean(dims, keepdim=True) + _epsilon(arguments)).rsqrt()
    z = (x - middle) * scale
    if weight is not None:
        scale = scale * _per_channel(weight, x.ndim)
    along = (energy * z.square()).sum(dims, keepdim=True)
    local = energy * (1 - 2 * (1 + z.square()) / n).clamp(min=0) + z.square() * along / n**2
    if common is not None:  # exactly, but for the sign of what is left, which random weights scatter
        left = common - common.mean(dims, keepdim=True) - z * (common * z).mean(dims, keepdim=True)
        local = local + left.square()
    pattern = root(energy.sum(dims, keepdim=True)) / n * scale.abs()
    yield 0, Flow(local * scale.square(), pattern.expand_as(x))


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────

_BATCH_NORMS = named(
    Rule("normalisation", _stay, _of_batch, _common_of_batch, in_place, over_space=_without_running_mean),
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_batch_norm_with_update miopen_batch_norm",
)
NAMES = joined(
    [
        _BATCH_NORMS,
        named(Rule("normalisation", _stay, _of_group, jump=in_place, over_space=_over_positions), "native_group_norm"),
        named(
            Rule("normalisation", _join_channels, _of_layer, over_space=_over_many_axes),
            "native_layer_norm _fused_rms_norm",
        ),
        named(Rule("softmax", _join_scores, _of_softmax, mixes=True, distributes=True), "_softmax _safe_softmax"),
        named(Rule("dropout", _stay, _of_dropout, jump=in_place), "native_dropout"),
    ]
)
