"""The networks of the evidence on a card, each from a convolution class to ``features`` and ``head``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from experiments.compare.task import Conv, named


class Residual(nn.Module):
    """x + f(x), followed by ReLU where ``after``."""

    def __init__(self, branch: nn.Module, after: bool = True) -> None:
        super().__init__()
        self.branch, self.after = branch, after

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        y = x + self.branch(x)
        return y.relu() if self.after else y


class Upsample(nn.Module):
    """Enlarge a map to the size of the image that it came from."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, channels, h, w) to (batch, channels, factor·h, factor·w)."""
        return nn.functional.interpolate(x.float(), scale_factor=self.factor, mode="bilinear", align_corners=False)


def block(conv: Conv, inner: int, outer: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without bias, batch norm and ReLU."""
    layer = conv(inner, outer, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [layer, nn.BatchNorm2d(outer), nn.ReLU()]


def _two(conv: Conv, width: int) -> nn.Module:
    return Residual(nn.Sequential(*block(conv, width, width), *block(conv, width, width)[:-1]))


def resnet9(width: int = 64, kernel: int = 3) -> Callable[[Conv], nn.Sequential]:
    """Three scales with a residual pair at two of them; meant to pass 90 % on CIFAR-10 in fifteen epochs."""

    def network(conv: Conv) -> nn.Sequential:
        layers = [*block(conv, 3, width, kernel), *block(conv, width, 2 * width, kernel), nn.MaxPool2d(2)]
        layers += [_two(conv, 2 * width), *block(conv, 2 * width, 4 * width, kernel), nn.MaxPool2d(2)]
        layers += [_two(conv, 4 * width)]
        return named(nn.Sequential(*layers), classifier(4 * width))

    return network


def paper17(width: int = 32) -> Callable[[Conv], nn.Sequential]:
    """Build the paper's residual network for CIFAR-10 (Luo et al. 2016, § 3): 17 blocks, no down-sampling."""

    def network(conv: Conv) -> nn.Sequential:
        layers = [*block(conv, 3, width), *(_two(conv, width) for _ in range(17))]
        return named(nn.Sequential(*layers), classifier(width))

    return network


def classifier(width: int) -> nn.Module:
    """Return global average pooling and a linear layer to ten classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def segmenter(width: int = 64, blocks: int = 8, classes: int = 11) -> Callable[[Conv], nn.Sequential]:
    """Two strides of 2, residual blocks of two 3×3 layers, a 1×1 readout enlarged four times."""

    def network(conv: Conv) -> nn.Sequential:
        stem = [*block(nn.Conv2d, 3, width // 2, stride=2), *block(nn.Conv2d, width // 2, width, stride=2)]
        features = nn.Sequential(*stem, *(_two(conv, width) for _ in range(blocks)))
        return named(features, nn.Sequential(nn.Conv2d(width, classes, 1), Upsample(4)))

    return network


def depthwise(
    width: int = 96, blocks: int = 8, kernel: int = 7, classes: int = 11, stem: int = 2
) -> Callable[[Conv], nn.Sequential]:
    """As :func:`segmenter`, with blocks of one depthwise layer of ``kernel``² taps and two 1×1 layers.

    ``stem`` is the stride of each of the two layers before them.
    """

    def network(conv: Conv) -> nn.Sequential:
        layers = [*block(nn.Conv2d, 3, width // 2, stride=stem), *block(nn.Conv2d, width // 2, width, stride=stem)]
        for _ in range(blocks):
            spatial = conv(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
            mix = [nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()]
            last = nn.Conv2d(2 * width, width, 1, bias=False)
            layers.append(Residual(nn.Sequential(spatial, nn.BatchNorm2d(width), *mix, last), after=False))
        features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        return named(
            features, nn.Sequential(nn.Conv2d(width, classes, 1), Upsample(stem**2) if stem > 1 else nn.Identity())
        )

    return network
