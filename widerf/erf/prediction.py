"""The predicted ERF: from the weights that are there, in one forward and one backward pass, without sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widerf._checks import require
from widerf.erf.energy import backpropagate_scaled
from widerf.erf.map import ERF
from widerf.erf.receptive import from_tape
from widerf.trace.recorder import record
from widerf.trace.sandbox import untouched
from widerf.trace.site import MapSite, check_input_size, check_unit, probe_input, spatial_layer
from widerf.trace.tape import Tape

_SEED = 0


def predict(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    layer: str | nn.Module | None = None,
    unit: int | Sequence[int] | None = None,
) -> ERF:
    """Predict the effective receptive field of a unit without sampling over weights.

    The map is the expected energy of the gradient if the signs of all weights were redrawn: one forward pass on an
    N(0, 1) image is recorded, then the energy goes back from the unit through each operator's squared Jacobian, so that
    weights enter by their squares and activations by their squared derivatives (:mod:`widerf.erf.energy`). For
    zero-mean weights without non-linearities this is the convolution of the layers' tap profiles (docs/theory.md (3)
    and (13); Luo et al. 2016, eq. 8). The model is taken in the mode in which it is, with one image in the batch, and
    comes back bit-identical.

    The activations are those of one image: where layer norms make a unit's ERF differ between images, as in ConvNeXt
    (std by 4 %), so does the prediction. Attention and group norms are treated less well than convolutions, see
    :mod:`widerf.erf.energy`.

    Args:
        model: any module that maps ``(batch, *input_size)`` to anything.
        input_size: ``(channels, *spatial)``, spatial rank 1 to 3.
        layer: module or its name; by default the last spatial map before global pooling.
        unit: index on that map, by default the centre one.

    Returns:
        The ERF. It has no interval: nothing was sampled over weights.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument breaks its rule, or if no energy reaches the input (a dead unit).
        UntreatedOperatorError: for an operator without a rule; the message names it and its module.

    Warns:
        ClippedWarning: if the image border cuts off more than one per cent of the mass.

    Example:
        >>> model = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(5)))
        >>> for conv in model:
        ...     _ = nn.init.ones_(conv.weight)
        >>> erf = predict(model, (1, 25, 25))
        >>> round(erf.std**2, 6) == round(5 * (3**2 - 1) / 12, 6)
        True
    """
    require(isinstance(model, nn.Module), "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    input_size = check_input_size(input_size)
    site = spatial_layer(model, input_size, layer)
    index = check_unit(unit, site.spatial_shape)
    tape, energy, _ = expected_energy(model, input_size, site, index)
    field = from_tape(tape, site.name)
    first, last = field.interval(index)
    return ERF.from_energy(
        energy.cpu(),
        center=field.center(index),
        trf_size=None if field.global_paths else tuple(b - a + 1 for a, b in zip(first, last, strict=True)),
        jump=field.jump,
    )


def expected_energy(
    model: nn.Module, input_size: tuple[int, ...], site: MapSite, unit: tuple[int, ...], image_seed: int = _SEED
) -> tuple[Tape, Tensor, float]:
    """Recording of the pass, energy ``(*spatial)`` in float64, and the logarithm of the factor to its true scale."""
    with untouched(model), torch.no_grad():
        tape = record(model, _image(model, input_size, image_seed), site)
        seed = torch.zeros_like(tape.values[tape.target], memory_format=torch.contiguous_format)
        place: tuple[Any, ...] = (slice(None), slice(None), *unit)
        seed[place] = 1
        energy, log_scale = backpropagate_scaled(tape, seed)
    energy = energy.double().sum(1).mean(0)
    require(bool(energy.isfinite().all()), "model", "have finite gradients", "NaN or infinity")
    return tape, energy, log_scale


def _image(model: nn.Module, input_size: tuple[int, ...], seed: int) -> Tensor:
    like = probe_input(model, input_size, batch=1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like)
