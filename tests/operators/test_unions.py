"""Unions of boxes that are kept as terms: every question about them has the answer that the boxes in full give."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from widerf.operators.boxes import apart, greatest, is_constant, nothing, reshaped, thin, union_of
from widerf.operators.paths import merges_positions, misalignment

SHAPE = (2, 3, 4)
SUBSETS = [axes for n in range(len(SHAPE) + 1) for axes in itertools.combinations(range(len(SHAPE)), n)]


@st.composite
def boxes(draw: st.DrawFn, axes: tuple[int, ...] | None = None) -> Tensor:
    """Boxes on one spatial axis that vary along some axes only, some of them empty."""
    varying = draw(st.sampled_from(SUBSETS)) if axes is None else axes
    shape = [n if axis in varying else 1 for axis, n in enumerate(SHAPE)]
    values = draw(st.lists(st.integers(-2, 2), min_size=2 * math.prod(shape), max_size=2 * math.prod(shape)))
    reach = torch.tensor(values, dtype=torch.float32).view(2, *shape)
    reach = torch.where((reach == 2).any(0), math.inf, reach)
    return reach.expand(2, *SHAPE)


UNIONS = st.lists(boxes(), min_size=1, max_size=4)


@given(UNIONS)
def test_terms_have_the_union_and_take_no_more_room(reaches: list[Tensor]) -> None:
    terms = apart(reaches)
    whole = torch.stack(reaches).amin(0)
    assert torch.equal(union_of(list(terms), SHAPE), whole)
    assert sum(thin(term).numel() for term in terms) <= sum(thin(reach).numel() for reach in reaches)
    for one, other in itertools.combinations(terms, 2):
        assert thin(union_of([one, other], SHAPE)).numel() > thin(one).numel() + thin(other).numel()


@given(UNIONS, st.sampled_from(SUBSETS))
def test_the_greatest_of_a_union_is_that_of_the_boxes_in_full(reaches: list[Tensor], axes: tuple[int, ...]) -> None:
    dims = tuple(1 + axis for axis in axes)
    whole = torch.stack(reaches).amin(0)
    wanted = whole.amax(dims, keepdim=True) if dims else whole
    assert torch.equal(greatest(tuple(reaches), dims).expand_as(wanted), wanted)


@given(UNIONS, st.sampled_from([None, 1, 2, 3]), st.sampled_from([0.0, 1.0, 2.0]))
def test_a_union_is_constant_where_the_boxes_in_full_are(reaches: list[Tensor], free: int | None, slack: float) -> None:
    whole = torch.stack(reaches).amin(0)
    first = whole[tuple(slice(None) if dim in (0, free) else slice(1) for dim in range(4))]
    wanted = bool(((whole == first) | ((whole - first).abs() <= slack)).all())
    assert is_constant(tuple(reaches), free, slack) == wanted


@given(UNIONS, UNIONS, st.integers(1, 4))
def test_whether_positions_are_merged_does_not_depend_on_the_terms(
    outputs: list[Tensor], inputs: list[Tensor], side: int
) -> None:
    full = [(torch.stack(reaches).amin(0),) for reaches in (outputs, inputs)]
    wanted = merges_positions(full[:1], full[1:], (side,), (1.0,))
    assert merges_positions([tuple(outputs)], [tuple(inputs)], (side,), (1.0,)) == wanted
    seen = full[1][0].flatten(1).amin(1)
    if not bool(seen.isfinite().all()):
        assert not wanted
    elif wanted:  # the slow twin: every output sees all that any input saw within the image
        box = torch.maximum(seen, torch.tensor([0.0, 1.0 - side]))
        assert bool((full[0][0].flatten(1) <= box[:, None]).all())


@given(st.lists(boxes(), min_size=2, max_size=3))
def test_a_shift_of_joined_paths_does_not_depend_on_how_boxes_are_held(reaches: list[Tensor]) -> None:
    found = misalignment(reaches)
    assert found == misalignment([reach.contiguous() for reach in reaches])
    if found is not None:  # the slow twin: it is the same wherever both see something
        first, *others = ((reach[0] - reach[1]) / 2 for reach in reaches)
        shifts = [[s for s in (other - first).flatten().tolist() if math.isfinite(s)] for other in others]
        assert any(shift and set(shift) == {found[0]} for shift in shifts)


def test_a_shift_that_differs_from_place_to_place_is_none() -> None:
    first = torch.arange(6.0).view(1, 1, 6)
    there = torch.stack([first, -first])
    phases = first // 2 * 2  # as behind upsampling by 2
    assert misalignment([there, torch.stack([phases, -phases])]) is None
    assert misalignment([there, torch.stack([first + 1, -first - 1])]) == (1.0,)


@given(boxes(), st.data())
def test_boxes_in_another_shape_are_the_same_and_stay_thin(reach: Tensor, data: st.DataObject) -> None:
    component = reach[0]
    order = data.draw(st.permutations(range(3)))
    component = component.permute(*order)
    shapes = [(6, 4), (2, 12), (24,), (2, 1, 3, 2, 2), (4, 3, 2), (1, 24, 1), (3, 2, 4)]
    shape = data.draw(st.sampled_from([*shapes, tuple(component.shape)]))
    found = reshaped(component, shape)
    assert torch.equal(found, component.reshape(shape))
    if len(set(component.stride())) == 1 and component.stride()[0] == 0:
        assert thin(found[None]).numel() == 1


def test_empty_boxes_hold_one_number_a_side() -> None:
    reach = nothing(torch.zeros(4, 2, 3))
    assert reach.shape == (4, 2, 3) and bool(reach.isinf().all()) and thin(reach).numel() == 4
