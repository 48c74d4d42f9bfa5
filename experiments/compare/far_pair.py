"""far-pair: a generated task whose answer lies at the edge of the ERF, and many of its networks trained at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from experiments.compare.task import VALIDATION_SEED, Batch, Centre, Conv, Task, named
from experiments.harness.inputs import InputError
from widerf.init.lasting import profile_of

CHANNELS = 16


def far_pair_batch(n: int, radius: int, side: int, generator: torch.Generator) -> Batch:
    """Draw n images of far-pair: do the two far markers bear the same sign?

    An image is N(0, 0.5²) noise with single pixels ±3 at centre + p and centre − p, p uniform over the offsets of
    maximum norm ``radius``. Neither marker alone says anything about the label.

    Returns:
        Images (n, 1, side, side) and labels (n,): 1 where the signs agree.

    Example:
        >>> x, y = far_pair_batch(4, radius=2, side=7, generator=torch.Generator().manual_seed(0))
        >>> x.shape, (x.abs() == 3).flatten(1).sum(1).tolist()
        (torch.Size([4, 1, 7, 7]), [2, 2, 2, 2])
    """
    images = torch.randn(n, 1, side, side, generator=generator) * 0.5
    axis = torch.arange(-radius, radius + 1)
    square = torch.cartesian_prod(axis, axis)
    ring = square[square.abs().amax(1) == radius]
    p = ring[torch.randint(len(ring), (n,), generator=generator)]
    signs = torch.randint(2, (n, 2), generator=generator) * 2 - 1
    centre, index = side // 2, torch.arange(n)
    for k, side_of in enumerate((1, -1)):
        at = centre + side_of * p
        images[index, 0, at[:, 0], at[:, 1]] = 3.0 * signs[:, k]
    return images, (signs[:, 0] == signs[:, 1]).long()


def far_pair(radius: int, depth: int = 6) -> Task:
    """Build the far-pair task, read out at the centre unit of ``depth`` 3×3 layers of 16 channels.

    Raises:
        InputError: the markers lie beyond the reach of the layers.
    """
    if depth < 1:
        raise InputError(f"--depth must be at least 1, got {depth}")
    if not 1 <= radius <= depth:
        raise InputError(f"--radius must be from 1 to {depth}, the reach of {depth} 3×3 layers, got {radius}")
    side = 2 * radius + 3

    def network(conv: Conv) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (1, *[CHANNELS] * (depth - 1)):
            layers += [conv(channels, CHANNELS, 3, padding=1), nn.ReLU()]
        return named(nn.Sequential(*layers), nn.Sequential(Centre(), nn.Linear(CHANNELS, 2)))

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield far_pair_batch(64, radius, side, generator)

    return Task(
        name="far-pair",
        network=network,
        batches=batches,
        validation=far_pair_batch(500, radius, side, torch.Generator().manual_seed(VALIDATION_SEED)),
        test=None,
        erf_size=(1, 6 * depth + 5, 6 * depth + 5),  # holds the theoretical field of the sparse arm too
        erf_inputs=None,
        target=0.9,
        steps=800,
        every=10,
        stop_at_target=True,
        lr=2e-3,
        faster=Cone,
    )


def margins(side: int, reaches: Sequence[int]) -> list[int]:
    """Return by how much each layer's input goes beyond what the centre unit of the last map needs; negative: padding.

    The centre unit reads 2·r + 1 units on an axis of the map below r = the sum of the reaches of the layers above.

    Example:
        >>> margins(11, [1, 1, 1, 1, 1, 1]), margins(11, [1, 1, 1])
        ([-1, 0, 0, 0, 0, 0], [2, 0, 0])
    """
    found, there = [], side
    for index, reach in enumerate(reaches):
        wanted = min(side, 2 * sum(reaches[index + 1 :]) + 1)
        found.append((there - wanted) // 2 - reach)
        there = wanted
    return found


class Cone(nn.Module):
    """A far-pair network that computes only the pixels that its answer needs; it shares the network's parameters.

    Example:
        >>> net, x = far_pair(4).network(nn.Conv2d), torch.randn(5, 1, 11, 11)
        >>> torch.allclose(Cone(net)(x), net(x), atol=1e-6)
        True
    """

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net
        self.convs = [module for module in net.features if not isinstance(module, nn.ReLU)]  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        """Return what the network does."""
        if not all(isinstance(conv, nn.Conv2d) for conv in self.convs):
            return self.net(images)  # type: ignore[no-any-return]
        x, reaches = images, [conv.dilation[0] for conv in self.convs]
        for conv, margin in zip(self.convs, margins(images.shape[-1], reaches), strict=True):
            x = F.pad(x, [-margin] * 4) if margin > 0 else x
            x = F.conv2d(x, conv.weight, conv.bias, padding=max(0, -margin), dilation=conv.dilation).relu_()
        return self.net.head(x)  # type: ignore[no-any-return,operator]


def trained(net: nn.Sequential) -> list[nn.Parameter]:
    """Return the parameters, each layer's weight, or what is trained in its place, before its bias."""
    found: list[nn.Parameter] = []
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            lasting = parametrize.is_parametrized(module, "weight")
            found += [module.parametrizations.weight.original if lasting else module.weight, module.bias]  # type: ignore
    return found


