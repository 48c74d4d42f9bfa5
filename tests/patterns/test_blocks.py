"""Neighbouring channels share their taps in blocks; layers of every grouping do what their buffer says, and load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.reference import scattered_convolution
from widerf import SparseConv1d, SparseConv2d, SparseConv3d, patterns
from widerf.sparse.offsets import block_width, draw_offsets


def twin(layer: Any, x: Tensor) -> Tensor:
    return scattered_convolution(
        x, layer.weight, layer.bias, layer.offsets, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def taps_of_channels(offsets: Tensor, channels: int) -> list[Any]:
    """The taps of each input channel, as the buffer is read: equal runs of channels."""
    return [offsets[c * len(offsets) // channels].tolist() for c in range(channels)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 2048), st.integers(1, 5))
def test_default_blocks_are_what_a_gpu_reads_at_once_and_there_are_two_at_least(channels: int, parts: int) -> None:
    width = block_width(channels, parts)
    if width is None:  # fewer than two blocks of 16, or a part without one, or a small number that 16 does not divide
        assert channels < 16 * max(2, parts) or (channels < 64 and channels % 16)
    else:
        assert width in (64, 32, 16)
        assert channels >= width * max(2, parts)
        divide = [w for w in (64, 32, 16) if channels % w == 0 and channels >= w * max(2, parts)]
        assert width == divide[0] if divide else width <= 32


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 300),
    st.sampled_from([1, 2, 3, 8]),
    st.sampled_from([None, 16, 32, 48, 64, 128]),
    st.sampled_from(["mixed", "stratified", "halfgrid", "multiscale"]),
    st.booleans(),
)
def test_the_channels_of_a_block_share_their_taps(
    per_group: int, groups: int, block: int | None, pattern: str, depthwise: bool
) -> None:
    channels = per_group * groups
    groups = channels if depthwise else groups
    offsets = draw_offsets(pattern, (3,), (9,), channels, groups, 0, block)
    assert len(offsets) <= channels
    cut = channels // groups if channels // groups >= 32 else channels
    width = block_width(cut, patterns.kinds(pattern), block)
    if width is None:
        return
    assert channels % len(offsets) == 0
    taps = taps_of_channels(offsets, channels)
    assert len({str(t) for t in taps}) <= -(-cut // width)
    for first in range(0, channels, cut):
        for start in range(0, cut, width):
            assert all(taps[first + c] == taps[first + start] for c in range(start, min(start + width, cut)))
        assert taps[first : first + cut] == taps[:cut]
    if pattern in ("mixed", "halfgrid"):
        assert taps[0] == patterns.dense_taps((3,)).tolist()
        assert taps[cut - 1] != taps[0]


@pytest.mark.parametrize(
    ("channels", "groups", "block", "rows"),
    [
        (128, 1, None, 2),  # two blocks of 64
        (64, 1, None, 2),  # 32
        (96, 1, None, 3),  # 32
        (512, 1, None, 8),
        (512, 512, None, 8),  # depthwise: by all channels
        (256, 4, None, 8),  # 64 in a group: two of 32 each
        (128, 32, None, 2),  # 4 in a group: blocks hold whole groups
        (64, 1, 64, 2),  # no room for a dense and a wide half: narrower
        (80, 1, 64, 5),  # 64 and 16: runs of 16, four of which are alike
        (100, 1, None, 25),  # 32, 32, 32 and 4
    ],
)
def test_the_buffer_has_a_row_for_each_block(channels: int, groups: int, block: int | None, rows: int) -> None:
    layer = SparseConv2d(channels, channels, 3, groups=groups, block=block, pattern="mixed", device="meta")
    assert len(layer._taps) == rows
    assert layer.readers()[1] >= 1


@pytest.mark.parametrize("pattern", ["mixed", "foveal", [("dense", 0.25), ("stratified", 0.75)]])
@pytest.mark.parametrize(
    ("channels", "groups", "block"),
    [(32, 1, None), (48, 48, 16), (36, 1, 16), (64, 2, 16), (40, 20, 32), (33, 1, None)],
)
def test_every_grouping_computes_what_its_buffer_says(pattern: Any, channels: int, groups: int, block: Any) -> None:
    torch.manual_seed(0)
    build: Any = SparseConv2d
    layer = build(channels, groups * 2, 3, 1, 1, groups=groups, extent=9, pattern=pattern, block=block, seed=1)
    layer = layer.double()
    x = torch.randn(2, channels, 7, 8, dtype=torch.float64, requires_grad=True)
    y, wanted = layer(x), twin(layer, x)
    torch.testing.assert_close(y, wanted)
    ask = torch.randn_like(y)
    for got, right in zip(
        torch.autograd.grad(y, [x, layer.weight], ask), torch.autograd.grad(wanted, [x, layer.weight], ask), strict=True
    ):
        torch.testing.assert_close(got, right)
    torch.testing.assert_close(layer.to_conv2d()(x), y)


@pytest.mark.parametrize(("kind", "size"), [(SparseConv1d, (12,)), (SparseConv3d, (5, 4, 6))])
def test_blocks_in_one_and_three_axes(kind: Any, size: tuple[int, ...]) -> None:
    layer = kind(32, 4, 3, padding=1, extent=5, block=16, pattern="halfgrid", dtype=torch.float64)
    x = torch.randn(1, 32, *size, dtype=torch.float64)
    assert len(layer.offsets) == 2
    torch.testing.assert_close(layer(x), twin(layer, x))


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("rows", [1, 2, 7, 18, 32])
def test_state_dicts_of_any_number_of_pattern_groups_load(rows: int, groups: int) -> None:
    torch.manual_seed(0)
    old = SparseConv2d(32, 32, 3, padding=1, groups=groups, extent=7, pattern=patterns.partition(3, 7, rows))
    x = torch.randn(1, 32, 9, 9)
    wanted = old(x)
    for assign in (False, True):
        new = nn.Sequential(SparseConv2d(32, 32, 3, padding=1, groups=groups, extent=7))
        state = {f"0.{key}": value.clone() for key, value in old.state_dict().items()}
        new(x)  # a plan is there, and has to go
        assert str(new.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
        assert torch.equal(new.state_dict()["0.offsets"], old.offsets)
        torch.testing.assert_close(new(x), wanted)
    shell = nn.Sequential(SparseConv2d(32, 32, 3, padding=1, groups=groups, extent=7, device="meta"))
    shell.load_state_dict({f"0.{key}": value for key, value in old.state_dict().items()}, assign=True)
    torch.testing.assert_close(shell(x), wanted)


def test_state_dicts_with_too_many_groups_or_taps_outside_are_refused_and_change_no_taps() -> None:
    layer = SparseConv2d(32, 32, 3, extent=7)
    before = layer.offsets.clone()
    for offsets, message in (
        (patterns.partition(3, 7, 33), "have no more groups than the 32 input channels"),
        (patterns.grid(3, 9), "lie in the window of extent"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**layer.state_dict(), "offsets": offsets})
        assert torch.equal(layer.offsets, before)


def test_grids_of_strided_layers_read_the_whole_map() -> None:
    layer = SparseConv2d(4, 4, 3, stride=2, padding=1, extent=9, pattern="grid")
    assert layer.offsets.abs().amax() == 3  # not 4, which would read a quarter of it
    assert SparseConv2d(4, 4, 3, padding=1, extent=9, pattern="grid").offsets.abs().amax() == 4


def test_the_layer_names_its_pattern_and_defaults_to_the_table() -> None:
    assert SparseConv2d(64, 8, 3).pattern == patterns.default_pattern((3, 3))
    assert SparseConv2d(64, 64, 7, groups=64, extent=15).pattern == patterns.default_pattern((7, 7), depthwise=True)
    mixture: Any = [("dense", 0.5), (patterns.stratified, 0.5)]
    assert "pattern=0.5 dense + 0.5 stratified" in repr(SparseConv2d(64, 8, 3, pattern=mixture))
    conv = nn.Conv2d(64, 64, 3)
    layer = SparseConv2d.from_conv2d(conv, pattern="stratified", block=16, seed=2)
    assert len(layer.offsets) == 4
    assert layer.weight is conv.weight


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "block must be a positive multiple of 16, got 24", {"block": 24}),
        (ValueError, "block must be a positive multiple of 16, got 0", {"block": 0}),
        (TypeError, "block must be an integer, got 16.0", {"block": 16.0}),
        (ValueError, "block must not be given with offsets", {"block": 16, "pattern": patterns.grid(3, 7)}),
        (TypeError, "pattern must be a name or hold pairs", {"pattern": 5}),
    ],
)
def test_bad_blocks_and_patterns_are_refused(error: Any, message: str, arguments: Any) -> None:
    with pytest.raises(error, match=message):
        SparseConv2d(64, 64, 3, **arguments)
