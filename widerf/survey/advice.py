"""What is wrong with a network's view, and the call that mends it, tried before it is proposed."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from widerf._checks import require
from widerf.conversion.swap import convert
from widerf.convolutions.branches import silent_branches
from widerf.convolutions.convolution import Convolution
from widerf.convolutions.places import Place, find_places
from widerf.convolutions.selection import find_convolutions
from widerf.erf.frame import Frame
from widerf.erf.map import CLIPPED_LIMIT, ERF
from widerf.erf.measurement import measure
from widerf.erf.prediction import predict, predicted
from widerf.erf.receptive import from_tape
from widerf.errors import ClippedWarning, UntreatedOperatorError
from widerf.init.advice import is_trained
from widerf.init.target import weigh
from widerf.report import PATIENCE, Report, counted, listed, progress_bar
from widerf.survey.findings import Finding, Look, Remedy, after, as_html, as_text, call_of, mended, waking
from widerf.survey.levers import Levers
from widerf.survey.structure import Skip, fine_layers, last_skip, off_the_map, skip_dominates, strided_grids
from widerf.survey.summary import mean_side
from widerf.trace.scene import Scene

if TYPE_CHECKING:
    from rich.console import RenderableType

_SIZE, _STD = "2σ size, input pixels", "ERF std, input pixels"
_LIMITING = 3


@dataclass(frozen=True)
class Advice(Report[Finding]):
    """What :func:`advise` found, the gravest first; ``advice["silent"]`` is the finding of that name.

    Attributes:
        layer: the map that was looked at.
        input_size: ``(channels, *spatial)``.
        object_size: side of the objects, input pixels.
        erf_size: 2-sigma size of the predicted ERF, input pixels.
        erf_std: its std.
    """

    layer: str = ""
    input_size: tuple[int, ...] = ()
    object_size: float | None = None
    erf_size: float | None = None
    erf_std: float | None = None
    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {
        "finding": "name", "what": "what", "how it is known": "how", "layers": lambda row: listed(row.layers),
        "call": "call", "figure": "figure", "now": "before", "after the call": "after",
    }  # fmt: skip

    def lines(self) -> list[str]:
        """Return what was looked at."""
        image = "×".join(map(str, self.input_size))
        said = [f"{self.layer or 'the output'} at {image}: {counted(len(self.rows), 'finding')}"]
        if self.erf_size is not None and self.erf_std is not None:
            said.append(f"predicted ERF: 2σ size {self.erf_size:.3g}, std {self.erf_std:.3g} input pixels")
        return said

    def style(self, row: Finding) -> str:
        """Return how a finding looks in a terminal: faults red, news green."""
        return "red" if row.fault else "green"

    def _rich_rows(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        shown = []
        for number, row in enumerate(self.rows, 1):
            text = Text(as_text(number, row, width))
            text.stylize(f"bold {self.style(row)}", 0, len(f"{number}. {row.name}:"))
            text.highlight_regex(r"(?m)(?<=^   do: ).*$", "cyan")
            shown.append(text)
        return Group(*shown)

    def __str__(self) -> str:
        blocks = [as_text(number, row) for number, row in enumerate(self.rows, 1)]
        return "\n".join([*self.lines(), *blocks, *(f"Warning: {text}" for text in self.warnings)])

    def _repr_html_(self) -> str:
        return as_html(self.lines(), self.rows)


def advise(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    object_size: float | None = None,
    layer: str | nn.Module | None = None,
    progress: bool = False,
) -> Advice:
    """Say what is wrong with what a network sees, how that is known, and which call mends it.

    Every proposed call is made on the model in a sandbox first; what it would give is what came out of that.

    Args:
        model: any module that takes one tensor ``(batch, *input_size)``; it comes back as it was.
        input_size: ``(channels, *spatial)``, spatial rank 1 to 3.
        object_size: side of the objects that a unit has to see, input pixels: the ERF's 2-sigma size is held against
            it.
        layer: module or its name; by default the last spatial map before global pooling.
        progress: whether to count the predictions on a progress bar, if it takes more than two seconds.

    Returns:
        The findings (:class:`widerf.survey.findings.Finding`), faults first.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if ``object_size`` is not positive, or the layer or the input size is none of the model's.

    Example:
        >>> net = nn.Sequential(*[nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4)])
        >>> advice = advise(net, (3, 48, 48), object_size=24)
        >>> advice["field_too_small"].call
        'widerf.convert(model, input_size=(3, 48, 48))'
        >>> advice["field_too_small"].after > 2 * advice["field_too_small"].before
        True
    """
    numeric = object_size is None or (isinstance(object_size, int | float) and not isinstance(object_size, bool))
    require(numeric, "object_size", "be a number of input pixels", object_size, TypeError)
    require(object_size is None or 0 < object_size < math.inf, "object_size", "be positive", object_size)
    scene = Scene.of(model, input_size, layer)
    look = _Network(scene, find_convolutions(model), layer)
    with progress_bar(shown=progress, what="try", unit="prediction", delay=PATIENCE) as look.bar:
        rows = sorted(look.findings(object_size), key=lambda row: not row.fault)
    return Advice(
        tuple(rows), (), layer=scene.site.name, input_size=scene.input_size, object_size=object_size,
        erf_size=None if look.erf is None else look.erf.size(), erf_std=None if look.erf is None else look.erf.std,
    )  # fmt: skip


class _Network:
    """One network under examination: recorded once, asked several questions."""

    def __init__(self, scene: Scene, kernels: list[Convolution], layer: str | nn.Module | None) -> None:
        self.scene, self.kernels, self.model, self.layer = scene, kernels, scene.model, layer
        self.silent = silent_branches(scene.model)
        self.trained = [name for name, module in scene.model.named_modules() if is_trained(module)]
        self.erf: ERF | None = None
        self.problem, self.bar = "", progress_bar(shown=False, what="", unit="")
        try:
            self.field = from_tape(scene.tape, scene.site.name)
            self.erf = predicted(scene, Frame.of(self.field, [scene.unit]), warn=False)
        except (UntreatedOperatorError, ValueError) as error:
            self.problem = str(error)

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Where each convolution lies."""
        return find_places(self.scene, self.kernels)

    @functools.cached_property
    def skip(self) -> Skip | None:
        """The last skip to the head of a U-Net, if most of the head's energy comes through it."""
        found = last_skip(self.scene)
        return found if found is not None and found.dominates else None

    @functools.cached_property
    def fine(self) -> list[str]:
        """The layers at that skip's resolution."""
        return [] if self.skip is None else fine_layers(self.skip, self.kernels, self.places)

    def size(self, model: nn.Module) -> float:
        return self._predicted(model).size()

    def std(self, model: nn.Module) -> float:
        return self._predicted(model).std

    def _predicted(self, model: nn.Module) -> ERF:
        layer = self.scene.site.name if self.layer is not None else None
        self.bar.update()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ClippedWarning)
            return predict(model, self.scene.input_size, layer=layer)

    def findings(self, object_size: float | None) -> Iterator[Finding]:
        if self.erf is None:
            yield Finding("not_predicted", f"the ERF cannot be predicted: {self.problem}", "the recording")
            return
        if self.silent:
            yield self._silence()
        yield from self._sufficiency(self.erf, object_size)
        yield from strided_grids(self.model, self.kernels)
        yield from off_the_map(self.scene, self.kernels, self.places)
        if self.skip is not None:
            yield skip_dominates(self.scene, self.skip, self.fine, self.std)
        if self.erf.clipped > CLIPPED_LIMIT and self.erf.trf_size is not None:
            yield self._clipping(self.erf)
        if self.field.global_paths:
            yield self._global_paths(self.erf)
        elif all(math.prod(kernel.kernel_size) == 1 for kernel in self.kernels):
            yield Finding(
                "only_pointwise", "no convolution has more than one tap: neither weights nor taps can widen anything",
                "kernel sizes of all convolutions", tuple(kernel.name for kernel in self.kernels),
                figure=_SIZE, before=self.erf.size(),
            )  # fmt: skip
        if self.trained:
            yield self._pretrained(self.erf)

    def _silence(self) -> Finding:
        assert self.erf is not None
        finding = Finding(
            "silent",
            f"{counted(len(self.silent), 'branch', 'branches')} scaled by 0, or nearly: what is there does not show",
            "scales of norms and layer scales", tuple(self.silent), figure=_STD, before=self.erf.std,
        )  # fmt: skip
        return finding if self.trained else mended(self.model, finding, waking(self.model, list(self.silent)), self.std)

    def _sufficiency(self, erf: ERF, wanted: float | None) -> Iterator[Finding]:
        if wanted is None:
            return
        size = erf.size()
        if size >= wanted:
            what = f"the ERF's 2σ size of {size:.3g} covers objects of {wanted:g} pixels"
            yield Finding(
                "covers", what, f"prediction at {self.scene.site.name or 'the output'}", figure=_SIZE, before=size
            )
            return
        side = math.inf if erf.trf_size is None else mean_side(erf.trf_size)
        name, what = "erf_too_small", f"the ERF's 2σ size is {size:.3g}, objects have {wanted:g} pixels"
        if side < wanted:
            name, what = "field_too_small", f"the theoretical field is {side:.3g}, objects have {wanted:g} pixels"
        limiting = tuple(self.silent) if self.silent else self._limiting()
        finding = Finding(name, what, "theoretical field and prediction", limiting, figure=_SIZE, before=size)
        yield self._levers().pull(finding, wanted)

    def _limiting(self) -> tuple[str, ...]:
        """The layers to whose widening the network's variance answers most."""
        found = weigh(self.scene, self.kernels)
        ranges = [kernel.variance_range() for kernel in found.kernels]
        spans = [(high - low) * w for (low, high), w in zip(ranges, found.weights, strict=True)]
        order = sorted(zip(spans, found.kernels, strict=True), key=lambda pair: -pair[0])
        return tuple(kernel.name for _, kernel in order[:_LIMITING])

    def _levers(self) -> Levers:
        """What can be pulled: weights; windows at a skip that dominates, where they show, where they are best, all."""
        groups: list[dict[str, Any]] = [*([{"only": self.fine}] if self.fine else []), {}, {"only": "*"}]
        return Levers(
            self.model, self.scene.input_size, list(self.silent), bool(self.trained), self.layer is None, groups,
            self.size,
        )  # fmt: skip

    def _clipping(self, erf: ERF) -> Finding:
        channels, *spatial = self.scene.input_size
        larger = (channels, *(2 * n for n in spatial))
        finding = Finding(
            "clipped", f"the border cuts off {erf.clipped:.0%} of the ERF: its figures are those of a clipped map",
            "the predicted map at the border, continued as far as the theoretical field", (self.scene.site.name,),
            figure="share of the ERF that is clipped", before=erf.clipped,
        )  # fmt: skip
        given = {} if self.layer is None else {"layer": self.scene.site.name}
        look: Look = lambda model: predict(model, larger, **given).clipped  # type: ignore[arg-type]  # noqa: E731
        told = "".join(f", {key}={value!r}" for key, value in given.items())
        return mended(self.model, finding, Remedy(f"widerf.predict(model, {larger}{told})", lambda model: None), look)

    def _global_paths(self, erf: ERF) -> Finding:
        paths = self.field.global_paths
        finding = Finding(
            "global_paths", f"a unit sees the whole image through {listed(paths, 2)}: there is no theoretical field to "
            "be small, and how far it looks is for measuring on real images (inputs=)",
            "the recorded operators", tuple(paths), figure=_STD, before=erf.std,
        )  # fmt: skip
        layer = {} if self.layer is None else {"layer": self.scene.site.name}
        remedy = call_of("measure", measure, input_size=self.scene.input_size, **layer, samples=8)
        found = after(self.model, Remedy("", lambda model: None), lambda model: remedy.run(model).std)  # type: ignore[attr-defined]
        return finding if found is None else replace(finding, call=remedy.text, after=found)

    def _pretrained(self, erf: ERF) -> Finding:
        finding = Finding(
            "pretrained", "the weights are trained: init.apply would re-weight what they learnt; convert, which keeps "
            "each weight in its part of the window, and fine-tune",
            "running statistics or shifts that have moved", tuple(self.trained), figure=_STD, before=erf.std,
        )  # fmt: skip
        remedy = call_of("convert", convert, pattern="stratified", input_size=self.scene.input_size)
        return mended(self.model, finding, remedy, self.std)
