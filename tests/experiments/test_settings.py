"""The settings of the pattern study are fair: equal weights, equal second moments, windows on their maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import widerf
from experiments.patterns import settings
from experiments.patterns.settings import SETTINGS, extent_for, second_moment


def spatial(net: nn.Module, kernel: int) -> list[Any]:
    """The layers that arms may differ in; the stems before them have the same size of kernel in some settings."""
    kinds = nn.Conv2d | widerf.SparseConv2d
    return [module for module in net.modules() if isinstance(module, kinds) and module.kernel_size[0] == kernel]


@pytest.mark.parametrize("name", SETTINGS)
def test_arms_have_equal_weights_and_start_from_the_same_numbers(name: str) -> None:
    nets = [build(5) for build in SETTINGS[name].arms().values()]
    first = [p for n, p in nets[0].named_parameters()]
    for net in nets[1:]:
        for a, b in zip(first, net.parameters(), strict=True):
            assert a.shape == b.shape
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", SETTINGS)
def test_windows_lie_on_their_maps_and_spacings_share_no_factor_with_strides(name: str) -> None:
    setting = SETTINGS[name]
    for build in setting.arms().values():
        for layer in spatial(build(0), setting.kernel):
            if isinstance(layer, nn.Conv2d):
                assert layer.dilation[0] * (setting.kernel - 1) + 1 <= setting.widest
                assert math.gcd(layer.dilation[0], layer.stride[0]) == 1
            else:
                assert layer.extent[0] <= setting.widest


@pytest.mark.parametrize("pattern", [*settings.PATTERNS.values(), *settings.FOVEAL.values()], ids=str)
@pytest.mark.parametrize("kernel", [5, 7])
def test_a_pattern_has_the_second_moment_of_the_grid_it_stands_for_as_near_as_odd_windows_allow(
    pattern: Any, kernel: int
) -> None:
    def gap(extent: int) -> float:
        layer = widerf.SparseConv2d(64, 64, kernel, extent=extent, pattern=pattern, block=settings.BLOCK, seed=0)
        return abs(second_moment(layer.offsets) - 4 * (kernel**2 - 1) / 12)

    found = extent_for(repr(pattern), kernel, 2, 45)
    assert gap(found) <= min(gap(extent) for extent in range(kernel, 46, 4))
    assert gap(found) / (kernel**2 - 1) < 0.09  # of 1/3: halves of a grid have whole spacings


def test_a_grid_is_its_own_equal() -> None:
    for spacing in (1, 2, 5):
        assert extent_for("'grid'", 3, spacing, 45) == 2 * spacing + 1
