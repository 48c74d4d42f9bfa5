"""Figures of ERFs.

Display choices (square root, part of the image, common scale) end here: no figure of an ERF is taken from them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from widerf._checks import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from widerf.erf.map import ERF

_TWO_SIGMA = 0.0455  # 1 − 95.45 %
_ZOOM = 0.5  # share of a side below which the part with the ERF is shown alone
_SIGMA_COLOR, _FIT_COLOR, _TRF_COLOR = "white", "tab:cyan", "tab:orange"


def draw(
    erf: ERF,
    ax: Axes | None = None,
    *,
    vmax: float | None = None,
    legend: bool = True,
    window: Window | Literal["own"] | None = "own",
) -> Axes:
    """Draw the amplitude map with its 2-sigma contour, the TRF and the fitted Gaussian.

    The contour runs round the pixels that :meth:`ERF.size` counts, so that its area is the square of that size. The
    Gaussian is shown by its 2-sigma ellipse, the TRF (theoretical receptive field) by its outline. A map with one axis
    is drawn as a curve; one with three axes as its projection along the first.

    Args:
        erf: what to draw.
        ax: axes to draw on; by default those of a new figure.
        vmax: amplitude share that gets the brightest colour; by default the 98 % quantile of the map's bright pixels.
        legend: whether to name the lines.
        window: rows and columns that are shown; by default the part of the image that holds the ERF, if that is small;
            None: all of it.

    Returns:
        The axes.
    """
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(4.6, 4.4), layout="constrained").subplots()
    if erf.map.ndim == 1:
        _curve(erf, ax, vmax)
    else:
        _image(erf, ax, vmax, _window([erf]) if window == "own" else window)
    if legend:
        ax.legend(loc="upper right", fontsize="x-small", framealpha=0.6, facecolor="0.3", labelcolor="white")
    return ax


def figure(erf: ERF) -> Figure:
    """Make a figure of one ERF: the map, and per axis the share of energy by position with the fitted Gaussian."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = made.subplots(1, 2)
    draw(erf, left)
    left.set_title(_caption(erf), fontsize="small")
    _profiles(erf, right)
    return made


def compare(erfs: Mapping[str, ERF], *, columns: int = 4) -> Figure:
    """Make a figure of several ERFs side by side at one colour scale.

    Args:
        erfs: title of each map and the ERF.
        columns: maps in a row.

    Returns:
        The figure, a matplotlib ``Figure`` that belongs to no window; :func:`save` writes it.

    Raises:
        ValueError: if there is nothing to compare.

    Example:
        >>> import torch
        >>> from widerf import ERF
        >>> erf = ERF.from_energy(torch.rand(9, 9), center=(4, 4), trf_size=(9, 9))
        >>> len(compare({"before": erf, "after": erf}).axes)  # two maps and the scale
        3
    """
    from matplotlib.figure import Figure

    require(len(erfs) > 0, "erfs", "hold at least one ERF", erfs)
    columns = min(columns, len(erfs))
    rows = math.ceil(len(erfs) / columns)
    made = Figure(figsize=(3.1 * columns + 0.6, 3.3 * rows), layout="constrained")
    panels = made.subplots(rows, columns, squeeze=False).ravel()
    vmax = max(_brightest(_amplitude(erf)) for erf in erfs.values())
    window = _window(erfs.values())
    shared = window is not None or len({erf.map.shape for erf in erfs.values()}) == 1
    for panel, (title, erf) in zip(panels, erfs.items(), strict=False):
        draw(erf, panel, vmax=vmax, legend=False, window=window if shared else "own")
        panel.set_title(f"{title}\n{_caption(erf, chr(10))}", fontsize="small")
    for panel in panels[len(erfs) :]:
        panel.set_axis_off()
    images = [image for panel in panels for image in panel.images]
    if images:
        made.colorbar(images[0], ax=list(panels), label="amplitude share", shrink=0.8)
    lines = {label.partition(",")[0]: line for panel in panels for line, label in zip(*_labelled(panel), strict=True)}
    if lines:  # below the maps, where it hides nothing; figures differ between panels and stand in their titles
        style: dict[str, Any] = {"facecolor": "0.3", "labelcolor": "white", "framealpha": 0.9, "fontsize": "x-small"}
        made.legend(
            lines.values(), lines.keys(), loc="outside lower center", ncols=min(len(lines), columns + 1), **style
        )
    return made


