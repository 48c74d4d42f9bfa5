"""Swap the convolutions of a model for sparse ones with the same weights, and back."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import nn

from widerf._checks import require, require_known
from widerf.advice import listed, silent_branches
from widerf.convolutions import Kernel, Selector, find_kernels, select
from widerf.network import Place, find_places
from widerf.patterns import NAMED
from widerf.report import Report
from widerf.sparse import SparseConv1d, SparseConv2d, SparseConv3d
from widerf.sparse_layer import SparseConv, why_not_plain

SPARSE: dict[type[nn.Module], type[SparseConv]] = {
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
}
# Methods of blocks that rebuild a plain convolution from its weight alone: they would lose the offsets without a word.
FUSING = ("fuse", "fuse_model", "reparameterize", "switch_to_deploy", "convert_to_deploy", "get_equivalent_kernel_bias")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LayerConversion:
    """What `convert` did to one convolution.

    Attributes:
        name: module name.
        kind: class of the layer before.
        kernel_size: taps per axis.
        extent: side of the window per axis; None if left dense.
        jump: input pixels of the network between neighbouring units of the layer's input (with ``input_size``).
        map_size: spatial shape of the layer's input (with ``input_size``).
        pattern_groups: groups of input channels with taps of their own.
        channels_per_cell: fewest and most input channels that read a cell of the window.
        verdict: "sparse", or why it was left dense.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    extent: tuple[int, ...] | None = None
    jump: tuple[float, ...] | None = None
    map_size: tuple[int, ...] | None = None
    pattern_groups: int | None = None
    channels_per_cell: tuple[int, int] | None = None
    verdict: str = "sparse"

    @property
    def converted(self) -> bool:
        """Whether the layer is sparse now (with ``dry_run``: would be)."""
        return self.verdict == "sparse"


@dataclass(frozen=True)
class ConversionReport(Report[LayerConversion]):
    """What `convert` did, layer by layer; prints as a table.

    Attributes:
        gain: predicted std of the network's ERF, after over before (with ``input_size``).
        erf_std: those two, before and after, in input pixels.
        weights: number of parameters, before and after.
        multiplications: of all convolutions for one input, before and after (with ``input_size``).
        dry_run: whether the model was left as it was.
    """

    gain: float | None = None
    erf_std: tuple[float, float] | None = None
    weights: tuple[int, int] | None = None
    multiplications: tuple[int, int] | None = None
    dry_run: bool = False
    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {
        "layer": "name",
        "kind": "kind",
        "kernel": "kernel_size",
        "extent": "extent",
        "jump": "jump",
        "map": "map_size",
        "pattern groups": "pattern_groups",
        "verdict": "verdict",
    }

    def lines(self) -> list[str]:
        """Return how many layers were converted, and what that does to the network."""
        changed = sum(row.converted for row in self.rows)
        would = "would become sparse (dry run)" if self.dry_run else "became sparse"
        said = [f"{changed} of {len(self.rows)} convolutions {would}"]
        if self.weights is not None:
            said.append(f"weights: {self.weights[0]:,} before, {self.weights[1]:,} after")
        if self.multiplications is not None:
            said.append("multiplications: {:,} before, {:,} after".format(*self.multiplications))
        if self.erf_std is not None and self.gain is not None:
            said.append("predicted ERF std: {:.2f} to {:.2f} pixels".format(*self.erf_std) + f", ×{self.gain:.3f}")
        return said


@dataclass(frozen=True)
class _Step:
    """One convolution, what is known of it, and the layer that takes its place (None: it stays)."""

    kernel: Kernel
    row: LayerConversion
    layer: SparseConv | None = None


def _odd(n: float) -> int:
    """Return the largest odd integer up to ``n``."""
    return int(n) - (int(n) + 1) % 2


