"""The settings of the pattern study: networks that differ in their taps alone.

Every arm of a setting has the same weights, multiplications and, seed by seed, the same initial weights and batches.
Grids are named by their spacings, a number a layer; each pattern has, layer by layer, the window whose taps have the
second moment of the growing grid's, the first of the three grids. No window is wider than its map, and no spacing
shares a factor with its layer's stride.

What stands here was fixed before the runs; :data:`HASH` is in every row.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import widerf
from experiments.compare.task import Conv, named
from experiments.gpu import evidence_nets as nets
from experiments.harness import camvid

HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
CHOOSE, CONFIRM = (0, 1, 2), tuple(range(100, 120))
RATES = (1e-3, 3e-3, 1e-2)
BLOCK = 16  # neighbouring channels that share their taps
PATTERNS: dict[str, Any] = {
    "halfgrid": "halfgrid",
    "stratified": "stratified",
    "multiscale": "multiscale",
    "mixed": "mixed",
    "half stratified": [("dense", 0.5), ("stratified", 0.5)],
}
FOVEAL: dict[str, Any] = {"foveal": "foveal", "half foveal": [("dense", 0.5), ("foveal", 0.5)]}


@dataclass(frozen=True)
class Setting:
    """One network and task.

    Attributes:
        task: camvid or cifar10.
        size: of the images, (height, width).
        widest: side of the largest window, the shorter side of the map.
        kernel: taps per axis of the layers that the arms differ in.
        grids: three, a spacing for each of these layers; the first grows.
        network: from a factory of these layers to the network.
        steps, batch: of a training.
    """

    task: str
    size: tuple[int, int]
    widest: int
    kernel: int
    grids: tuple[tuple[int, ...], ...]
    network: Callable[[Conv], nn.Sequential]
    steps: int
    batch: int

    @property
    def classes(self) -> int:
        """Of the labels."""
        return camvid.CLASSES if self.task == "camvid" else 10

    def arms(self) -> dict[str, Callable[[int], nn.Sequential]]:
        """Return what builds the network of each arm from a seed: dense, the grids, the patterns."""
        ones = (1,) * len(self.grids[0])
        grids = {"dense": ones} | {f"grid {' '.join(map(str, spacings))}": spacings for spacings in self.grids}
        patterns = PATTERNS | (FOVEAL if self.kernel > 3 else {})
        return {name: functools.partial(_build, self, "grid", spacings) for name, spacings in grids.items()} | {
            name: functools.partial(_build, self, pattern, self.grids[0]) for name, pattern in patterns.items()
        }


def second_moment(offsets: torch.Tensor) -> float:
    """Return the mean square of the coordinates of taps (groups, taps, 2), per axis."""
    return float(offsets.double().square().mean())


@functools.cache
def extent_for(pattern: str, kernel: int, spacing: int, widest: int) -> int:
    """Return the odd extent at which a pattern's taps have the second moment of a grid of ``spacing``, as near as can.

    Example:
        >>> extent_for("'grid'", 3, 4, 45), extent_for("'mixed'", 3, 1, 45)
        (9, 3)
    """
    if spacing == 1:
        return kernel
    wanted = spacing**2 * (kernel**2 - 1) / 12

    def gap(extent: int) -> float:
        layer = widerf.SparseConv2d(64, 64, kernel, extent=extent, pattern=_read(pattern), block=BLOCK, seed=0)
        return abs(second_moment(layer.offsets) - wanted)

    top = min(widest - 1 + widest % 2, 8 * spacing * kernel)
    return min(range(kernel, top + 1, 2), key=gap)


def _read(pattern: str) -> Any:
    known = [*PATTERNS.values(), *FOVEAL.values(), "grid"]
    return next(entry for entry in known if repr(entry) == pattern)


def _build(setting: Setting, pattern: Any, spacings: Sequence[int], seed: int) -> nn.Sequential:
    """Return the network of an arm; its weights depend on the seed alone, its taps on the seed and the layer."""
    count = 0

    def conv(channels: int, outs: int, kernel: int, *, stride: int = 1, **options: Any) -> nn.Module:
        nonlocal count
        spacing, count = spacings[count], count + 1
        if spacing == 1:
            return nn.Conv2d(channels, outs, kernel, stride, **options)
        if pattern == "grid" and options.get("groups", 1) > 1:  # on a GPU cuDNN's spaced depthwise kernels are slow
            return widerf.SparseConv2d(
                channels, outs, kernel, stride, **options, extent=spacing * (kernel - 1) + 1, pattern="grid", seed=0
            )
        if pattern == "grid":
            return nn.Conv2d(
                channels, outs, kernel, stride, **options | {"padding": spacing * (kernel // 2), "dilation": spacing}
            )
        extent = extent_for(repr(pattern), kernel, spacing, setting.widest)
        return widerf.SparseConv2d(
            channels,
            outs,
            kernel,
            stride,
            **options,
            extent=extent,
            pattern=pattern,
            block=BLOCK,
            seed=97 * seed + count,
        )

    torch.manual_seed(seed)
    net = setting.network(conv)
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | widerf.SparseConv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
    return net


def six(width: int, strides: Sequence[int], head: Callable[[int], nn.Module]) -> Callable[[Conv], nn.Sequential]:
    """Build a dense layer and six of the arm's, with batch norm."""

    def network(conv: Conv) -> nn.Sequential:
        layers = nets.block(nn.Conv2d, 3, width)
        for stride in strides:
            layers += nets.block(conv, width, width, stride=stride)
        return named(nn.Sequential(*layers), head(width))

    return network


