"""The two networks of Figure 3.

CIFAR-10: 17 residual blocks of two 3×3 layers with batch norm, no down-sampling, global average pooling. CamVid: 16
blocks, a 3×3 layer of stride 2 after the second, fourth, eighth and twelfth, which gives the paper's field of 505
pixels (`fields.py`), a 1×1 readout at 1/16 of the frame, drawn up bilinearly. The paper gives neither widths nor
layouts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from experiments.harness import camvid
from experiments.roads.cases import residual

BLOCKS = {"cifar10": 17, "camvid": 16}
BEFORE_STRIDE = (2, 4, 8, 12)  # blocks, CamVid


@dataclass(frozen=True)
class Setting:
    """All that a run depends on; height and width are those of a CamVid frame."""

    task: str
    seed: int = 0
    channels: int = 64
    epochs: int = 60
    batch: int = 128
    rate: float = 1e-3
    height: int = 360
    width: int = 480


def network(setting: Setting) -> nn.Sequential:
    """Return ``features``, whose last map's ERF is measured, and ``head``."""
    torch.manual_seed(setting.seed)
    channels, blocks = setting.channels, BLOCKS[setting.task]
    layers = list(residual(True, channels, blocks).children())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    if setting.task == "camvid":
        for block in reversed(BEFORE_STRIDE):
            halve = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
            nn.init.kaiming_normal_(halve.weight)
            layers.insert(2 + block, nn.Sequential(halve, nn.BatchNorm2d(channels), nn.ReLU()))
        up = nn.Upsample(size=(setting.height, setting.width), mode="bilinear")
        head = nn.Sequential(nn.Conv2d(channels, camvid.CLASSES, 1), up)
    return nn.Sequential(nn.Sequential(*layers), head)
