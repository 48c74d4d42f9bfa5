"""Swap the convolutions of a model for sparse ones with the same weights, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from widerf._checks import require
from widerf.conversion.exchange import exchange
from widerf.conversion.growth import TOLERANCE, Windows, windows_for_gain
from widerf.conversion.plan import Step, Taps, build, decide, multiplications, windows
from widerf.conversion.report import ConversionReport
from widerf.conversion.tail import BLOCK, NEAR, WIDE, Design, design_for, mixture
from widerf.convolutions.branches import silent_branches
from widerf.convolutions.places import find_places
from widerf.convolutions.selection import Selector, find_convolutions, select
from widerf.convolutions.sensitivity import predicted_erf
from widerf.patterns.named import Mixture, check_named
from widerf.report import listed
from widerf.sparse.layer import SparseConv
from widerf.sparse.offsets import check_block
from widerf.trace.scene import Scene

if TYPE_CHECKING:
    from widerf.erf.map import ERF

Model = TypeVar("Model", bound=nn.Module)
_BARELY = 1.02  # gain below which sparse layers do not show
_CROWDED = 0.05  # share of the ERF beyond the border above which the image leaves it little room to grow


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


def _notes(report: ConversionReport, model: nn.Module, problem: str) -> tuple[str, ...]:
    """Return what a person has to be told beside the figures."""
    notes = [problem] if problem else []
    silence = _silence(model) if report.gain is not None else ""
    if silence:
        notes.append(silence)
    elif not problem and report.gain is not None and report.gain < _BARELY and any(row.converted for row in report):
        notes.append(
            "the sparse layers barely show in the ERF of the last map: paths that pass them by (skips at full "
            "resolution, layers that stayed dense) carry nearly all of its energy"
        )
    if report.target is not None and report.gain is not None and abs(report.gain / report.target - 1) > TOLERANCE:
        notes.append(f"no windows of whole cells come nearer to the target ×{report.target:g} than ×{report.gain:.3f}")
    wanted = report.target_kurtosis
    if wanted is not None and report.erf_kurtosis is not None and abs(report.erf_kurtosis[1] - wanted) > NEAR:
        told = f"{report.erf_kurtosis[1]:.2f}"
        notes.append(f"no share of wide channels comes nearer to the excess kurtosis {wanted:g} than {told}")
    return tuple(notes)


def _check(
    model: nn.Module, extent: Any, target: Any, kurtosis: Any, block: Any, pattern: Any, input_size: Any
) -> None:
    if pattern is not None:
        check_named(pattern)
    check_block(block)
    if extent is not None:
        require(isinstance(extent, int), "extent", "be an integer", extent, TypeError)
        require(extent >= 1, "extent", "be positive", extent)
    if target is not None:
        require(isinstance(target, (int, float)), "target", "be a number", target, TypeError)
        require(1 < target < float("inf"), "target", "be a ratio above 1", target)
        require(extent is None, "extent", "not be given with target, which chooses it", extent)
        require(input_size is not None, "input_size", "be given with target", input_size)
    if kurtosis is not None:
        require(isinstance(kurtosis, (int, float)), "kurtosis", "be a number", kurtosis, TypeError)
        require(math.isfinite(kurtosis), "kurtosis", "be finite", kurtosis)
        require(target is not None, "target", "be given with kurtosis", target)
        rule = "be one name with kurtosis, which chooses the mixture"
        require(pattern is None or isinstance(pattern, str), "pattern", rule, pattern)
    require(extent is not None or input_size is not None, "input_size", "be given if extent is not", input_size)


def _pairs(steps: Sequence[Step]) -> dict[nn.Module, nn.Module]:
    return {step.kernel.module: step.layer for step in steps if step.layer is not None}


def _anew(scene: Scene) -> Scene:
    """Return the scene after modules were swapped: the one that makes the map may be another now."""
    site = replace(scene.site, module=scene.model.get_submodule(scene.site.name))
    return replace(scene.changed(in_place=False), site=site)


def _erf_with(scene: Scene, steps: Sequence[Step], taps: Taps, extents: Windows) -> ERF | None:
    """Return the ERF that is predicted with these windows, which are in place only meanwhile."""
    pairs = _pairs(build(steps, extents, taps))
    return exchange(scene.model, pairs, lambda: predicted_erf(_anew(scene)), stay=False)[0]


def _windows_for(scene: Scene, steps: Sequence[Step], taps: Taps, before: ERF | None, target: float) -> Windows:
    """Return the windows whose predicted gain is the target."""

    def gain_of(extents: Windows) -> float | None:
        after = _erf_with(scene, steps, taps, extents)
        return None if after is None or before is None or before.std == 0 else float(after.std / before.std)

    clipped = 0.0 if before is None else before.clipped
    why = f" (its border cuts off {clipped:.0%} of the ERF today: a larger input_size has more room)"
    silence = _silence(scene.model)
    remark = f" ({silence})" if silence else why if clipped > _CROWDED else ""
    return windows_for_gain(steps, gain_of, target, remark)


def _designed(
    scene: Scene, steps: Sequence[Step], taps: Taps, before: ERF | None, target: float, kurtosis: float | None
) -> tuple[Taps, Windows]:
    """Return the taps and the windows that give the predicted ERF its width and, if one is wanted, its tail."""
    if kurtosis is None:
        return taps, _windows_for(scene, steps, taps, before, target)

    def mixed(share: float) -> Taps:
        return replace(taps, pattern=mixture(taps.pattern or WIDE, share), block=taps.block or BLOCK)

    def search(share: float) -> Design:
        extents = _windows_for(scene, steps, mixed(share), before, target)
        erf = _erf_with(scene, steps, mixed(share), extents)
        assert before is not None  # they gave the gain
        assert erf is not None
        met = abs(erf.std / before.std / target - 1) <= TOLERANCE
        return Design(share, extents, float(erf.excess_kurtosis), bool(met))

    best = design_for(search, kurtosis)
    return mixed(best.share), best.windows


def convert(
    model: nn.Module,
    *,
    extent: int | None = None,
    pattern: str | Mixture | None = None,
    target: float | None = None,
    kurtosis: float | None = None,
    block: int | None = None,
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
    that a block around them can still fuse into a plain convolution, which would lose the offsets (fuse first, then
    convert). Whether it still can is tried on a copy of the block; blocks that hold ``model`` itself are sought too.

    A layer keeps its stride and its dilation, which spreads the cells of its window. No grid gets a spacing that shares
    a factor with the stride: it would read a part of its map only.

    Args:
        model: any module.
        extent: side of the windows, in cells; None chooses one for each layer from its map (`automatic_extent`), which
            needs ``input_size``. With its dilation never wider than the map, if that is known; axes with one tap keep
            one cell.
        pattern: a name of `widerf.patterns`, or a list of (name or function, share of the channels); None takes that of
            `widerf.patterns.default_pattern` for each kind of layer.
        target: wanted ratio of the predicted std of the network's ERF to today's. The windows grow with depth, by as
            little as gives it within 3 per cent.
        kurtosis: wanted excess kurtosis of the predicted ERF, with ``target``: above 0 for a tail that is heavier than
            a Gaussian's. Some channels stay dense and the others take ``pattern`` (None: ``partition``) in wider
            windows; their share is chosen to come within 0.1 of it, in blocks of 16 channels if ``block`` says nothing.
            It takes about five times as long.
        block: neighbouring channels that share their taps at most, a multiple of 16; None: see `widerf.SparseConv2d`.
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
            not positive, neither ``extent`` nor ``input_size`` is given, or ``target`` or ``kurtosis`` is out of reach
            (the message names what is possible). Whatever is raised, KeyboardInterrupt included: nothing has been
            changed then.

    Example:
        >>> net = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
        >>> report = convert(net, extent=9)
        >>> [row.verdict for row in report]
        ['the stem stays dense', 'sparse', 'sparse', 'sparse']
        >>> densify(net)[1].kernel_size
        (9, 9)
    """
    _check(model, extent, target, kurtosis, block, pattern, input_size)
    kernels = find_convolutions(model)
    require(bool(kernels), "model", "hold at least one convolution", type(model).__name__)
    chosen = {k.name for k in kernels} if only is None else select(kernels, model, only, "only")
    skipped = set() if skip is None else select(kernels, model, skip, "skip")
    left = {k.name: "not in only" for k in kernels if k.name not in chosen} | dict.fromkeys(skipped, "in skip")
    scene = None if input_size is None else Scene.of(model, input_size)
    places = None if scene is None else find_places(scene, kernels)
    steps, taps = decide(model, kernels, left, places, early=only is None), Taps(pattern, block, seed)
    before, problem = (None, "") if scene is None else predicted_erf(scene)
    if target is None or scene is None:
        extents: Any = windows(steps, extent)
    else:
        taps, extents = _designed(scene, steps, taps, before, target, kurtosis)
    steps = build(steps, extents, taps)
    weights = sum(p.numel() for p in model.parameters())

    def tell() -> ConversionReport:
        after, trouble = None, problem
        if scene is not None and before is not None:
            after, trouble = predicted_erf(_anew(scene))
        erfs = None if before is None or after is None else (before, after)
        report = ConversionReport(
            tuple(step.row for step in steps),
            gain=None if erfs is None or erfs[0].std == 0 else float(erfs[1].std / erfs[0].std),
            erf_std=None if erfs is None else (float(erfs[0].std), float(erfs[1].std)),
            erf_kurtosis=None if erfs is None else (float(erfs[0].excess_kurtosis), float(erfs[1].excess_kurtosis)),
            target=target,
            target_kurtosis=kurtosis,
            weights=(weights, sum(p.numel() for p in model.parameters())),
            multiplications=None if places is None else (multiplications(steps, False), multiplications(steps, True)),
            dry_run=dry_run,
        )
        return replace(report, warnings=_notes(report, model, trouble))

    return exchange(model, _pairs(steps), tell, stay=not dry_run)


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
        return model.to_dense()  # type: ignore[no-any-return]
    twins: dict[nn.Module, nn.Module] = {m: m.to_dense() for m in model.modules() if isinstance(m, SparseConv)}
    exchange(model, twins, lambda: None)
    return model