def html(erf: ERF) -> str:
    """Return one ERF as HTML for notebooks: its figures in words, and the figure inside the page."""
    stream = io.BytesIO()
    figure(erf).savefig(stream, format="png", dpi=90)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<p>{escape(repr(erf))}</p><img alt="the ERF" style="max-width:100%" src="data:image/png;base64,{data}">'


def save(made: Figure, path: str | Path, dpi: int = 110) -> None:
    """Write a figure that this module made; the ending of ``path`` decides on the format."""
    made.savefig(path, dpi=dpi)


def _caption(erf: ERF, separator: str = ", ") -> str:
    std = f"std {erf.std:.1f}"
    if erf.blocks is not None and len(erf.blocks) > 1:
        std += f" ± {erf.standard_error('std'):.2g}"
    clipped = f", {erf.clipped:.0%} clipped" if erf.clipped > 0.01 else ""
    return f"{std} px{separator}2σ size {erf.size():.0f} px{clipped}"


def _amplitude(erf: ERF) -> Any:
    """The map that is shown: √ of the energy, projected on the last two axes."""
    energy = erf.map.sum(0) if erf.map.ndim == 3 else erf.map
    root = energy.sqrt()
    return (root / root.sum()).numpy()


def _brightest(amplitude: Any) -> float:
    # A quantile, since a single centre pixel can outshine all the others; of those that are bright at all, since a
    # small ERF lies in few pixels of a large image.
    return float(np.quantile(amplitude[amplitude > _TWO_SIGMA * amplitude.max()], 0.98))


def _image(erf: ERF, ax: Axes, vmax: float | None, window: Window | None) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Ellipse, Rectangle

    amplitude = _amplitude(erf)
    vmax = _brightest(amplitude) if vmax is None else vmax
    ax.imshow(amplitude, vmin=0, vmax=vmax, cmap="magma", interpolation="nearest", origin="upper")
    lines: list[Any] = []
    edges = outline(counted_pixels(erf))
    if edges:
        label = f"2-sigma contour, size {erf.size():.3g}"
        ax.add_collection(LineCollection(edges, colors=_SIGMA_COLOR, linewidths=0.9))
        lines.append(Line2D([], [], color=_SIGMA_COLOR, lw=0.9, label=label))
    if erf.map.numel() > 2 * erf.map.ndim + 1:
        fit = erf.gaussian_fit()
        (y, x), (height, width) = fit.mean[-2:], fit.sigma[-2:]
        style: dict[str, Any] = {"fill": False, "ec": _FIT_COLOR, "ls": "--", "lw": 1.1}
        ax.add_patch(Ellipse((x, y), 4 * width, 4 * height, label=f"fitted Gaussian, r² {fit.r2:.2f}", **style))
    if erf.trf_size is not None:
        (y, x), (height, width) = erf.center[-2:], erf.trf_size[-2:]
        corner = (x - width / 2, y - height / 2)
        ax.add_patch(Rectangle(corner, width, height, fill=False, ec=_TRF_COLOR, lw=1.2, label="theoretical field"))
    # The legend takes what is labelled; the contour has no label of its own.
    for line in lines:
        ax.add_line(line)
    (top, bottom), (left, right) = window or ((-0.5, amplitude.shape[0] - 0.5), (-0.5, amplitude.shape[1] - 0.5))
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)


def counted_pixels(erf: ERF) -> Any:
    """Return which pixels :meth:`ERF.size` counts, projected on the last two axes."""
    values = erf.map.sqrt()
    counted = (values > _TWO_SIGMA * erf.at_center(values)).numpy()
    return counted.any(0) if counted.ndim == 3 else counted


