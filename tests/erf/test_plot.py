from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


def enclosed(axes: object) -> tuple[float, float]:
    """Area inside the contour by the shoelace of its horizontal edges, and how long it is."""
    from matplotlib.collections import LineCollection

    (edges,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    length = sum(abs(b - a).sum() for a, b in edges.get_segments())
    # Along each column of pixels the horizontal edges come in pairs: in, and out again.
    columns: dict[float, list[float]] = {}
    for (x0, y0), (x1, y1) in edges.get_segments():
        if y0 == y1:
            columns.setdefault((x0 + x1) / 2, []).append(y0)
    pairs = [pair for ys in columns.values() for pair in zip(sorted(ys)[::2], sorted(ys)[1::2], strict=True)]
    return sum(high - low for low, high in pairs), length


@given(seed=st.integers(0, 10_000), jump=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_contour_encloses_the_square_of_the_size_that_is_reported(seed: int, jump: int) -> None:
    energy = torch.rand(19, 23, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 12
    energy[::jump, ::jump] += 1
    erf = ERF.from_energy(energy, center=(9, 11), trf_size=(19, 23), warn=False)
    if erf.size() ** 2 in (0.0, energy.numel()):
        return
    area, _ = enclosed(plot.draw(erf))
    assert area == pytest.approx(erf.size() ** 2)


def test_a_small_erf_is_zoomed_in_on_and_a_wide_one_is_not() -> None:
    energy = torch.zeros(224, 224)
    energy[100:112, 90:104] = 1
    axes = plot.draw(ERF.from_energy(energy, center=(105, 96), trf_size=(300, 300), warn=False))
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left <= 89.5 and right >= 103.5 and top <= 99.5 and bottom >= 111.5  # all of it is there
    assert right - left < 60 and bottom - top < 60
    whole = plot.draw(erf_of(2))
    assert (whole.get_xlim(), whole.get_ylim()) == ((-0.5, 8.5), (8.5, -0.5))


def test_maps_side_by_side_show_the_same_part_of_the_image() -> None:
    small, large = torch.zeros(96, 96), torch.zeros(96, 96)
    small[46:50, 46:50] = 1
    large[40:56, 40:56] = 1
    erfs = {str(i): ERF.from_energy(e, center=(47.5, 47.5), trf_size=(33, 33)) for i, e in enumerate((small, large))}
    panels = [axes for axes in plot.compare(erfs).axes if axes.images]
    assert panels[0].get_xlim() == panels[1].get_xlim() and panels[0].get_xlim()[1] - panels[0].get_xlim()[0] < 96


def test_an_erf_and_a_field_say_what_they_are() -> None:
    from torch import nn

    import widerf

    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    erf = widerf.predict(net, (1, 9, 9))
    expected = f"ERF(std {erf.std:.3g}, 2σ size {erf.size():.3g} of 9×9 pixels, theoretical field 5×5, predicted)"
    assert repr(erf) == expected
    assert "measured, 4 draws" in repr(widerf.measure(net, (1, 9, 9), samples=4))
    shown = erf._repr_html_()
    assert "2σ size" in shown and "data:image/png;base64," in shown
    field = widerf.receptive_field(net, (1, 9, 9))._repr_html_()
    assert "<td" in field and "5×5" in field and "global" not in field
    cells = ERF.from_energy(torch.ones(4, 4), center=(1.5, 1.5), untraced="no rule", warn=False)
    assert "theoretical field not known" in repr(cells) and "% clipped" in repr(cells)
