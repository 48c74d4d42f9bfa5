"""How the predicted variance of a network's ERF answers to the energies of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from widerf.convolutions.convolution import Kernel
from widerf.erf.energy import backpropagate
from widerf.trace.recorder import record
from widerf.trace.sandbox import untouched
from widerf.trace.site import probe_input, spatial_layer


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


def sensitivity(
    model: nn.Module, input_size: Sequence[int], kernels: Sequence[Kernel], layer: str | nn.Module | None = None
) -> Sensitivity:
    """Differentiate the predicted variance of the ERF with respect to the energy of every tap of every kernel.

    The prediction takes each weight by its square, so W·∂σ²/∂W/2, summed over a tap's weights, is the derivative with
    respect to the logarithm of the tap's energy. One forward pass, one energy pass and its derivative.
    """
    site = spatial_layer(model, input_size, layer)
    names = {kernel.name for kernel in kernels}
    with untouched(model), torch.no_grad():
        images = probe_input(model, input_size, batch=1)
        images = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
        tape = record(model, images, site)
    weights: list[tuple[str, Tensor]] = []
    for index, step in enumerate(tape.calls):
        if step.name == "convolution" and step.module in names and isinstance(step.leaves[1], Tensor):
            weight = step.leaves[1].detach().clone().requires_grad_()
            tape.calls[index] = replace(step, leaves=(step.leaves[0], weight, *step.leaves[2:]))
            weights.append((step.module, weight))
    seed = torch.zeros_like(tape.values[tape.target], memory_format=torch.contiguous_format)
    centre: Any = (slice(None), slice(None), *(n // 2 for n in site.spatial_shape))
    seed[centre] = 1
    with torch.enable_grad():
        energy = backpropagate(tape, seed).double().sum(1).mean(0)
        variance = _variance(energy)
        gradients = torch.autograd.grad(variance, [w for _, w in weights], allow_unused=True)
    slopes: dict[str, Tensor] = {}
    rank = len(input_size) - 1
    for (name, weight), gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            tap = (weight.detach() * gradient / 2).double().sum(dim=tuple(range(weight.ndim - rank)))
            slopes[name] = slopes.get(name, 0) + tap.cpu()
    return Sensitivity(float(variance.detach()), slopes)


def _variance(energy: Tensor) -> Tensor:
    """Return the mean over axes of the variance of an energy map about its centroid."""
    share = energy / energy.sum()
    variances = []
    for axis, n in enumerate(energy.shape):
        place = torch.arange(n, dtype=energy.dtype, device=energy.device)
        marginal = share.sum(dim=tuple(i for i in range(energy.ndim) if i != axis)) if energy.ndim > 1 else share
        mean = (marginal * place).sum()
        variances.append((marginal * (place - mean) ** 2).sum())
    return torch.stack(variances).mean()


def predicted_std(model: nn.Module, input_size: Sequence[int] | None) -> tuple[float | None, str]:
    """Return the predicted std of the network's ERF or ``None``, and what is wrong with it or nothing."""
    if input_size is None:
        return None, ""
    from widerf.erf.prediction import predict

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            std = float(predict(model, tuple(input_size)).std)
        except (NotImplementedError, ValueError) as error:
            return None, f"the ERF's gain cannot be predicted: {error}"
    clipped = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return std, (f"the ERF's gain is understated: {clipped[0]}" if clipped else "")
