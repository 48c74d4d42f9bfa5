"""Convert's idea of the model.

Windows know the dilation, the stride and the map of their layer; no grid reads a part of its map only.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from widerf import convert, init
from widerf.conversion.windows import automatic_extent, widest_extent
from widerf.convolutions.selection import find_convolutions
from widerf.sparse.layer import SparseConv

GRIDS = ["grid", "halfgrid", "multiscale", "mixed", "stratified", "foveal"]


def cells_of(layer: Any) -> list[int]:
    """Pixels of its map that a layer's window spans, per axis."""
    return [(s - 1) * d + 1 for s, d in zip(layer.extent, layer.dilation, strict=True)]


def shared_spacing(layer: Any) -> int:
    """Largest factor that the stride shares with the spacing of some group's taps, over groups and axes."""
    worst = 1
    for group in layer.offsets.tolist():
        for axis, (stride, dilation) in enumerate(zip(layer.stride, layer.dilation, strict=True)):
            places = sorted({tap[axis] * dilation for tap in group})
            steps = math.gcd(*(b - places[0] for b in places)) if len(places) > 1 else 1
            worst = max(worst, math.gcd(steps, stride))
    return worst


LAYER = st.tuples(st.sampled_from([1, 2, 3, 4, 5]), st.integers(1, 3), st.integers(1, 6))


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(LAYER, min_size=2, max_size=4),
    st.integers(9, 33),
    st.sampled_from([None, 5, 9, 31]),
    st.sampled_from(GRIDS),
)
def test_no_window_is_wider_than_its_map_and_no_grid_shares_a_factor_with_its_stride(
    layers: Any, size: int, extent: int | None, pattern: str
) -> None:
    net = nn.Sequential(
        *[nn.Conv2d(4, 4, k, stride, (k - 1) * dilation // 2 + 1, dilation) for k, stride, dilation in layers]
    )
    x = torch.randn(1, 4, size, size)
    sides = [size]
    for layer in net:
        x = layer(x)
        sides.append(x.shape[-1])
    assume(min(sides) >= 2)
    report = convert(net, extent=extent, input_size=(4, size, size), pattern=pattern, only="*", seed=1)
    for layer, row, side in zip(net, report, sides, strict=False):
        assert row.converted == isinstance(layer, SparseConv)
        if isinstance(layer, SparseConv):
            assert all(cells <= side for cells in cells_of(layer))
            assert shared_spacing(layer) == 1
            assert layer.extent == row.extent
        elif row.verdict == "no wider window fits its map":
            k, _, dilation = layers[int(row.name)]
            assert (k + 1) * dilation + 1 > side
    assert tuple(net(torch.randn(1, 4, size, size)).shape) == tuple(x.shape)


class Aspp(nn.Module):
    """A strided stem and parallel dilated branches."""

    def __init__(self, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 8, 1)
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=d, dilation=d) for d in rates)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def test_the_dilation_of_a_branch_belongs_to_its_window() -> None:
    net = Aspp((1, 2, 3, 6, 12))
    report = convert(net, input_size=(3, 128, 128), only="branches")  # a map of 16
    assert [row.extent for row in report] == [None, (11, 11), (5, 5), None, None, None]
    assert report["branches.3"].verdict == report["branches.4"].verdict == "no wider window fits its map"


def test_the_extent_that_is_asked_for_is_cut_to_the_map() -> None:
    net = Aspp((1, 2, 4))
    report = convert(net, extent=31, input_size=(3, 128, 128), only="branches")
    assert [row.extent for row in report][1:] == [(15, 15), (7, 7), None]
    assert all(cells <= 16 for branch in net.branches[:2] for cells in cells_of(branch))


def test_the_widest_window_fits_and_the_next_does_not() -> None:
    for k in (1, 2, 3, 5):
        for dilation in (1, 2, 5):
            (kernel,) = find_convolutions(nn.Conv2d(1, 1, k, dilation=dilation))
            for side in range(1, 30):
                width = widest_extent(kernel, (side, side))[0]
                assert width >= k
                assert (width - k) % 2 == 0
                assert width == k or (width - 1) * dilation + 1 <= side
                assert k == 1 or (width + 1) * dilation + 1 > side
            assert automatic_extent((k, k), (28, 28), 1.0, (dilation,) * 2)[0] <= max(
                k, widest_extent(kernel, (28, 28))[0]
            )


def test_init_and_conversion_mean_the_same_by_patchify() -> None:
    """Outputs of stride ≥ dilation·(k − 1) + 1 share no stretch of the input, whoever asks."""
    for k, stride, dilation in ((3, 5, 2), (3, 4, 2), (2, 2, 1), (4, 4, 1), (3, 6, 2), (3, 3, 1), (3, 2, 1), (5, 9, 2)):
        net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, k, stride=stride, dilation=dilation))
        converted = convert(net, extent=9, only="1", dry_run=True)["1"].verdict
        widened = init.apply(net, only="1", dry_run=True)["1"].verdict
        patchify = stride >= dilation * (k - 1) + 1
        assert ("patchify" in converted) == patchify
        assert ("patchify" in widened) == (patchify and k > 2)  # of two taps init says that they are corners


def test_a_dilation_that_shares_a_factor_with_the_stride_is_left_alone() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2, dilation=4), nn.Conv2d(8, 8, 3, stride=2, dilation=3)
    )
    report = convert(net, extent=7)
    assert report["1"].verdict.startswith("its dilation shares a factor with its stride")
    assert report["2"].converted


def test_the_report_names_the_pattern_of_each_layer_and_the_default_is_the_tables() -> None:
    from widerf.patterns import default_pattern

    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 7, groups=64))
    report = convert(net, extent=15, dry_run=True)
    assert [row.pattern for row in report] == [None, default_pattern((3, 3)), default_pattern((7, 7), depthwise=True)]
    assert [row.pattern_groups for row in report] == [None, 2, 2]
    report = convert(net, extent=15, pattern=[("dense", 0.5), ("stratified", 0.5)], block=16)
    assert [row.pattern_groups for row in report] == [None, 4, 4]
    assert report["1"].pattern == "0.5 dense + 0.5 stratified"


def test_a_model_that_is_a_convolution_itself_is_not_said_to_be_converted() -> None:
    report = convert(nn.Conv2d(8, 8, 3), extent=7, only="*")
    assert [row.verdict for row in report] == ["the model itself: SparseConv2d.from_conv2d makes a sparse layer of it"]
