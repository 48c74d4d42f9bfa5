"""The page on convert(target=): what it says of a model is what is there, and faults are called faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import widerf
from experiments.harness.inputs import InputError
from experiments.roads import convert_target as road
from tests.conversion.test_windows import shared_spacing


@pytest.mark.parametrize(("extent", "pattern"), [(9, "grid"), (9, "stratified"), (13, "multiscale"), (7, "halfgrid")])
def test_the_shared_factor_is_that_of_the_slow_twin(extent: int, pattern: str) -> None:
    for stride in (1, 2, 3):
        layer = widerf.SparseConv2d(32, 32, 3, stride, padding=1, extent=extent, pattern=pattern, seed=0)
        assert road.shared_factor(layer) == shared_spacing(layer)
    forced = widerf.SparseConv2d(32, 32, 3, 2, padding=1, extent=9, pattern=widerf.patterns.grid(3, 9))
    assert road.shared_factor(forced) == shared_spacing(forced) == 2


def test_a_model_that_can_meets_the_target_and_one_that_cannot_meets_the_largest_that_is_named() -> None:
    tcn = road.examine(road.CASES["TCN"])
    assert tcn["largest"] is None
    assert tcn["gain"] == pytest.approx(1.5, rel=road.TOLERANCE)
    assert tcn["gain"] == pytest.approx(tcn["std"][1] / tcn["std"][0])
    assert road.verdict(tcn).startswith("met (")
    unet = road.examine(road.CASES["U-Net"])
    assert 1 < unet["largest"] < 1.5
    assert unet["gain"] == pytest.approx(unet["largest"], rel=road.TOLERANCE)
    assert road.verdict(unet).startswith(f"refused; largest named {unet['largest']:.3f}, met")
    for row in (tcn, unet):
        assert (row["off_map"], row["strided_grids"]) == ([], [])
        assert row["weights"][0] == row["weights"][1]


def test_a_missed_target_and_windows_off_their_map_stand_in_the_title() -> None:
    row = {"model": "a", "size": [3, 8, 8], "convolutions": 2, "sparse": 1, "widest": 7, "asked": 1.5, "largest": None,
           "gain": 1.5, "std": [2.0, 3.0], "kurtosis": [0.0, 1.0], "off_map": [], "strided_grids": [], "seconds": 1.0,
           "warnings": []}  # fmt: skip
    assert "1 of 1 models meet" in road.page([row])
    for fault in ({"gain": 1.6}, {"off_map": ["0"]}, {"strided_grids": ["0"]}):
        text = road.page([row | fault])
        assert "0 of 1 models meet" in text
        assert "faults in a\n" in text
    assert "Not run yet: TCN; U-Net" in road.page([row])


def test_models_that_have_a_row_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = 0

    def small() -> nn.Module:
        nonlocal built
        built += 1
        return nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)])

    monkeypatch.setattr(road, "CASES", {"small": road.Case(small, (8, 24, 24))})
    for _ in range(2):
        road.main(["--out", str(tmp_path)])
    assert built == 1
    assert "| small | 8×24×24 |" in (tmp_path / "convert-target.md").read_text()
    with pytest.raises(InputError, match="--models must be of small, got TCN"):
        road.main(["--out", str(tmp_path), "--models", "TCN"])
