"""Energy that lies in a small part of a map is carried back as the whole map would be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import widerf
from widerf.operators import convolution


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rank=st.integers(1, 3))
def test_the_region_with_energy_gives_what_the_whole_map_gives(data: st.DataObject, rank: int) -> None:
    def each(low: int, high: int) -> list[int]:
        return [data.draw(st.integers(low, high)) for _ in range(rank)]

    kernel, stride, padding, dilation = each(1, 4), each(1, 3), each(0, 4), each(1, 2)
    groups = data.draw(st.sampled_from([1, 2]))
    size = [d * (k - 1) + 1 + data.draw(st.integers(0, 9)) for k, d in zip(kernel, dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
    geometry = (stride, padding, dilation, False, [0] * rank, groups)
    shape = torch.ops.aten.convolution(image, weight, None, *geometry).shape
    energy = torch.zeros(shape, dtype=torch.float64)
    place = tuple(data.draw(st.integers(0, n - 1)) for n in shape[2:])
    energy[(slice(None), slice(None), *place)] = torch.rand(1, 6, generator=generator, dtype=torch.float64)
    arguments = {"input": image, "weight": weight, "stride": stride, "padding": padding, "dilation": dilation}
    arguments |= {"transposed": False, "groups": groups}
    region = [(p, p) for p in place]
    assert convolution._region(arguments, energy) in (region, None)
    mask = [True, False, False]
    whole = torch.ops.aten.convolution_backward(energy, image, weight.square(), None, *geometry, mask)
    torch.testing.assert_close(convolution._energy_of_region(arguments, energy, region), whole[0])


def test_a_map_full_of_energy_or_without_any_has_no_region() -> None:
    arguments = {"transposed": False, "weight": torch.ones(1, 1, 3, 3)}
    assert convolution._region(arguments, torch.ones(1, 1, 6, 6)) is None
    assert convolution._region(arguments, torch.zeros(1, 1, 6, 6)) is None
    spot = torch.zeros(1, 1, 6, 6)
    spot[0, 0, 1:3, 4] = 1
    assert convolution._region(arguments, spot) == [(1, 2), (4, 4)]
    assert convolution._region(arguments, spot.requires_grad_()) is None


def test_only_the_part_of_a_map_that_holds_energy_is_carried_back_though_weights_can_be_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))).double()
    assert all(parameter.requires_grad for parameter in model.parameters())
    parts, of_region = [], convolution._energy_of_region
    monkeypatch.setattr(convolution, "_energy_of_region", lambda *given: parts.append(given[2]) or of_region(*given))
    found = widerf.predict(model, (8, 33, 33)).map
    assert parts == [[(16, 16)] * 2, [(15, 17)] * 2, [(14, 18)] * 2]
    monkeypatch.setattr(convolution, "_region", lambda *_: None)
    torch.testing.assert_close(found, widerf.predict(model, (8, 33, 33)).map, rtol=1e-12, atol=0)
