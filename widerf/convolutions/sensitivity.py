"""How the predicted variance of a network's ERF answers to the energies of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from widerf.convolutions.convolution import Convolution
from widerf.erf.energy import backpropagate
from widerf.erf.frame import Frame
from widerf.erf.map import ERF
from widerf.erf.prediction import predicted
from widerf.geometry import mean_variance
from widerf.trace.certain import held
from widerf.trace.scene import Scene


@dataclass(frozen=True)
class Sensitivity:
    """How the variance of a network's ERF answers to the energies of its kernels.

    Attributes:
        variance: of the ERF now, in input pixels², mean over axes.
        slopes: layer name → ∂ variance / ∂ log(energy of each tap), summed over all calls, in the weight's spatial
            layout.
    """

    variance: float
    slopes: dict[str, Tensor]


def sensitivity(scene: Scene, kernels: Sequence[Convolution]) -> Sensitivity:
    """Differentiate the predicted variance of the ERF with respect to the energy of every tap of every kernel.

    The prediction takes each weight by its square, so W·∂σ²/∂W/2, summed over a tap's weights, is the derivative with
    respect to the logarithm of the tap's energy. One energy pass over the scene's recording and its derivative.
    """
    names = {kernel.name for kernel in kernels}
    calls, weights = list(scene.tape.calls), list[tuple[str, Tensor]]()
    for index, call in enumerate(calls):
        if call.name == "convolution" and call.module in names and isinstance(call.leaves[1], Tensor):
            weight = call.leaves[1].detach().clone().requires_grad_()
            calls[index] = replace(call, leaves=(call.leaves[0], weight, *call.leaves[2:]))
            weights.append((call.module, weight))
    with held(torch.enable_grad()):
        energy = backpropagate(replace(scene.tape, calls=calls), scene.seed()).double().sum(1).mean(0)
        variance = mean_variance(energy)
        gradients = torch.autograd.grad(variance, [w for _, w in weights], allow_unused=True)
    slopes: dict[str, Tensor] = {}
    rank = len(scene.input_size) - 1
    for (name, weight), gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            tap = (weight.detach() * gradient / 2).double().sum(dim=tuple(range(weight.ndim - rank)))
            slopes[name] = slopes.get(name, 0) + tap.cpu()
    return Sensitivity(float(variance.detach()), slopes)


def predicted_erf(scene: Scene, frame: Frame | None = None) -> tuple[ERF | None, str]:
    """Return the predicted ERF of the network or ``None``, and what is wrong with it or nothing."""
    with held(warnings.catch_warnings(record=True)) as (caught,):
        warnings.simplefilter("always")
        try:
            erf = predicted(scene, frame)
        except (NotImplementedError, ValueError) as error:
            return None, f"the ERF's gain cannot be predicted: {error}"
    clipped = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return erf, (f"the ERF's gain is understated: {clipped[0]}" if clipped else "")


def predicted_std(scene: Scene, frame: Frame | None = None) -> tuple[float | None, str]:
    """Return the predicted std of the network's ERF or ``None``, and what is wrong with it or nothing."""
    erf, problem = predicted_erf(scene, frame)
    return (None if erf is None else float(erf.std)), problem