def automatic_extent(kernel_size: Sequence[int], map_size: Sequence[int], depth: float = 1.0) -> tuple[int, ...]:
    """Return the extent of a layer from its map: two thirds of the map at most, and 4k + 3 (15 for a 3×3) at most.

    A window that hangs far over the border spends its taps on zeros; one that is as wide as the map leaves nothing to
    the layers above. Axes on which the kernel has one tap keep one cell. ``depth`` < 1 scales the reach of the window
    between 2k + 1 and that.

    Example:
        >>> [automatic_extent((3, 3), (n, n)) for n in (56, 28, 14, 7)]
        [(15, 15), (15, 15), (9, 9), (5, 5)]
        >>> automatic_extent((1, 7), (28, 28))
        (1, 19)
    """
    widths = []
    for k, n in zip(kernel_size, map_size, strict=True):
        most = min(4 * k + 3, 2 * n / 3 + 1)
        least = min(2 * k + 1, most)
        wanted = least * (most / least) ** depth
        widths.append(1 if k == 1 else max(k, _odd(wanted) + (k + 1) % 2))
    return tuple(widths)


def _fusing_parent(model: nn.Module, name: str) -> str | None:
    """Return the nearest block around ``name`` that has a method which rebuilds plain convolutions."""
    path = name.split(".")
    for end in range(len(path) - 1, -1, -1):
        block = model.get_submodule(".".join(path[:end]))
        for method in FUSING:
            if callable(getattr(block, method, None)):
                return f"{type(block).__name__}.{method}() would rebuild it as a plain convolution"
    return None


def _why_not(model: nn.Module, kernel: Kernel) -> str | None:
    """Return why a convolution cannot be made sparse, whatever the user wants, or None."""
    module: Any = kernel.module
    if isinstance(module, SparseConv):
        return "sparse already"
    if kernel.transposed:
        return "transposed"
    dense = next((kind for kind in SPARSE if isinstance(module, kind)), None)
    if dense is None:
        return f"{type(module).__name__} is no plain convolution"
    problem = why_not_plain(module, dense)  # type: ignore[arg-type]
    if problem is not None:
        return problem
    if all(k == 1 for k in kernel.kernel_size):
        return "1×1 kernel: no taps to move"
    if all(s >= d * k for k, s, d in zip(kernel.kernel_size, kernel.stride, kernel.dilation, strict=True)):
        return "patchify (stride ≥ kernel)"
    return _fusing_parent(model, kernel.name)


