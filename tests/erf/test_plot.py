from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reference import uniform_stack
from widerf.erf import plot
from widerf.erf.map import ERF


def erf_of(rank: int, layers: int = 4, trf: bool = True) -> ERF:
    side = 2 * layers + 1
    size = (side,) * rank if trf else None
    return ERF.from_energy(uniform_stack(layers, rank), center=(layers,) * rank, trf_size=size, clipped=0.0)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("trf", [True, False])
def test_maps_of_every_rank_are_drawn(rank: int, trf: bool, tmp_path: Path) -> None:
    plot.save(plot.figure(erf_of(rank, trf=trf)), tmp_path / "erf.png")
    plot.save(plot.compare({"a": erf_of(rank), "b": erf_of(rank, 2)}), tmp_path / "two.png")
    assert (tmp_path / "erf.png").stat().st_size > 5000
    assert (tmp_path / "two.png").stat().st_size > 5000


def test_a_drawing_names_the_contour_the_field_and_the_fit() -> None:
    axes = plot.draw(erf_of(2, 10))
    labels = {text.get_text().split(",")[0] for text in axes.get_legend().get_texts()}
    assert labels == {"2-sigma contour", "theoretical field", "fitted Gaussian"}


def test_the_outline_is_that_of_the_theoretical_field() -> None:
    from matplotlib.patches import Rectangle

    energy = torch.zeros(21, 21)
    energy[3:8, 5:12] = 1
    axes = plot.draw(ERF.from_energy(energy, center=(5, 8), trf_size=(5, 7)))
    (box,) = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (4.5, 2.5, 7, 5)


def test_several_maps_share_one_scale() -> None:
    figure = plot.compare({"narrow": erf_of(2, 2), "wide": erf_of(2, 12)})
    scales = {image.get_clim() for axes in figure.axes for image in axes.images}
    assert len(scales) == 1
    ((low, high),) = scales
    assert low == 0
    assert high == pytest.approx(float(erf_of(2, 2).amplitude.max()), rel=0.2)


def test_rows_break_after_the_columns_asked_for() -> None:
    figure = plot.compare({str(i): erf_of(2) for i in range(5)}, columns=2)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 5
    assert figure.get_size_inches()[1] > 2 * 3


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="erfs must hold at least one ERF"):
        plot.compare({})


def test_drawing_leaves_the_figures_alone() -> None:
    erf = erf_of(2)
    before = (erf.std, erf.size(), erf.map.clone())
    plot.figure(erf)
    assert (erf.std, erf.size()) == before[:2]
    assert torch.equal(erf.map, before[2])