def outline(inside: Any) -> list[list[tuple[float, float]]]:
    """Return the edges between pixels inside and outside, as segments of (x, y): what is drawn is what is counted.

    Example:
        >>> len(outline(np.array([[False, False, False], [False, True, True]])))
        6
    """
    padded = np.pad(inside, 1)
    rows, columns = np.nonzero(padded[1:] != padded[:-1])
    edges = [[(x - 1.5, y - 0.5), (x - 0.5, y - 0.5)] for y, x in zip(rows, columns, strict=True)]
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    return edges + [[(x - 0.5, y - 1.5), (x - 0.5, y - 0.5)] for y, x in zip(rows, columns, strict=True)]


Window = tuple[tuple[float, float], tuple[float, float]]


def _window(erfs: Iterable[ERF]) -> Window | None:
    """Return the part of the image that holds what is to be seen of all maps, ((top, bottom), (left, right)).

    ``None``: the whole image, since the maps fill more than half of a side, or are not of one size.
    """
    erfs = list(erfs)
    shapes = {tuple(erf.map.shape[-2:]) for erf in erfs}
    if len(shapes) != 1 or erfs[0].map.ndim == 1:
        return None
    shape, ends = shapes.pop(), []
    for axis, n in enumerate(shape):
        reach = [_reach(erf, axis) for erf in erfs]
        low, high = min(low for low, _ in reach), max(high for _, high in reach)
        margin = 0.15 * (high - low) + 1
        ends.append((max(low - margin, -0.5), min(high + margin, n - 0.5)))
    whole = any(high - low > _ZOOM * n for (low, high), n in zip(ends, shape, strict=True))
    return None if whole else (ends[0], ends[1])


def _reach(erf: ERF, axis: int) -> tuple[float, float]:
    """First and last place along an axis of the last two that is counted or within three stds of the middle."""
    lit = np.nonzero(counted_pixels(erf).any(1 - axis))[0]
    middle, spread = erf.centroid[-2:][axis], 3 * erf.std_per_axis[-2:][axis]
    found = [middle - spread, middle + spread, *(float(place) for place in lit[[0, -1] if len(lit) else []])]
    return min(found) - 0.5, max(found) + 0.5


def _curve(erf: ERF, ax: Axes, vmax: float | None) -> None:
    amplitude = _amplitude(erf)
    ax.plot(amplitude, color="tab:purple", lw=1, label="amplitude share")
    ax.axhline(_TWO_SIGMA * amplitude[round(erf.center[0])], color="0.4", lw=0.9, label="2-sigma level")
    if erf.trf_size is not None:
        low, high = erf.center[0] - erf.trf_size[0] / 2, erf.center[0] + erf.trf_size[0] / 2
        ax.axvspan(low, high, color=_TRF_COLOR, alpha=0.15, label="theoretical field")
    ax.set_xlabel("input position")
    ax.set_ylim(0, max(float(amplitude.max()), vmax or 0) * 1.05)
    ax.set_xlim(-0.5, len(amplitude) - 0.5)


def _profiles(erf: ERF, ax: Axes) -> None:
    fit = erf.gaussian_fit() if erf.map.numel() > 2 * erf.map.ndim + 1 else None
    for axis, n in enumerate(erf.map.shape):
        others = [a for a in range(erf.map.ndim) if a != axis]
        marginal = erf.map.sum(others) if others else erf.map
        (line,) = ax.plot(np.arange(n), marginal.numpy(), lw=1, label=f"axis {axis}")
        if fit is not None:
            z = (np.arange(n) - fit.mean[axis]) / fit.sigma[axis]
            bell = np.exp(-0.5 * z**2) / (fit.sigma[axis] * math.sqrt(2 * math.pi))
            ax.plot(bell, ls="--", lw=1, color=line.get_color(), label=f"fitted Gaussian, σ {fit.sigma[axis]:.1f}")
    window = _window([erf])
    if window is not None:
        ax.set_xlim(min(low for low, _ in window), max(high for _, high in window))
    ax.set_xlabel("input position, pixels")
    ax.set_ylabel("share of energy")
    ax.legend(fontsize="x-small")


def _labelled(ax: Axes) -> tuple[list[Any], list[str]]:
    """Return the lines and areas that have a name, and the names."""
    lines, labels = ax.get_legend_handles_labels()
    return lines, [str(label) for label in labels]