def _readout(width: int) -> nn.Module:
    return nn.Conv2d(width, camvid.CLASSES, 1)


def _twice(*grids: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Give both layers of a residual block its spacing."""
    return tuple(tuple(spacing for spacing in grid for _ in range(2)) for grid in grids)


SIX = ((1, 2, 2, 4, 4, 7), (1, 2, 5, 1, 2, 5), (1, 2, 4, 1, 4, 7))
EIGHT = _twice((1, 1, 2, 2, 4, 4, 8, 8), (1, 2, 4, 8, 1, 2, 4, 8), (1, 3, 8, 1, 3, 8, 1, 4))
FOUR = ((1, 2, 3, 4), (1, 2, 4, 7), (1, 3, 5, 7))
STRIDED = ((1, 1, 2, 1, 2, 3), (1, 2, 2, 1, 2, 2), (1, 2, 3, 1, 2, 3))
_FRAMES, _DOWN = (180, 240), (2, 1, 1, 2, 1, 1)

# The narrow ones are for two processors.
SETTINGS = {
    "shallow": Setting("camvid", (45, 60), 45, 3, SIX, six(64, (1,) * 6, _readout), 400, 16),
    "shallow-narrow": Setting("camvid", (45, 60), 45, 3, SIX, six(32, (1,) * 6, _readout), 300, 4),
    "depthwise-narrow": Setting("camvid", (45, 60), 45, 7, FOUR, nets.depthwise(32, 4, 7, stem=1), 300, 4),
    "residual": Setting("camvid", _FRAMES, 45, 3, EIGHT, nets.segmenter(64, 8), 300, 16),
    "depthwise-49": Setting("camvid", _FRAMES, 45, 7, FOUR, nets.depthwise(64, 4, 7), 300, 16),
    "depthwise-25": Setting("camvid", _FRAMES, 45, 5, FOUR, nets.depthwise(64, 4, 5), 300, 16),
    "cifar10": Setting("cifar10", (32, 32), 32, 3, SIX, six(64, (1,) * 6, nets.classifier), 500, 128),
    "cifar10-strided": Setting("cifar10", (32, 32), 8, 3, STRIDED, six(64, _DOWN, nets.classifier), 500, 128),
}
