"""convert(target=, kurtosis=) gives the predicted ERF its width and its tail, or names what is possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import widerf
from tests.reference import fingerprint
from widerf import convert
from widerf.conversion.growth import TOLERANCE
from widerf.conversion.tail import NEAR, Design, design_for, mixture

SIZE = (64, 32, 32)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(5)])


def law(share: float) -> Design:
    """A made-up tail that is heavier the fewer channels are wide: of one uniform layer, 1.8/share − 3."""
    return Design(share, {}, 1.8 / share - 3)


@pytest.mark.parametrize("wanted", [-1.2, -0.5, 0.0, 0.6, 1.7, 3.0, 5.5, 11.0])
def test_the_search_finds_the_share_that_gives_the_tail(wanted: float) -> None:
    tried: list[float] = []

    def search(share: float) -> Design:
        tried.append(share)
        return law(share)

    found = design_for(search, wanted)
    assert len(tried) <= 7
    assert len(set(tried)) == len(tried)
    assert found.kurtosis == min((law(share).kurtosis for share in tried), key=lambda k: abs(k - wanted))
    exact = 1.8 / (wanted + 3)
    assert abs(found.kurtosis - wanted) <= NEAR or abs(found.share - exact) < 0.07


def test_a_tail_out_of_reach_is_refused_with_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"kurtosis must be between -1\.20 and 11\.40, .* got 12"):
        design_for(law, 12.0)
    with pytest.raises(ValueError, match=r"kurtosis must be between -1\.20 and 11\.40, .* got -2"):
        design_for(law, -2.0)


def test_a_share_whose_windows_miss_the_gain_is_taken_only_if_all_do() -> None:
    def search(share: float) -> Design:
        return Design(share, {}, 1.8 / share - 3, met=share != 0.5)

    assert law(0.5).kurtosis == pytest.approx(0.6)
    assert design_for(search, 0.6).share not in (0.5, 1.0)
    assert design_for(lambda share: Design(share, {}, 1.8 / share - 3, met=False), 0.6).share == 0.5


def test_shares_too_small_for_the_gain_are_left_out_and_the_first_error_is_the_callers() -> None:
    def search(share: float) -> Design:
        if share < 0.5:
            raise ValueError("target must be at most 1.2")
        return law(share)

    assert design_for(search, 0.5).share == 0.5
    with pytest.raises(ValueError, match=r"kurtosis must be between -1\.20 and 0\.60"):
        design_for(search, 2.0)

    def none(share: float) -> Design:
        raise ValueError(f"target must be at most 1.2, got {share}")

    with pytest.raises(ValueError, match="target must be at most"):
        design_for(none, 0.0)


def test_the_rest_of_the_channels_is_dense() -> None:
    assert mixture("rings", 1.0) == "rings"
    assert mixture("rings", 0.25) == [("dense", 0.75), ("rings", 0.25)]


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
def test_a_heavier_tail_at_the_same_width_takes_fewer_and_wider_windows() -> None:
    reports = {}
    for wanted in (-0.2, 0.2):
        model = plain()
        state = fingerprint(model)
        if wanted > 0:  # as a dry run tells
            told = convert(model, target=1.4, kurtosis=wanted, input_size=SIZE, dry_run=True)
            assert fingerprint(model) == state
        report = convert(model, target=1.4, kurtosis=wanted, input_size=SIZE)
        assert report.erf_kurtosis is not None
        assert report.gain == pytest.approx(1.4, rel=TOLERANCE)
        assert report.erf_kurtosis[1] == pytest.approx(wanted, abs=NEAR)
        assert widerf.predict(model, SIZE).excess_kurtosis == pytest.approx(report.erf_kurtosis[1])
        assert f"(wanted {wanted:g})" in str(report)
        assert report.target_kurtosis == wanted
        reports[wanted] = report
    assert reports[0.2].rows == told.rows
    light, heavy = (max(row.extent[0] for row in reports[k] if row.extent) for k in (-0.2, 0.2))
    assert heavy > light
    assert any("dense" in (row.pattern or "") for row in reports[0.2])


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
def test_what_a_network_cannot_have_is_refused_and_leaves_it_as_it_was() -> None:
    model = plain()
    state = fingerprint(model)
    with pytest.raises(ValueError, match=r"kurtosis must be between -0\.\d+ and \d\.\d+, .* got 9"):
        convert(model, target=1.4, kurtosis=9, input_size=SIZE)
    with pytest.raises(ValueError, match="target must be at most"):
        convert(model, target=99, kurtosis=0.1, input_size=SIZE)
    assert fingerprint(model) == state


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "kurtosis must be a number, got '1'", {"target": 1.5, "kurtosis": "1"}),
        (ValueError, "kurtosis must be finite, got nan", {"target": 1.5, "kurtosis": float("nan")}),
        (ValueError, "target must be given with kurtosis, got None", {"kurtosis": 1.0}),
        (
            ValueError,
            "pattern must be one name with kurtosis, which chooses the mixture",
            {"target": 1.5, "kurtosis": 1.0, "pattern": [("dense", 0.5), ("rings", 0.5)]},
        ),
    ],
)
def test_bad_arguments_are_refused(error: Any, message: str, arguments: Any) -> None:
    model = plain()
    state = fingerprint(model)
    with pytest.raises(error, match=message):
        convert(model, input_size=SIZE, **arguments)
    assert fingerprint(model) == state
