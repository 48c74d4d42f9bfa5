"""What zero padding costs: a layer alone, and layers in a chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from widerf.convolutions.convolution import Convolution
from widerf.convolutions.places import Place
from widerf.geometry import marginal


def axis_operator(kernel: Convolution, place: Place, axis: int, shares: Tensor) -> Tensor:
    """Return the matrix that takes the energy along an input axis to that along the output axis, zeros outside.

    Args:
        kernel: a layer of stride and dilation, not transposed.
        place: its maps.
        axis: which.
        shares: energy of each tap of the axis, sums to 1.

    Returns:
        (output positions, input positions); a row sums to 1 in the interior and to less at a zero-padded border.
    """
    n, m = place.before[axis], place.after[axis]
    k, s, d = kernel.kernel_size[axis], kernel.stride[axis], kernel.dilation[axis]
    told = getattr(kernel.module, "padding", 0)
    padding = told[axis] if isinstance(told, tuple) else None
    if padding is None or (m - 1) * s + d * (k - 1) + 1 - padding > n + padding:
        padding = max((m - 1) * s + d * (k - 1) + 1 - n, 0) // 2  # "same", static or dynamic
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for tap in range(k):
        source = torch.arange(m) * s + tap * d - padding
        inside = (source >= 0) & (source < n)
        matrix[torch.arange(m)[inside], source[inside]] += shares[tap]
    return matrix


def border_loss(kernel: Convolution, place: Place, energies: Tensor) -> float | None:
    """Return the share of a layer's output energy that its zero padding costs on an even map; ``None`` if not known.

    The energies of a profile are nearly a product of their axes, and are taken to be one.
    """
    padded = getattr(kernel.module, "padding_mode", "zeros") == "zeros"
    if kernel.transposed or kernel.offsets is not None or not padded:
        return None
    kept = 1.0
    for axis in range(kernel.rank):
        kept *= float(axis_operator(kernel, place, axis, _shares(energies, axis)).sum(dim=1).mean())
    return 1.0 - kept


def chain_energy(layers: Sequence[tuple[Convolution, Place, Tensor]]) -> float:
    """Return the mean energy at the end of a chain of layers over that without zero padding, layer after layer.

    Each axis is followed on its own, which is exact for product profiles; where the map's size changes between layers
    (pooling) the energy is interpolated.
    """
    total = 1.0
    for axis in range(max(kernel.rank for kernel, _, _ in layers)):
        energy = torch.ones(layers[0][1].before[axis], dtype=torch.float64)
        for kernel, place, energies in layers:
            if place.before[axis] != len(energy):
                energy = F.interpolate(energy[None, None], size=place.before[axis], mode="linear")[0, 0]
            energy = axis_operator(kernel, place, axis, _shares(energies, axis)) @ energy
        total *= float(energy.mean())
    return total


def _shares(energies: Tensor, axis: int) -> Tensor:
    line = marginal(energies, axis)
    return line / line.sum()
