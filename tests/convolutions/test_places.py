"""Where a layer stands in its network, and how the network answers to it."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from torch import nn

import widerf
from tests.reference import fingerprint
from widerf.convolutions.branches import silent_branches, undone
from widerf.convolutions.places import find_places
from widerf.convolutions.selection import find_convolutions
from widerf.convolutions.sensitivity import sensitivity
from widerf.init.target import weigh
from widerf.trace.scene import Scene


def jumps(model: nn.Module, size: tuple[int, ...]) -> dict[str, tuple[float, ...] | None]:
    return {name: place.jump for name, place in find_places(Scene.of(model, size), find_convolutions(model)).items()}


def test_jumps_multiply_through_strides_pools_and_transposed_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, (3, 5), stride=(1, 2)),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ConvTranspose2d(4, 4, 4, stride=2), nn.Upsample(scale_factor=2), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    found = jumps(model, (3, 97, 97))
    assert found == {"0": (1, 1), "2": (4, 4), "3": (4, 8), "4": (4, 8), "7": (2, 4)}


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"])
def test_jump_of_the_last_map_is_that_of_the_receptive_field(name: str) -> None:
    model = timm.create_model(name).eval()
    size = (3, 96, 96)
    places = find_places(Scene.of(model, size), find_convolutions(model))
    spatial = [place for place in places.values() if place.before != (1, 1)]
    field = widerf.receptive_field(model, size)
    last = spatial[-1]
    assert last.jump is not None
    ratio = [a // b for a, b in zip(last.before, last.after, strict=True)]
    assert tuple(j * r for j, r in zip(last.jump, ratio, strict=True)) == field.jump


def test_looking_leaves_every_bit() -> None:
    model = timm.create_model("resnet10t").train()
    before = fingerprint(model)
    find_places(Scene.of(model, (3, 64, 64)), find_convolutions(model))
    sensitivity(Scene.of(model, (3, 64, 64)), find_convolutions(model))
    assert fingerprint(model) == before


def test_sensitivity_is_the_slope_of_the_prediction() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 5, stride=2, padding=2, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
    ).double()  # fmt: skip
    size = (3, 41, 41)
    found = sensitivity(Scene.of(model, size), find_convolutions(model))
    assert found.variance == pytest.approx(widerf.predict(model, size).std ** 2, rel=1e-9)
    for (name, layer), tap in itertools.product(model.named_children(), [(0, 0), (0, 1), (1, 1)]):
        step = 1e-5
        with torch.no_grad():
            layer.weight[..., tap[0], tap[1]] *= 1 + step / 2  # log of the energy grows by step
            up = widerf.predict(model, size).std ** 2
            layer.weight[..., tap[0], tap[1]] /= (1 + step / 2) ** 2
            down = widerf.predict(model, size).std ** 2
            layer.weight[..., tap[0], tap[1]] *= 1 + step / 2
        assert (up - down) / (2 * step) == pytest.approx(float(found.slopes[name][tap]), rel=1e-3, abs=1e-6)


def test_weights_are_jump_squared_in_a_plain_network() -> None:
    """For layers of equal path share the weight is (jump · dilation)²: the road through the formula, not the slopes."""
    torch.manual_seed(0)
    layers = [(1, 1), (2, 1), (1, 2), (2, 1), (1, 1)]
    model = nn.Sequential(
        *(nn.Conv2d(3 if i == 0 else 64, 64, 3, s, d, d, bias=False) for i, (s, d) in enumerate(layers))
    ).double()
    weighted = weigh(Scene.of(model, (3, 161, 161)), find_convolutions(model))
    found = torch.tensor(weighted.weights)
    expected = torch.tensor([1.0, 1.0, 2.0**2 * 2**2, 2.0**2, 4.0**2])
    # Down-sampling couples taps of neighbouring phases, so layers around a stride are not quite interchangeable.
    assert torch.allclose(found[[2, 4]], expected[[2, 4]], rtol=0.25), found
    assert float(found[4] / found[0]) == pytest.approx(16, rel=0.35)


def test_silent_scales_are_found_and_awake_ones_are_not() -> None:
    asleep, awake = timm.create_model("resnet10t"), timm.create_model("resnet10t", zero_init_last=False)
    assert set(silent_branches(asleep)) == {f"layer{i}.0.bn2.weight" for i in (1, 2, 3, 4)}
    assert silent_branches(awake) == {}
    scaled = silent_branches(timm.create_model("convnext_atto"))
    assert len(scaled) == 12 and max(scaled.values()) == pytest.approx(1e-6)
    assert silent_branches(timm.create_model("convnext_atto", ls_init_value=1.0)) == {}


def test_fusing_blocks_of_other_ranks_are_told_apart() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.long, self.short, self.wide = nn.Conv1d(4, 4, 5), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 7)

        def fuse(self) -> None: ...

    model = nn.Sequential(Block())
    assert undone(model, find_convolutions(model)) == {
        "0.long": "undone in part: the 3 branch of its block add to its centre"
    }
