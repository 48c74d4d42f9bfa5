"""Rewire sparse layers while they train: the weakest taps move to where the loss asks for one.

RigL (Evci et al. 2020, "Rigging the Lottery") with taps instead of single weights: at a rewiring each input channel
gives up the taps with the least Σ_o w² and takes as many new ones where the gradient of the dense window, Σ_o (∂L/∂w)²,
is largest. Moved weights start at 0, and so do their moments in Adam. The number of weights and multiplications of a
forward pass stays; a rewiring costs one weight gradient of the dense window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widerf import SparseConv2d
from widerf.patterns import window


def one_row_each(layer: SparseConv2d) -> SparseConv2d:
    """Give every input channel its own row of offsets, the ones it has: then each can be rewired by itself."""
    channels = layer.in_channels
    layer.offsets = layer.offsets[torch.arange(channels) * len(layer.offsets) // channels]
    return layer


class Rewirer:
    """Moves taps of every `SparseConv2d` that is wider than its kernel (stride 1, no groups, zero padding).

    Args:
        model: holds the layers, one row of offsets per input channel.
        optimizer: Adam; its moments of moved weights are set to 0.
        steps: of the whole training; rewiring ends after three quarters of it.
        every: steps between two rewirings.
        share: of the taps that move at the first rewiring; it falls to 0 by half a cosine.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Adam, steps: int, every: int = 25, share: float = 0.3
    ) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, SparseConv2d) and m.extent != m.kernel_size]
        self.optimizer, self.every, self.share, self.last = optimizer, every, share, 3 * steps // 4

    def due(self, step: int) -> bool:
        """Whether taps move after this step."""
        return step % self.every == 0 and step <= self.last

    @contextmanager
    def after(self, step: int) -> Iterator[None]:
        """Watch one forward and backward pass and the optimiser's step; then move taps, if it is time."""
        seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in self.layers}
        if not self.due(step):
            yield
            return
        hooks = [
            layer.register_forward_hook(
                lambda module, inputs, output: (
                    output.register_hook(lambda grad: seen[module].extend((inputs[0].detach(), grad))) and None
                )
            )
            for layer in self.layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        share = self.share / 2 * (1 + math.cos(math.pi * step / self.last))
        for layer, tensors in seen.items():
            self._move(layer, tensors[0], tensors[1], share)

    @torch.no_grad()
    def _move(self, layer: SparseConv2d, x: Tensor, grad: Tensor, share: float) -> None:
        wanted = demand(layer, x, grad)
        cells = window(layer.kernel_size, layer.extent)
        places = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
        offsets = layer.offsets.clone()
        strength = layer.weight.square().sum(0).flatten(1)
        count = round(share * strength.shape[1])
        flat = layer.weight.view(*layer.weight.shape[:2], -1)
        state = self.optimizer.state[layer.weight]
        moments = [state[key].view_as(flat) for key in ("exp_avg", "exp_avg_sq")]
        for channel, weakest in enumerate(strength.argsort(1)[:, :count].tolist()):
            score = wanted[channel].clone()
            score[[places[tuple(tap)] for tap in offsets[channel].tolist()]] = -1.0
            offsets[channel, weakest] = cells[score.topk(count).indices]
            for tensor in (flat, *moments):
                tensor[:, channel, weakest] = 0.0
        layer.offsets = offsets


def demand(layer: SparseConv2d, x: Tensor, grad: Tensor) -> Tensor:
    """Return Σ_o (∂L/∂w)² of each input channel and cell of the window, (in, cells): ∂L/∂w as of a dense kernel.

    Args:
        layer: of stride 1, no dilation, no groups, zero padding.
        x: input of the layer, (batch, in, height, width).
        grad: gradient of the loss in its output, (batch, out, height', width').
    """
    first, last = window(layer.kernel_size, layer.extent)[[0, -1]].tolist()
    pads = [int(p) for p in layer.padding]
    sides = [
        (p - (k - 1) // 2 - f, p - k // 2 + e) for p, k, f, e in zip(pads, layer.kernel_size, first, last, strict=True)
    ]
    wide = F.pad(x, [*sides[1], *sides[0]])
    dense = torch.nn.grad.conv2d_weight(wide, (grad.shape[1], x.shape[1], *layer.extent), grad)
    return dense.square().sum(0).flatten(1)
