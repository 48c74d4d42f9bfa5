"""Swap the convolutions of a model for sparse ones with the same weights, and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from widerf._checks import require, require_known
from widerf.conversion.report import ConversionReport, LayerConversion
from widerf.conversion.windows import SPARSE, early_layers, why_not, window_for
from widerf.convolutions.branches import silent_branches
from widerf.convolutions.convolution import Kernel
from widerf.convolutions.places import Place, find_places
from widerf.convolutions.selection import Selector, find_kernels, select
from widerf.convolutions.sensitivity import predicted_std
from widerf.patterns.named import NAMED
from widerf.report import listed
from widerf.sparse.layer import SparseConv
from widerf.trace.scene import Scene

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Step:
    """One convolution, what is known of it, and the layer that takes its place (None: it stays)."""

    kernel: Kernel
    row: LayerConversion
    layer: SparseConv | None = None


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
        problem = why_not(model, kernel) or kept.get(kernel.name)
        if problem is None and places is not None and place is None:
            problem = "not run on the way to the last map"
        if problem is None:
            # At one resolution the windows grow with depth: what the pilots found to help (docs/sparse.md).
            depth = running.index(kernel.name) / max(1, len(running) - 1) if level and kernel.name in running else 1.0
            window = window_for(kernel, extent, place, depth)
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
    scene = None if input_size is None else Scene.of(model, input_size)
    places = None if scene is None else find_places(scene, kernels)
    kept = early_layers(model, kernels, places or {}) if only is None else {}
    kept |= {k.name: "not in only" for k in kernels if k.name not in chosen} | dict.fromkeys(left, "in skip")
    steps = _steps(model, kernels, kept, places, extent, pattern, seed)
    pairs: dict[nn.Module, nn.Module] = {s.kernel.module: s.layer for s in steps if s.layer is not None}
    before, problem = (None, "") if scene is None else predicted_std(scene)
    weights = sum(p.numel() for p in model.parameters())
    with _swapped(model, pairs, stay=not dry_run):
        after = None
        if scene is not None and before is not None:
            after, problem = predicted_std(scene.changed(in_place=False))
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
        >>> from widerf import SparseConv2d
        >>> densify(nn.Sequential(SparseConv2d(4, 4, 3, padding=1)))[0]
        Conv2d(4, 4, kernel_size=(7, 7), stride=(1, 1), padding=(3, 3))
    """
    if isinstance(model, SparseConv):
        return model._to_dense()  # type: ignore[no-any-return]
    _swap(model, {m: m._to_dense() for m in model.modules() if isinstance(m, SparseConv)})
    return model