def _early(model: nn.Module, kernels: Sequence[Kernel], places: Mapping[str, Place]) -> dict[str, str]:
    """Return the stem and the layers of the first stage, with the reason to leave them dense.

    By jump, where that is known: the first stage is that of the second spatial layer, and all below an eighth of the
    last jump. If no layer has a larger jump than the first stage, it is the first half of the layers. Without jumps:
    the first convolution, and what timm's ``feature_info`` counts to the first quarter of the resolution.
    """
    spatial = [k for k in kernels if max(k.kernel_size) > 1]
    early = {k.name: "the stem stays dense" for k in spatial[:1]}
    running = [(name, min(p.jump)) for name, p in places.items() if p.jump and name in {k.name for k in spatial}]
    if running:
        early = {running[0][0]: "the stem stays dense"}
        last = max(jump for _, jump in running)
        first = max(running[min(1, len(running) - 1)][1], last / 8)
        stage = [name for name, jump in running if jump <= first]
        if first >= last:
            stage = [name for name, _ in running[: len(running) // 2]]
        return {**dict.fromkeys(stage, "the first stage stays dense"), **early}
    info = getattr(model, "feature_info", None) or []
    info = [i for i in info if isinstance(i, dict) and i.get("reduction", 99) <= 4]
    fronts = [str(i.get("module", "")) for i in info]
    stage = [k.name for k in spatial if any(f and (k.name == f or k.name.startswith(f + ".")) for f in fronts)]
    return {**dict.fromkeys(stage, "the first stage stays dense"), **early}


def _extent(kernel: Kernel, wanted: int | None, place: Place | None, depth: float) -> tuple[int, ...] | None:
    """Return the window of a layer, never wider than its map; None if that is no wider than the kernel."""
    if wanted is None:
        assert place is not None
        extent = automatic_extent(kernel.kernel_size, place.before, depth)
    else:
        extent = tuple(1 if k == 1 else max(k, wanted) for k in kernel.kernel_size)
    if place is not None:
        fits = [
            s if s <= n else n - (n - k) % 2 for s, n, k in zip(extent, place.before, kernel.kernel_size, strict=True)
        ]
        extent = tuple(max(k, s) for k, s in zip(kernel.kernel_size, fits, strict=True))
    return None if extent == kernel.kernel_size else extent


def _seed(seed: int, name: str) -> int:
    """Return a seed for each layer that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "big")


def _steps(
    model: nn.Module,
    kernels: Sequence[Kernel],
    kept: Mapping[str, str],
    places: Mapping[str, Place] | None,
    extent: int | None,
    pattern: str,
    seed: int,
) -> list[_Step]:
    """Decide on every convolution and build the layers that will take their places; the model stays as it is."""
    running = [name for name, place in (places or {}).items() if place.jump is not None]
    level = len({min(places[name].jump or ()) for name in running}) == 1 if places else False
    steps = []
    for kernel in kernels:
        place = None if places is None else places.get(kernel.name)
        row = LayerConversion(kernel.name, kernel.kind, kernel.kernel_size)
        if place is not None:
            row = replace(row, jump=place.jump, map_size=place.before)
        problem = _why_not(model, kernel) or kept.get(kernel.name)
        if problem is None and places is not None and place is None:
            problem = "not run on the way to the last map"
        if problem is None:
            # At one resolution the windows grow with depth: what the pilots found to help (docs/sparse.md).
            depth = running.index(kernel.name) / max(1, len(running) - 1) if level and kernel.name in running else 1.0
            window = _extent(kernel, extent, place, depth)
            problem = "its kernel is as wide as the window" if window is None else None
        if problem is not None or window is None:
            steps.append(_Step(kernel, replace(row, verdict=problem or "")))
            continue
        kind = next(sparse for dense, sparse in SPARSE.items() if isinstance(kernel.module, dense))
        layer = kind._from_dense(kernel.module, window, pattern, _seed(seed, kernel.name))
        row = replace(row, extent=window, pattern_groups=len(layer.offsets), channels_per_cell=layer.readers())
        steps.append(_Step(kernel, row, layer))
    return steps


def _swap(model: nn.Module, pairs: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the places of old ones, wherever they are held."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and child in pairs:
                module._modules[name] = pairs[child]


@contextmanager
def _swapped(model: nn.Module, pairs: Mapping[nn.Module, nn.Module], stay: bool) -> Iterator[None]:
    """Swap for the time of the block, or for good if ``stay`` and nothing goes wrong."""
    _swap(model, pairs)
    try:
        yield
    except BaseException:
        stay = False
        raise
    finally:
        if not stay:
            _swap(model, {new: old for old, new in pairs.items()})


def _predicted(model: nn.Module, input_size: Sequence[int] | None) -> tuple[float | None, str]:
    """Return the predicted std of the network's ERF, or None and why there is none."""
    if input_size is None:
        return None, ""
    from widerf.prediction import predict

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            std = float(predict(model, tuple(input_size)).std)
        except (NotImplementedError, ValueError) as error:
            return None, f"the ERF cannot be predicted: {error}"
    clipped = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return std, (f"the ERF's gain is understated: {clipped[0]}" if clipped else "")


def _silence(model: nn.Module) -> str:
    """Say that residual branches are silent, where a change in them cannot show in the ERF yet."""
    silent = silent_branches(model)
    if not silent:
        return ""
    names = listed(list(silent))
    return (
        f"{len(silent)} residual branches are (nearly) silent at these weights ({names}): "
        "what the sparse layers in them do to the ERF shows only as they are trained"
    )


def _multiplications(steps: Sequence[_Step], places: Mapping[str, Place], sparse: bool) -> int:
    """Count the multiplications of all convolutions that run, one input."""
    total = 0
    for step in steps:
        module: Any = step.layer if sparse and step.layer is not None else step.kernel.module
        place = places.get(step.kernel.name)
        if place is None or step.kernel.transposed or not hasattr(module, "groups"):
            continue
        taps = module.offsets.shape[1] if isinstance(module, SparseConv) else math.prod(module.kernel_size)
        total += math.prod(place.after) * module.out_channels * (module.in_channels // module.groups) * taps
    return total


def convert(
    model: nn.Module,
    *,
    extent: int | None = None,
    pattern: str = "mixed",
    only: Selector = None,
    skip: Selector = None,
    input_size: Sequence[int] | None = None,
    seed: int = 0,
    dry_run: bool = False,
) -> ConversionReport:
    """Replace convolutions of ``model`` by sparse ones, in place; weights and checkpoints carry over.

    The new layers hold the very parameters of the old ones: optimisers go on, checkpoints of the plain model load,
    and the number of weights and multiplications stays. Each weight goes to the sparse tap that is the partner of its
    dense tap (`widerf.patterns.match_dense`). Outputs change, so a trained model needs fine-tuning.

    Left dense unless ``only`` names them: the stem and the first stage (early layers want local taps; recognised by
    the jump with ``input_size``, else by timm's ``feature_info``). Left dense always: 1×1 and patchify kernels,
    transposed convolutions, subclasses with a forward of their own, computed weights, layers with hooks, and layers
    in a block that can fuse itself into a plain convolution, which would lose the offsets (fuse first, then convert).

    Args:
        model: any module.
        extent: side of the windows; None chooses one for each layer from its map (`automatic_extent`), which needs
            ``input_size``. Never wider than the map, if that is known; axes with one tap keep one cell.
        pattern: a name of `widerf.patterns`.
        only: name patterns or module classes; nothing else is converted.
        skip: name patterns or module classes that stay dense.
        input_size: ``(channels, *spatial)`` of one input; with it the report has maps, jumps and the predicted ERF.
        seed: each layer draws its pattern by this and its name: the same in every process.
        dry_run: report only; the model stays as it is.

    Returns:
        what was done to each convolution and why not, weights, multiplications and ERF before and after.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the model has no convolution, a pattern is unknown, a selector matches nothing, ``extent`` is
            not positive, or neither ``extent`` nor ``input_size`` is given. Then nothing has been changed.

    Example:
        >>> net = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
        >>> report = convert(net, extent=9)
        >>> [row.verdict for row in report]
        ['the stem stays dense', 'sparse', 'sparse', 'sparse']
        >>> densify(net)[1].kernel_size
        (9, 9)
    """
    require_known(pattern, NAMED, "pattern")
    kernels = find_kernels(model)
    require(bool(kernels), "model", "hold at least one convolution", type(model).__name__)
    require(extent is not None or input_size is not None, "input_size", "be given if extent is not", input_size)
    if extent is not None:
        require(isinstance(extent, int), "extent", "be an integer", extent, TypeError)
        require(extent >= 1, "extent", "be positive", extent)
    chosen = {k.name for k in kernels} if only is None else select(kernels, model, only, "only")
    left = set() if skip is None else select(kernels, model, skip, "skip")
    places = None if input_size is None else find_places(model, input_size, kernels)
    kept = _early(model, kernels, places or {}) if only is None else {}
    kept |= {k.name: "not in only" for k in kernels if k.name not in chosen} | dict.fromkeys(left, "in skip")
    steps = _steps(model, kernels, kept, places, extent, pattern, seed)
    pairs: dict[nn.Module, nn.Module] = {s.kernel.module: s.layer for s in steps if s.layer is not None}
    before, problem = _predicted(model, input_size)
    weights = sum(p.numel() for p in model.parameters())
    with _swapped(model, pairs, stay=not dry_run):
        after, problem = _predicted(model, input_size) if before is not None else (None, problem)
        known = before is not None and after is not None
        return ConversionReport(
            tuple(step.row for step in steps),
            tuple(note for note in (problem, _silence(model) if before is not None else "") if note),
            gain=after / before if known and before and after is not None else None,
            erf_std=(before, after) if before is not None and after is not None else None,
            weights=(weights, sum(p.numel() for p in model.parameters())),
            multiplications=None
            if places is None
            else (_multiplications(steps, places, False), _multiplications(steps, places, True)),
            dry_run=dry_run,
        )


def densify(model: Model) -> Model:
    """Replace every sparse convolution by its exact dense twin, in place, and return the model.

    The twins have S^D taps with new weights, zero where no tap lies: more work, the same output. Use it to export, to
    quantise, or to hand a model to code that knows plain convolutions only. A model that is itself a sparse layer
    comes back as a new module.

    Example:
        >>> densify(nn.Sequential(SparseConv2d(4, 4, 3, padding=1)))[0]
        Conv2d(4, 4, kernel_size=(7, 7), stride=(1, 1), padding=(3, 3))
    """
    if isinstance(model, SparseConv):
        return model._to_dense()  # type: ignore[no-any-return]
    _swap(model, {m: m._to_dense() for m in model.modules() if isinstance(m, SparseConv)})
    return model
