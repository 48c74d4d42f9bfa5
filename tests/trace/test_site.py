from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.reference import fingerprint
from widerf.trace.arguments import check_input_size, check_unit
from widerf.trace.site import spatial_layer


class Pick(nn.Module):
    """An identity, so that a test can look at what passes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Tokens(nn.Module):
    """A patchifying convolution whose map is flattened to tokens behind ``prefix`` learnt ones."""

    def __init__(self, prefix: int, rank: int = 2, channels: int = 5) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.patches = conv(3, channels, 4, stride=4)
        self.prefix = nn.Parameter(torch.randn(1, prefix, channels))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.norm(torch.cat([self.prefix.expand(len(x), -1, -1), tokens], 1))
        return self.head(tokens.mean(1))


class ChannelsLast(nn.Module):
    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.patches = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank](3, 6, 4, stride=4)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(self.patches(x).movedim(1, -1))
        return maps.flatten(1, -2).mean(1)


def laid(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    site = spatial_layer(model, x.shape[1:], layer)
    seen: list[Tensor] = []
    handle = site.module.register_forward_hook(lambda *a: seen.append(site.lay(a[2])))
    model(x)
    handle.remove()
    assert seen[0].shape[1:] == site.shape
    return seen[0]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 8)])
def test_tokens_go_back_to_where_their_patches_were(prefix: int, size: tuple[int, int]) -> None:
    model, x = Tokens(prefix), torch.randn(2, 3, *size)
    expected = model.norm(model.patches(x).movedim(1, -1)).movedim(-1, 1)
    assert torch.allclose(laid(model, "norm", x), expected, atol=1e-6)
    assert spatial_layer(model, x.shape[1:]).name == "norm"


@pytest.mark.parametrize(("rank", "size"), [(1, (24,)), (2, (24, 24)), (2, (16, 24)), (3, (8, 12, 16))])
def test_channels_last_maps_are_turned(rank: int, size: tuple[int, ...]) -> None:
    model, x = ChannelsLast(rank), torch.randn(2, 3, *size)
    expected = model.norm(model.patches(x).movedim(1, -1)).movedim(-1, 1)
    assert torch.allclose(laid(model, "norm", x), expected, atol=1e-6)
    assert torch.equal(laid(model, "patches", x), model.patches(x))


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("resnet10t", "layer4", (512, 6, 6)),
        ("efficientnet_lite0", "bn2", (1280, 7, 7)),
        ("test_vit", "norm", (64, 10, 10)),
        ("test_convnext", "norm_pre", (64, 5, 5)),
    ],
)
def test_the_default_layer_is_the_last_map_before_global_pooling(name: str, layer: str, shape: tuple[int, ...]) -> None:
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    site = spatial_layer(model, size)
    assert site.name.startswith(layer)
    assert site.shape == shape


def test_a_fully_convolutional_net_ends_in_its_last_module_not_in_itself() -> None:
    assert spatial_layer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 8, 8)).name == "1"


def test_the_last_call_of_a_shared_module_counts() -> None:
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(pool, nn.Conv2d(3, 4, 1), pool, pool)
    site = spatial_layer(model, (3, 16, 16), pool)
    assert (site.name, site.call, site.shape) == ("0", 2, (4, 2, 2))
    assert spatial_layer(model, (3, 16, 16), "3") == site


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_tensors_without_content_show_the_same_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(name)
    quick = spatial_layer(model, (3, 96, 96) if name != "test_vit" else (3, 160, 160))

    def refuse(*_: object) -> None:
        raise RuntimeError("no pass without content")

    monkeypatch.setattr("widerf.trace.site.functional_call", refuse)
    assert spatial_layer(model, (3, 96, 96) if name != "test_vit" else (3, 160, 160)) == quick


def test_a_model_that_looks_at_values_gets_a_full_pass() -> None:
    class Chooser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.small(x) if float(x.sum()) == 0 else self.large(x)

    site = spatial_layer(Chooser(), (1, 9, 9))
    assert (site.name, site.shape) == ("small", (1, 7, 7))


def test_a_pass_for_looking_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = fingerprint(model)
    spatial_layer(model, (3, 8, 8))
    with pytest.raises(ValueError):
        spatial_layer(model, (5, 8, 8))
    assert fingerprint(model) == before


def poisoned() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight[2] = math.nan
    return model


PLAIN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU()), nn.Flatten(), nn.LazyLinear(2))
PLAIN(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((PLAIN, (3, 8, 8), "1.1"), ValueError, "layer must be one of .*got '1.1'; did you mean '1'|'1.0'"),
        ((PLAIN, (3, 8, 8), nn.ReLU()), ValueError, "layer must be a module of the model, got 'ReLU'"),
        ((PLAIN, (3, 8, 8), 3), TypeError, "layer must be a module or its name, got 3"),
        (
            (PLAIN, (3, 8, 8), "2"),
            ValueError,
            r"layer must yield a map with 2 spatial axes .* got '2' with output \(2, 144\)",
        ),
        ((PLAIN, (3, 9, 9)), ValueError, r"input_size must be one that the model accepts, got \(3, 9, 9\)"),
        ((PLAIN, (3, 0, 8)), ValueError, "input_size must be .*positive"),
        ((PLAIN, (3,)), ValueError, "input_size must be"),
        ((PLAIN, 224), TypeError, "input_size must be"),
        ((PLAIN, (3, 8.0, 8)), TypeError, "input_size must be"),
        ((poisoned(), (3, 8, 8)), ValueError, "model must hold finite weights, got .NaN or infinity in '1.weight'"),
        ((nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), (3, 8, 8)), ValueError, "model must yield a spatial map"),
    ],
)
def test_bad_input_is_named(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        spatial_layer(*arguments)


def test_a_layer_that_never_runs_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model[0].idle = nn.ReLU()
    with pytest.raises(ValueError, match="layer must be called in the model's forward pass, got '0.idle'"):
        spatial_layer(model, (3, 8, 8), "0.idle")


@pytest.mark.parametrize("unit", [(7, 0), (0, -8), (1,), (1, 1, 1)])
def test_a_unit_outside_the_map_is_refused(unit: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"unit must lie on the map of shape \(7, 7\), got"):
        check_unit(unit, (7, 7))
    with pytest.raises(TypeError, match="unit must hold integers only"):
        check_unit((1.5, 2), (7, 7))


def test_an_input_size_is_a_tuple_of_integers() -> None:
    assert check_input_size([3, 8, 8]) == (3, 8, 8)


def test_a_model_without_values_is_named() -> None:
    with pytest.raises(
        ValueError, match="model must hold values in every tensor, got \"'0.weight' on the meta device\""
    ):
        spatial_layer(nn.Sequential(nn.Conv2d(3, 4, 3, device="meta")), (3, 9, 9))
