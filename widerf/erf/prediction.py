"""The predicted ERF: from the weights that are there, in one forward and one backward pass, without sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from widerf._checks import require
from widerf.erf.energy import Backward, backpropagate
from widerf.erf.frame import Frame
from widerf.erf.map import ERF
from widerf.erf.receptive import from_tape
from widerf.errors import DeadUnitError
from widerf.geometry import mean_variance
from widerf.trace.ambient import plain_arithmetic
from widerf.trace.certain import held
from widerf.trace.scene import Scene


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
    return predicted(Scene.of(model, input_size, layer, unit))


def predicted(scene: Scene, frame: Frame | None = None, *, warn: bool = True, backward: Backward | None = None) -> ERF:
    """Return the predicted ERF of a scene.

    Args:
        scene: what is looked at.
        frame: its geometry where the caller knows that already.
        warn: of an ERF that the border clips.
        backward: passes back over the scene's recording, where several scenes share it.
    """
    energy, _ = expected_energy(scene, backward)
    frame = Frame.of(from_tape(scene.tape, scene.site.name), [scene.unit]) if frame is None else frame
    with plain_arithmetic():
        return ERF.from_energy(energy.cpu(), center=frame.center, trf_size=frame.trf_size, jump=frame.jump, warn=warn)


def expected_energy(scene: Scene, backward: Backward | None = None) -> tuple[Tensor, float]:
    """Energy ``(*spatial)`` in float64, and the logarithm of the factor to its true scale."""
    backward = Backward(scene.tape) if backward is None else backward
    with held(torch.no_grad()):
        energy, log_scale = backward.to_input(scene.tape.target, scene.seed())
    return _over_channels(energy), log_scale


def _over_channels(energy: Tensor) -> Tensor:
    energy = energy.double().sum(1).mean(0)
    require(bool(energy.isfinite().all()), "model", "have finite gradients", "NaN or infinity")
    return energy


def erf_penalty(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    layer: str | nn.Module | None = None,
    unit: int | Sequence[int] | None = None,
    target: float | None = None,
) -> Tensor:
    r"""Return a differentiable number that falls as the predicted ERF of a unit widens, to be added to a loss.

    It is :math:`-\log\sigma`, or with a target :math:`\max(0, \log(\mathrm{target}/\sigma))^2`, where
    :math:`\sigma` is the very ``predict(model, input_size).std``. The gradient is exact: through the squared weights
    that :func:`predict` reads and, where a normalisation by the batch's statistics or a smooth activation makes
    :math:`\sigma` depend on the activations, through these. It reaches all parameters, also those that a weight is
    computed from. Only the shares of the energy count, so that the scale of the weights of a plain chain is left alone.

    Costs about twice as much as :func:`predict`, batch of one image; in long trainings add it every n-th step, n times
    as heavy. ``input_size`` should hold the ERF, since a clipped one is not seen to grow (no warning here), and need
    not be larger. The model is taken in the mode in which it is and comes back bit-identical, gradients included.

    Args:
        model: see :func:`predict`.
        input_size: ``(channels, *spatial)``; by default ``(3, 224, 224)``.
        layer: see :func:`predict`.
        unit: see :func:`predict`.
        target: the std that is wide enough, in input pixels; None: the wider the better.

    Returns:
        A scalar in float64, with derivatives.

    Raises:
        TypeError: see :func:`predict`.
        ValueError: see :func:`predict`; or if ``target`` is not positive, or one pixel has all the energy.
        UntreatedOperatorError: see :func:`predict`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        >>> loss = 0.1 * erf_penalty(net, (1, 9, 9))
        >>> loss.backward()
        >>> net[0].weight.grad is not None
        True
    """
    if target is not None:
        require(isinstance(target, (int, float)), "target", "be a number of pixels", target, TypeError)
        require(0 < target < float("inf"), "target", "be positive", target)
    scene = Scene.of(model, (3, 224, 224) if input_size is None else input_size, layer, unit).differentiable()
    with torch.enable_grad():
        energy = _over_channels(backpropagate(scene.tape, scene.seed()))
        if float(energy.detach().sum()) == 0:
            raise DeadUnitError("model must let energy reach the input (dead or silent unit)")
        variance = mean_variance(energy)
        require(float(variance.detach()) > 0, "model", "see more than one pixel", "an ERF of std 0")
        penalty: Tensor = -variance.log() / 2
        return penalty if target is None else (penalty + math.log(target)).clamp(min=0).square()
