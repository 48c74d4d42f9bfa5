"""Twelve networks of five libraries: no row of a summary is without a figure or a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widerf

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs


def of_timm(name: str, **arguments: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **arguments)


def of_torchvision(path: str, **arguments: Any) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    found: Any = torchvision.models
    for part in path.split("."):
        found = getattr(found, part)
    return found(weights=None, **arguments)


def of_transformers(model: str, configuration: str, **arguments: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, configuration)(**arguments))


def of_segmentation_models(name: str, encoder: str) -> nn.Module:
    smp = pytest.importorskip("segmentation_models_pytorch")
    return getattr(smp, name)(encoder, encoder_weights=None, classes=3)


def of_monai(name: str, **arguments: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return getattr(nets, name)(**arguments)


class Audio(nn.Module):
    """A TCN of Lightning, with dilations that double."""

    def __init__(self) -> None:
        super().__init__()
        layers = [m for i in range(6) for m in (nn.Conv1d(8 if i else 1, 8, 3, padding=2**i, dilation=2**i), nn.GELU())]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def of_lightning() -> nn.Module:
    lightning = pytest.importorskip("lightning.pytorch")
    return type("Task", (Audio, lightning.LightningModule), {})()


UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (4, 8, 16), "strides": (2, 2)}
SEGFORMER = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm resnet26d": (lambda: of_timm("resnet26d", zero_init_last=False), (3, 128, 128)),
    "timm convnext_atto": (lambda: of_timm("convnext_atto"), (3, 128, 128)),
    "timm vit_tiny": (lambda: of_timm("vit_tiny_patch16_224"), (3, 224, 224)),
    "torchvision mobilenet_v3_small": (lambda: of_torchvision("mobilenet_v3_small"), (3, 128, 128)),
    "torchvision deeplabv3": (
        lambda: of_torchvision("segmentation.deeplabv3_mobilenet_v3_large", weights_backbone=None), (3, 128, 128),
    ),
    "torchvision swin_t": (lambda: of_torchvision("swin_t"), (3, 128, 128)),
    "transformers ResNet": (
        lambda: of_transformers("ResNetModel", "ResNetConfig", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1]),
        (3, 128, 128),
    ),
    "transformers SegFormer": (
        lambda: of_transformers("SegformerModel", "SegformerConfig", **SEGFORMER), (3, 128, 128),
    ),
    "segmentation_models Unet": (lambda: of_segmentation_models("Unet", "resnet18"), (3, 128, 128)),
    "segmentation_models FPN": (lambda: of_segmentation_models("FPN", "timm-mobilenetv3_small_100"), (3, 128, 128)),
    "monai UNet": (lambda: of_monai("UNet", **UNET), (1, 24, 24, 24)),
    "lightning TCN": (of_lightning, (1, 400)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_no_row_is_without_a_figure_or_a_reason(name: str) -> None:
    build, size = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = widerf.summary(build().eval(), size)
    print(name, len(found), sum(row.std is not None for row in found), {row.note[:70] for row in found if row.note})
    assert len(found) >= 5
    assert [row.name for row in found if row.std is None and not row.note] == []
    assert [row.name for row in found if row.trf_size is None and not row.note] == []