def _scales(nets: Sequence[nn.Sequential]) -> list[Tensor | None]:
    """Return the factors of each layer's lasting profile, None without one; all networks have to share them."""
    found: list[Tensor | None] = []
    for layers in zip(*([m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in nets), strict=True):
        profiles = [profile_of(layer) for layer in layers]
        scales = [profile.scale for profile in profiles if profile is not None]
        alike = len(scales) in (0, len(nets)) and all(torch.equal(scale, scales[0]) for scale in scales)
        if not alike:
            raise ValueError("nets must share their lasting profiles, got different ones")
        found.append(scales[0] if scales else None)
    return found


class Stack(nn.Module):
    """S far-pair networks of one shape as one: convolutions of S groups, and only the pixels that the answer needs.

    Element (b, s) of the result equals network s on image (b, s).

    Args:
        nets: as ``far_pair().network`` makes them, with ``nn.Conv2d`` of stride 1 in every layer.

    Example:
        >>> nets = [far_pair(2).network(nn.Conv2d) for _ in range(3)]
        >>> x = torch.randn(5, 3, 7, 7)
        >>> y = Stack(nets)(x)
        >>> y.shape, torch.allclose(y[:, 1], nets[1](x[:, 1:2]), atol=1e-6)
        (torch.Size([5, 3, 2]), True)
    """

    def __init__(self, nets: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.convs = [module for module in nets[0].modules() if isinstance(module, nn.Conv2d)]
        self.size = len(nets)
        together = zip(*map(trained, nets), strict=True)
        self.stacked = nn.ParameterList([torch.stack([p.detach() for p in same]) for same in together])
        for index, scale in enumerate(_scales(nets)):
            self.register_buffer(f"scale{index}", scale)

    def forward(self, images: Tensor) -> Tensor:
        """From images (batch, S, side, side) to logits (batch, S, 2)."""
        x, side = images.contiguous(memory_format=torch.channels_last), images.shape[-1]
        *layers, head, bias = self.stacked
        reaches = [conv.dilation[0] for conv in self.convs]
        for index, (reach, margin) in enumerate(zip(reaches, margins(side, reaches), strict=True)):
            weight, offset = layers[2 * index].flatten(0, 1), layers[2 * index + 1].flatten()
            scale = getattr(self, f"scale{index}")
            weight = weight if scale is None else weight * scale
            x = F.pad(x, [-margin] * 4) if margin > 0 else x
            x = F.conv2d(x, weight, offset, padding=max(0, -margin), dilation=reach, groups=self.size).relu_()
        units = x.view(len(x), self.size, -1)
        return torch.einsum("bsc,soc->bso", units, head) + bias

    def unstack(self, index: int, net: nn.Sequential) -> nn.Sequential:
        """Write network ``index`` into ``net`` and return it."""
        with torch.no_grad():
            for own, stacked in zip(trained(net), self.stacked, strict=True):
                own.copy_(stacked[index])
        return net
