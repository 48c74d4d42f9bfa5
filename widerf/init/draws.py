"""Base initialisations by name, with the fans that a convolution really has.

``torch.nn.init`` reads fans off the weight's shape, which is right for a plain convolution only. Here fan_in is the
number of products summed into one output unit, fan_out the number of output units that one input unit enters at
stride 1:

| layer | fan_in | fan_out |
|---|---|---|
| convolution, n taps, g groups | (in/g)·n | (out/g)·n |
| transposed convolution | (in/g)·(taps of the output phase) | (out/g)·n |

``torch.nn.init`` has fan_out = out·n for grouped layers, g times too much, and swaps in and out for transposed ones.
For an ungrouped convolution the draws here are those of ``torch.nn.init`` bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Generator, Tensor, nn

from widerf._checks import require, require_known
from widerf.convolutions.convolution import Cell, Convolution

Base: TypeAlias = str | Callable[[Tensor], object] | None

NAMES = ("kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "orthogonal")


def check_base(base: Base, generator: Generator | None) -> None:
    """Raise unless ``base`` is ``None``, a known name or a callable, and ``generator`` is a generator."""
    right = generator is None or isinstance(generator, Generator)
    require(right, "generator", "be a torch.Generator", generator, TypeError)
    if isinstance(base, str):
        require_known(base, NAMES, "base")
    else:
        require(base is None or callable(base), "base", "be a name, a callable or None", base, TypeError)


def std_of(base: str, kernel: Convolution, cell: Cell, channels: tuple[int, int]) -> float:
    """Return the std that ``base`` gives the weights of one cell.

    He et al. 2015: √(2/fan_in); Glorot and Bengio 2010: √(2/(fan_in + fan_out)).

    Args:
        base: ``"kaiming_…"`` or ``"xavier_…"``.
        kernel: the layer.
        cell: the taps that feed one output unit.
        channels: input and output channels of one group.
    """
    fan_in = channels[0] * math.prod(cell.size)
    fan_out = channels[1] * math.prod(kernel.kernel_size)
    return math.sqrt(2.0) / math.sqrt(fan_in) if base.startswith("kaiming") else math.sqrt(2.0 / (fan_in + fan_out))


@torch.no_grad()
def draw_(weight: Tensor, kernel: Convolution, base: Base, generator: Generator | None) -> None:
    """Fill ``weight`` (out, in/groups, *taps; transposed: in, out/groups, *taps) by ``base``, in place."""
    if callable(base):
        base(weight)
    elif base == "orthogonal":
        _orthogonal_(weight, kernel, generator)
    elif base is not None:
        groups = int(getattr(kernel.module, "groups", 1))
        first, second = weight.shape[0] // groups, weight.shape[1]
        channels = (first, second) if kernel.transposed else (second, first)
        stds = torch.ones(kernel.kernel_size, dtype=torch.float64)
        for cell in kernel.cells:
            stds[cell.where] = std_of(base, kernel, cell, channels)
        _draw_scaled_(weight, stds, base.endswith("uniform"), generator)


def _draw_scaled_(weight: Tensor, stds: Tensor, uniform: bool, generator: Generator | None) -> None:
    """Draw with one std per tap; one draw for all, so that equal stds give torch's own numbers."""
    largest = float(stds.max())
    if uniform:
        bound = math.sqrt(3.0) * largest
        weight.uniform_(-bound, bound, generator=generator)
    else:
        weight.normal_(0.0, largest, generator=generator)
    if float(stds.min()) < largest:
        weight.mul_((stds / largest).to(weight))


def _orthogonal_(weight: Tensor, kernel: Convolution, generator: Generator | None) -> None:
    """Make the rows or columns of each group's matrix (outputs × inputs·taps) orthonormal (Saxe et al. 2013)."""
    for group in weight.chunk(int(getattr(kernel.module, "groups", 1))):
        matrix = group.transpose(0, 1) if kernel.transposed else group  # (outputs, inputs, *taps)
        drawn = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        matrix.copy_(nn.init.orthogonal_(drawn, generator=generator))
