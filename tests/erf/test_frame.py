"""The frame of units: what both roads put round an energy map."""

from __future__ import annotations

import pytest
from torch import nn

import widerf
from widerf.erf.frame import Frame


def test_the_frame_of_a_unit_is_its_receptive_field() -> None:
    field = widerf.receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3, stride=2), nn.Conv2d(1, 1, (5, 3))), (1, 31, 31))
    frame = Frame.of(field, [(4, 3)])
    assert (frame.center, frame.trf_size, frame.jump) == (field.center((4, 3)), field.size, field.jump)


def test_the_frame_of_several_units_is_the_box_round_all() -> None:
    field = widerf.receptive_field(nn.Conv2d(1, 1, 3, padding=1), (1, 21, 21))
    frame = Frame.of(field, [(2, 3), (10, 7)])
    assert frame.center == (6.0, 5.0) and frame.trf_size == (11, 7)


def test_global_paths_leave_no_theoretical_size() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4))
    assert Frame.of(widerf.receptive_field(net, (1, 9, 9)), [(4, 4)]).trf_size is None


@pytest.mark.parametrize("size, shape", [((32, 48), (8, 6)), ((9,), (9,))])
def test_cells_tile_the_image_where_nothing_was_traced(size: tuple[int, ...], shape: tuple[int, ...]) -> None:
    first = Frame.of_cells(size, shape, [tuple(0 for _ in shape)], "no rule")
    last = Frame.of_cells(size, shape, [tuple(m - 1 for m in shape)], "no rule")
    for n, m, low, high, jump in zip(size, shape, first.center, last.center, first.jump, strict=True):
        assert jump == n / m and low - jump / 2 == -0.5 and high + jump / 2 == n - 0.5
    assert first.untraced == "no rule" and first.trf_size is None
