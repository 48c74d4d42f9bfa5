"""One row a layer: what each layer of a network sees, from one recording of one forward pass."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from widerf._checks import require
from widerf.convolutions.branches import silent_branches
from widerf.erf.coordinates import Reading
from widerf.erf.energy import Backward
from widerf.erf.frame import Frame
from widerf.erf.map import CLIPPED_LIMIT, ERF
from widerf.erf.measurement import measure as measured
from widerf.erf.prediction import predicted
from widerf.erf.receptive import ReceptiveField, field_of, from_marks
from widerf.errors import ClippedWarning, DeadUnitError, UntreatedOperatorError
from widerf.report import PATIENCE, Report, counted, listed, progress_bar
from widerf.survey.looking import heard, looking
from widerf.trace.scene import Scene
from widerf.trace.site import MapSite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAMPLES = 16


@dataclass(frozen=True)
class LayerView:
    """What the centre unit of one layer sees; lengths in input pixels, ``None`` where they are not known.

    Attributes:
        name: module name.
        kind: class of the module.
        map_size: positions of the layer's map per axis.
        jump: input pixels between neighbouring units.
        trf_size: size of the theoretical receptive field per axis; ``None`` where a global path shows the whole image.
        std: of the ERF, predicted.
        size: 2-sigma size of the ERF, predicted (:meth:`widerf.ERF.size`).
        used: ``size`` over the side of the theoretical field (root of its volume): the share that is used.
        clipped: share of the ERF that the image border cuts off or could have.
        silent: whether all that the last map gets of the layer goes through branches that are silent at these weights.
        std_measured: of the ERF, measured (``measure=``).
        note: why a figure is missing, or what should be known about it.
        field: the theoretical field.
        erf: the predicted ERF.
    """

    name: str
    kind: str
    map_size: tuple[int, ...]
    jump: tuple[float, ...] | None = None
    trf_size: tuple[int, ...] | None = None
    std: float | None = None
    size: float | None = None
    used: float | None = None
    clipped: float | None = None
    silent: bool = False
    std_measured: float | None = None
    note: str = ""
    field: ReceptiveField | None = dataclasses.field(default=None, repr=False, compare=False)
    erf: ERF | None = dataclasses.field(default=None, repr=False, compare=False)


def _percent(name: str) -> Callable[[LayerView], str | None]:
    def shown(row: LayerView) -> str | None:
        share = getattr(row, name)
        return None if share is None else f"{share:.0%}"

    return shown


@dataclass(frozen=True)
class Summary(Report[LayerView]):
    """What the layers of a network see; a sequence of :class:`LayerView` that prints as a table.

    ``summary["layer3"]`` is the row of that layer, ``summary["layer3"].erf`` its ERF; ``to_pandas()``, ``to_json()``
    and ``save("summary.csv")`` hand the rows on; ``plot()`` draws them against depth.

    Attributes:
        model: class of the network.
        input_size: ``(channels, *spatial)``.
    """

    model: str = ""
    input_size: tuple[int, ...] = ()
    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {
        "layer": "name",
        "kind": "kind",
        "map": "map_size",
        "jump": "jump",
        "theoretical": "trf_size",
        "ERF std": "std",
        "measured": "std_measured",
        "2σ size": "size",
        "used": _percent("used"),
        "clipped": lambda row: _percent("clipped")(row) if (row.clipped or 0) > CLIPPED_LIMIT else None,
        "silent": lambda row: row.silent or None,
        "note": "note",
    }

    def lines(self) -> list[str]:
        """Return what was looked at, and how far the last layer sees."""
        image = "×".join(map(str, self.input_size))
        last = self.rows[-1]
        said = [f"{self.model} at {image}: {counted(len(self.rows), 'layer')}; lengths in input pixels"]
        if last.std is not None and last.size is not None:
            field = "the whole image" if last.trf_size is None else "×".join(map(str, last.trf_size))
            name = last.name or "the output"
            said.append(f"last map ({name}): sees {field}, ERF std {last.std:.3g}, 2σ size {last.size:.3g}")
        return said

    def style(self, row: LayerView) -> str:
        """Return how a row looks in a terminal: silent layers dim, clipped ones and those without figures yellow."""
        if row.silent:
            return "dim"
        return "yellow" if row.std is None or (row.clipped or 0) > CLIPPED_LIMIT else ""

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the theoretical size and the ERF (2-sigma size, and two stds to either side) against depth.

        Args:
            ax: axes to draw on; by default those of a new figure.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib.figure import Figure

            width = max(6.0, 0.22 * len(self.rows))
            ax = Figure(figsize=(width, 4.2), layout="constrained").subplots()
        depth = range(len(self.rows))
        lines = {
            "theoretical size": [None if row.trf_size is None else mean_side(row.trf_size) for row in self.rows],
            "ERF, 2σ size": [row.size for row in self.rows],
            "ERF, 4 stds": [None if row.std is None else 4 * row.std for row in self.rows],
            "ERF, 4 stds, measured": [None if row.std_measured is None else 4 * row.std_measured for row in self.rows],
        }
        for (label, values), style in zip(lines.items(), ("C1-", "C4-o", "C0-o", "C2x"), strict=True):
            if any(value is not None for value in values):
                ax.plot(depth, [math.nan if v is None else v for v in values], style, ms=3, lw=1.2, label=label)
        silent = [index for index, row in enumerate(self.rows) if row.silent]
        for count, index in enumerate(silent):
            label = "_" if count else "in a silent branch"  # one entry in the legend
            ax.axvspan(index - 0.5, index + 0.5, color="0.5", alpha=0.15, lw=0, label=label)
        if self.input_size:
            ax.axhline(mean_side(self.input_size[1:]), color="0.5", lw=0.8, ls=":", label="the image")
        ax.set_xticks(list(depth), [row.name or "output" for row in self.rows], rotation=90, fontsize=6)
        ax.set_yscale("log", base=2)
        ax.set_ylabel("input pixels")
        ax.legend(fontsize="small")
        return ax


def mean_side(size: Sequence[float]) -> float:
    """Return the side of the cube that has the volume of a box.

    Example:
        >>> mean_side((4, 9))
        6.0
    """
    return float(math.prod(size) ** (1 / len(size)))


def summary(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    layers: Sequence[str | nn.Module] | None = None,
    measure: bool | int = False,
    progress: bool = False,
) -> Summary:
    """Tell for each layer of a network what its centre unit can see, and how much of that it uses.

    One forward pass is recorded as far as the last map; the theoretical fields of all layers are read off it in one
    walk, and each ERF is predicted by one backward pass over the recording. Every figure is that of
    :func:`widerf.receptive_field` and :func:`widerf.predict` for that layer.

    Args:
        model: any module that takes one tensor ``(batch, *input_size)``; it comes back as it was.
        input_size: ``(channels, *spatial)``, spatial rank 1 to 3.
        layers: modules or their names. By default those that change what is seen, on the way to the last spatial map:
            convolutions that have taps or strides, pooling, resampling, attention and other global paths, and blocks
            that join paths.
        measure: measure each layer's ERF as well, on that many N(0, 1) images (True: 16). A few passes a layer.
        progress: whether to show a progress bar, if it takes more than two seconds.

    Returns:
        One row a layer, in the order in which they run. An operator without a rule costs the figures of the layers
        behind it, which say so in their ``note``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: for an unknown layer, one without a spatial map, or an input size that the model refuses.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        >>> [(row.name, row.jump, row.trf_size) for row in summary(net, (3, 64, 64))]
        [('0', (2.0, 2.0), (7, 7)), ('2', (4.0, 4.0), (11, 11))]
    """
    require(isinstance(measure, int) and measure >= 0, "measure", "be True, False or a number of images", measure)
    require(not isinstance(layers, str | nn.Module), "layers", "be a list of layers", layers, TypeError)
    scene = Scene.over(model, input_size, layers)
    found = surveyed(scene, chosen=layers is not None, progress=progress)
    if measure:
        samples = _SAMPLES if measure is True else int(measure)
        rows = progress_bar(found.rows, shown=progress, what="measure", unit="layer", delay=PATIENCE)
        found = replace(found, rows=tuple(_with_measured(row, scene, samples) for row in rows))
    return found


def surveyed(scene: Scene, *, chosen: bool = True, progress: bool = False) -> Summary:
    """Summarise the maps of a scene; without ``chosen`` only those of layers that change what is seen."""
    tape = scene.tape
    sites = [site for site in scene.sites if site.name in tape.marks]
    readings = from_marks(tape, [site.name for site in sites])
    if not chosen:
        last = readings[scene.site.name]
        wanted = looking(tape, scene.model, last.result.global_paths if isinstance(last, Reading) else ())
        sites = [site for site in sites if site.name in wanted]
        if all(tape.marks[site.name] != tape.target for site in sites):
            sites.append(scene.site)
    silent = silent_branches(scene.model)
    alive = heard(tape, scene.model, silent)
    backward = Backward(tape, several=True)
    steps = progress_bar(sites, shown=progress, what="predict", unit="layer", delay=PATIENCE)
    rows = [_view(scene, backward, site, readings[site.name], tape.marks[site.name] not in alive) for site in steps]
    lost = [site.name for site in scene.sites if site.name not in tape.marks]
    return Summary(
        tuple(rows), tuple(_warnings(rows, silent, lost)), model=type(scene.model).__name__, input_size=scene.input_size
    )


def _view(
    scene: Scene, backward: Backward, site: MapSite, reading: Reading | UntreatedOperatorError, silent: bool
) -> LayerView:
    row = LayerView(site.name, type(site.module).__name__, site.spatial_shape, silent=silent)
    if isinstance(reading, UntreatedOperatorError):
        return replace(row, note=str(reading))
    own, found = scene.at(site), field_of(reading, scene.tape, site.name)
    frame = Frame.of(found, [own.unit])
    paths = f"sees the whole image by {listed(found.global_paths, 2)}" if found.global_paths else ""
    row = replace(row, jump=found.jump, trf_size=frame.trf_size, note=paths, field=found)
    try:
        erf = predicted(own, frame, warn=False, backward=backward)
    except (UntreatedOperatorError, DeadUnitError) as error:
        return replace(row, note="; ".join(filter(None, (paths, str(error)))))
    used = None if frame.trf_size is None else erf.size() / mean_side(frame.trf_size)
    return replace(row, std=erf.std, size=erf.size(), used=used, clipped=erf.clipped, erf=erf)


def _with_measured(row: LayerView, scene: Scene, samples: int) -> LayerView:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ClippedWarning)  # the column says it
            erf = measured(scene.model, scene.input_size, layer=row.name, samples=samples)
    except DeadUnitError as error:
        return replace(row, note="; ".join(filter(None, (row.note, f"not measured: {error}"))))
    return replace(row, std_measured=erf.std)


def _warnings(rows: Sequence[LayerView], silent: Mapping[str, float], lost: Sequence[str]) -> list[str]:
    said = []
    if silent:
        quiet = sum(row.silent for row in rows)
        said.append(
            f"silent at these weights: {counted(len(silent), 'branch', 'branches')} ({listed(list(silent))}), "
            f"with {counted(quiet, 'row')} of this table: they do not show in what follows until woken "
            "(timm: zero_init_last=False, ls_init_value=1.0)."
        )
    cut = [row.name or "the output" for row in rows if (row.clipped or 0) > CLIPPED_LIMIT]
    if cut:
        said.append(
            f"the image border cuts off part of the ERF of {listed(cut)}: their figures are those of a clipped map."
        )
    if lost:
        said.append(f"{listed(lost)}: the map does not depend on the input.")
    return said
