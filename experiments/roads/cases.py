"""The networks on which the two roads are compared, with weights drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions with a skip; the ReLU comes after the addition, as in the paper."""

    def __init__(self, channels: int, norm: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(2):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(channels)] if norm else []
            layers += [nn.ReLU()] if index == 0 else []
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum."""
        return torch.relu(x + self.branch(x))


def plain(
    activation: Callable[[], nn.Module],
    channels: int = 32,
    depth: int = 20,
    *,
    kernel_size: int = 3,
    changed: Mapping[int, Mapping[str, int]] | None = None,
) -> nn.Module:
    """A stack of 3×3 convolutions, He-normal.

    Args:
        activation: class of what follows each convolution.
        channels: of each layer but the image.
        depth: number of convolutions.
        kernel_size: odd side of the kernels.
        changed: from the index of a convolution to its ``stride`` or ``dilation``; the padding follows.
    """
    layers: list[nn.Module] = []
    for index in range(depth):
        own = dict((changed or {}).get(index, {}))
        padding = own.get("dilation", 1) * (kernel_size // 2)
        conv = nn.Conv2d(3 if index == 0 else channels, channels, kernel_size, padding=padding, bias=False, **own)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu" if activation is nn.ReLU else "linear")
        layers += [conv, activation()]
    return nn.Sequential(*layers)


def residual(norm: bool, channels: int = 32, blocks: int = 17) -> nn.Module:
    """The paper's ResNet of 17 blocks without downsampling."""
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.ReLU(), *(Block(channels, norm) for _ in range(blocks))
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def timm_model(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    """Builder of a timm model with its own initialisation."""

    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, **arguments)
        return model

    return build


def convnext() -> nn.Module:
    """ConvNeXt-atto at layer scale 1: at timm's 1e-6 its branches are silent."""
    model = timm_model("convnext_atto")()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    return model


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    training: bool
    draws: int = 128

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size of the images."""
        return (3, self.size, self.size)


def cases() -> list[Case]:
    """All rows, cheap ones first."""
    resnet18, resnet50 = (timm_model(name, zero_init_last=False) for name in ("resnet18", "resnet50"))
    regnet = timm_model("regnety_002", zero_init_last=False)
    # Networks with few depthwise channels scatter most: (draws in train mode, in eval mode).
    few_channels, many = (480, 160), (128, 128)
    groups: list[list[tuple[str, Callable[[], nn.Module], tuple[int, int]]]] = [
        [
            ("resnet18", resnet18, many),
            ("mobilenetv3_large_100", timm_model("mobilenetv3_large_100"), few_channels),
            ("regnety_002, no zero init", regnet, few_channels),
            ("efficientnet_b0", timm_model("efficientnet_b0"), few_channels),
        ],
        [("resnet50", resnet50, many)],
        [("densenet121", timm_model("densenet121"), many)],
    ]
    rows = [
        Case("plain 20, linear", lambda: plain(nn.Identity), 61, False, 512),
        Case("plain 20, ReLU", lambda: plain(nn.ReLU), 61, False, 512),
        Case("ResNet of 17 blocks, no BN", lambda: residual(norm=False), 97, False, 256),
        Case("ResNet of 17 blocks, BN in train mode", lambda: residual(norm=True), 97, True, 256),
        Case("convnext_atto, layer scale 1", convnext, 224, False),
    ]
    for group in groups:
        rows += [Case(f"{name}, train", build, 224, True, draws) for name, build, (draws, _) in group]
        rows += [Case(f"{name}, eval", build, 224, False, draws) for name, build, (_, draws) in group]
    return rows


# For road "same" only: batch statistics are nearly all that widens this one's ERF.
SILENT = Case("resnet18, silent branches, train", timm_model("resnet18"), 224, True)


def built(case: Case, seed: int) -> nn.Module:
    """The case's model with weights drawn from ``seed``."""
    torch.manual_seed(seed)
    return case.build().train(case.training)


def redraw(case: Case) -> Callable[[nn.Module, torch.Generator], None]:
    """Re-initialise by building the model anew."""

    def again(model: nn.Module, generator: torch.Generator) -> None:
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        model.load_state_dict(case.build().state_dict())

    return again
