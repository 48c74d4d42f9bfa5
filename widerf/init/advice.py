"""What a practitioner ought to know before he waits for a wider receptive field: the warnings of the initialiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from widerf.convolutions.branches import silent_branches
from widerf.convolutions.convolution import Convolution
from widerf.init.plan import Change
from widerf.init.report import LayerChange
from widerf.report import counted, listed

_STRONG = 0.75
_BORDER = 0.10
# Codes of verdicts that call for a warning, and what is said of the layers.
_BY_VERDICT = {
    "empty_periphery": "have an empty periphery, as Dirac or delta-orthogonal kernels do; base= draws them anew",
    "zero": "hold only zeros",
    "not_finite": "hold NaN or infinity",
    "overflow": "would leave the range of half precision; widen in float32, then convert",
    "emptied": "were at strength 1 already, which has emptied their inner taps; base= draws them anew",
    "parametrised": "are parametrised in a way that does not keep a profile",
    "not_lasting": "cannot have a lasting profile and were left alone; call again for them, without lasting=",
    "unknown_weight": "compute their weight in a way that widerf does not know",
    "frozen": "are frozen and were left alone; name them in only= to change them",
}


def has_seen_data(module: nn.Module) -> bool:
    """Return whether a normalisation's running statistics have moved from 0 and 1."""
    mean, variance = (module._buffers.get(f"running_{name}") for name in ("mean", "var"))
    if mean is None or variance is None or mean.is_meta:
        return False
    return bool((mean != 0).any()) or bool((variance != 1).any())


def has_learnt(module: nn.Module) -> bool:
    """Return whether a normalisation's shifts differ from channel to channel: no initialisation makes them so."""
    shift = module._parameters.get("bias")
    if "norm" not in type(module).__name__.lower() or shift is None or shift.is_meta or not shift.numel():
        return False
    return bool((shift != shift.flatten()[0]).any())


def is_trained(module: nn.Module) -> bool:
    """Return whether a normalisation shows that its network has been trained."""
    return has_seen_data(module) or has_learnt(module)


def of_scale(largest: float) -> str:
    """Return what is said of scales whose largest entry is ``largest``."""
    return "have scale 0" if largest == 0 else f"have scale {largest:g} at most"


def _foreign(kernels: Sequence[Convolution]) -> list[str]:
    """Return layers whose class has a forward of its own, which may do more than convolve with ``weight``."""
    names = []
    for kernel in kernels:
        home = next(cls for cls in type(kernel.module).__mro__ if "forward" in vars(cls))
        if not home.__module__.startswith(("torch.", "timm.layers.", "widerf.")):
            names.append(kernel.name)
    return names


def warnings_of(model: nn.Module, steps: Sequence[Change], rows: Sequence[LayerChange]) -> Iterator[str]:
    """Yield the warnings of a report, gravest first."""
    widened = [row.name for row in rows if row.widened]
    chosen = [step.kernel for step in steps if step.shape is not None]
    silent = silent_branches(model) if chosen else {}
    if silent:
        yield (
            f"residual branches are silent at initialisation: {listed(list(silent))} {of_scale(max(silent.values()))}. "
            "What is widened inside them does not move the network's ERF until training wakes them "
            "(timm: zero_init_last=False, ls_init_value=1.0)."
        )
    signs = {"running statistics have moved": has_seen_data, "shifts have been learnt": has_learnt} if chosen else {}
    found = {sign: [name for name, module in model.named_modules() if shows(module)] for sign, shows in signs.items()}
    sign, trained = next(((sign, names) for sign, names in found.items() if names), ("", []))
    if trained:
        yield (
            f"the network has been trained ({listed(trained)}: {sign}): what it learnt is "
            "re-weighted, too. Widen before training, or fine-tune afterwards."
        )
    for code, said in _BY_VERDICT.items():
        names = [row.name for row in rows if row.verdict.code == code]
        if names:
            yield f"{listed(names)} {said}."
    partly = [row.name for row in rows if "undone" in row.verdict.notes]
    if partly:
        yield f"{listed(partly)}: narrower branches of the same block put the energy back on the centre tap."
    foreign = [name for name in _foreign(chosen) if name in widened]
    if foreign:
        yield f"{listed(foreign)}: the class has a forward of its own; its weight is taken to be the kernel as it is."
    yield from _of_strength(steps, rows)


def _of_strength(steps: Sequence[Change], rows: Sequence[LayerChange]) -> Iterator[str]:
    stale = [step.kernel.name for step in steps if "stale" in step.remarks]
    if stale:
        yield (
            f"{listed(stale)}: widened by an earlier call and changed since (trained, loaded or drawn anew), so what "
            "is there was widened once more."
        )
    wide = [step.kernel.name for step in steps if "wide" in step.remarks and "stale" not in step.remarks]
    if wide:
        yield (
            f"{listed(wide)}: wider than uniform weights before this call, as if widened already or trained; "
            "widened from there. Pass base= to start afresh."
        )
    strong = [row.name for row in rows if row.strength is not None and row.strength > _STRONG]
    if strong:
        yield (
            f"strength above {_STRONG:g} in {listed(strong)}: the inner taps are nearly empty, and at 1 only every "
            "second pixel is reached; the ERF's std still grows, but fewer pixels are seen and the map aliases."
        )
    borders = [(row.border_after, row.border_before, row.name) for row in rows if row.border_after is not None]
    lost = [(after, before or 0.0, name) for after, before, name in borders if after is not None and after > _BORDER]
    if lost:
        after, before, name = max(lost)
        yield (
            f"zero padding takes more than {_BORDER:.0%} of the signal energy in {counted(len(lost), 'layer')}, "
            f"most in {name}: {after:.0%} (before: {before:.0%})."
        )
