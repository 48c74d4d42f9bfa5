"""The table of patterns: equal σ, and figures that can be worked out by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from experiments.patterns import settings, table
from widerf.patterns import NAMED, coverage, dense_taps, grid


@pytest.mark.parametrize("kernel", table.KERNELS)
def test_all_patterns_but_dense_have_the_second_moment_of_the_grid_as_near_as_an_odd_window_comes(kernel: int) -> None:
    wanted = table.SPACING**2 * (kernel**2 - 1) / 12
    patterns = table.pattern_set(kernel)
    assert set(NAMED) <= set(patterns)
    assert table.Kind("grid", kernel).extent() == 1 + table.SPACING * (kernel - 1)
    for name in ("mixed", "halfgrid", "half stratified"):
        kind = table.Kind(patterns[name], kernel)
        extent = kind.extent()
        gap = abs(kind.moment(extent) - wanted)
        assert gap <= min(abs(kind.moment(side) - wanted) for side in (extent - 2, extent + 2))


@pytest.mark.parametrize("name", ["stratified", "multiscale", "mixed"])
def test_the_windows_are_those_of_the_study_to_a_step(name: str) -> None:
    """Those are found with one draw, these with the mean of several."""
    mine = table.Kind(name, 3).extent()
    theirs = settings.extent_for(repr(settings.PATTERNS[name]), 3, table.SPACING, 99)
    assert abs(mine - theirs) <= 2


def test_holes_near_the_unit_are_counted_cell_by_cell() -> None:
    taps = [grid(3, 9), grid(3, 5)]
    covered = coverage(taps)
    radius, hit, cells = table.NEAR * covered.std, 0, 0
    reached = {(int(a[0] + b[0]), int(a[1] + b[1])) for a in taps[0][0] for b in taps[1][0]}
    for y in range(-20, 21):
        for x in range(-20, 21):
            if math.hypot(y, x) <= radius:
                cells += 1
                hit += (y, x) in reached
    assert 0 < hit < cells
    assert table.holes_near(covered) == pytest.approx(1 - hit / cells)
    assert table.holes_near(coverage([dense_taps(3)[None]] * 4)) == 0


def test_a_single_layer_and_chains_of_grids_have_the_figures_that_algebra_gives() -> None:
    kind = table.Kind("grid", 3)
    one, six = (table.figures(kind, 9, layers, 1.0) for layers in (1, 6))
    sigma = table.SPACING * math.sqrt(2 / 3)
    assert one["std"] == pytest.approx(sigma)
    assert one["excess_kurtosis"] == pytest.approx(-1.5)
    assert one["isotropy"] == pytest.approx(2)
    assert six["std"] == pytest.approx(sigma * math.sqrt(6))
    assert six["excess_kurtosis"] == pytest.approx(-1.5 / 6)
    assert one["std_sd"] == pytest.approx(0, abs=1e-12)
    half = table.figures(kind, 9, 6, 0.5)
    assert half["std"] == pytest.approx(sigma * math.sqrt(3))
    assert table.figures(table.Kind("random", 3), 11, 2, 1.0)["roughness_sd"] > 0


def test_the_page_and_the_figures_have_a_row_for_each_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "DRAWS", 2)
    table.main(["--out", str(tmp_path), "--kernels", "3"])
    rows = list(csv.DictReader((tmp_path / "pattern-table.csv").read_text().splitlines()))
    assert len(rows) == len(table.pattern_set(3)) * len(table.LAYERS) * len(table.SHARES)
    text = (tmp_path / "pattern-table.md").read_text()
    assert text.count("\n| dense | 3 | 0.82 / 1.15 / 2.00 |") == 1
    assert "roughest `grid` (3.4" in text
    assert all(f"| {name} |" in text for name in table.pattern_set(3))
