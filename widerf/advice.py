"""What a practitioner ought to know before he waits for a wider receptive field: the warnings of the initialiser."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from widerf.convolutions import Kernel
from widerf.rescale import LayerChange, Step

_SILENT = 1e-3  # a branch scaled by less moves nothing at initialisation
_SCALE = re.compile(r"gamma|layer_?scale|res_?scale|skip_?init|^ls\d?$|scale_?\d?$", re.IGNORECASE)
_STRONG = 0.75
_FUSES = ("reparameterize", "fuse", "switch_to_deploy", "reparametrize")
_BRANCHES = ("identity", "rbr_identity", "skip")
_BORDER = 0.10
# Verdicts that call for a warning: how they begin, and what is said of the layers.
_BY_VERDICT = (
    (
        "left alone: empty periphery",
        "have an empty periphery, as Dirac or delta-orthogonal kernels do; base= draws them anew",
    ),
    ("left alone: all its weights are zero", "hold only zeros"),
    ("left alone: its weights are not finite", "hold NaN or infinity"),
    (
        "left alone: at strength 1",
        "were at strength 1 already, which has emptied their inner taps; base= draws them anew",
    ),
    ("left alone: parametrised", "are parametrised in a way that does not keep a profile"),
    ("left alone: its weight is not", "compute their weight in a way that widerf does not know"),
    ("frozen", "are frozen and were left alone; name them in only= to change them"),
)


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names and how many there are.

    Example:
        >>> listed(["a", "b", "c"], 2)
        'a, b, … (3 in all)'
    """
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")


def of_scale(largest: float) -> str:
    """Return what is said of scales whose largest entry is ``largest``."""
    return "have scale 0" if largest == 0 else f"have scale {largest:g} at most"


def silent_branches(model: nn.Module) -> dict[str, float]:
    """Return the scales that silence a branch: name of norm or layer scale → its largest entry.

    A normalisation whose scale is 0 ends a residual branch that ``zero_init_last`` silences; layer scales of 1e-6 are
    found by the name of their parameter.
    """
    found = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            norm = key == "weight" and "norm" in type(module).__name__.lower()
            if parameter is None or not (norm or _SCALE.search(key)) or not _readable(parameter):
                continue
            largest = float(parameter.detach().abs().max())
            if largest <= _SILENT:
                found[f"{name}.{key}".lstrip(".")] = largest
    return found


def _readable(parameter: Tensor) -> bool:
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return not lazy and not parameter.is_meta and parameter.numel() > 0 and parameter.is_floating_point()


def undone(model: nn.Module, kernels: Sequence[Kernel]) -> dict[str, str]:
    """Return the kernels that share a re-parametrised block with narrower branches, and what undoes the widening.

    RepVGG, MobileOne and their kin add a k×k, a 1×1 and an identity branch and fuse them afterwards: the narrow ones
    put their energy on the centre tap. Such a block is known by its method that fuses, and by a sibling of equal
    channels.
    """
    convolutions = {kernel.name: kernel for kernel in kernels}
    notes: dict[str, str] = {}
    for name, block in model.named_modules():
        if not name or not any(hasattr(type(block), method) for method in _FUSES):
            continue
        inside = [kernel for path, kernel in convolutions.items() if path.startswith(f"{name}.")]
        identity = [key for key in _BRANCHES if isinstance(getattr(block, key, None), nn.Module)]
        for kernel in inside if len(inside) <= 12 else []:
            narrow = [other for other in inside if _narrower(other, kernel)]
            if kernel.nothing_to_gain() is None and (narrow or (identity and len(inside) == 1)):
                parts = sorted({"×".join(map(str, other.kernel_size)) for other in narrow}) + identity[:1]
                branches = " and ".join(parts) + (" branches" if len(parts) > 1 else " branch")
                notes.setdefault(kernel.name, f"undone in part: the {branches} of its block add to its centre")
    return notes


def _narrower(other: Kernel, kernel: Kernel) -> bool:
    same = all(
        getattr(other.module, key, None) == getattr(kernel.module, key, None) for key in ("in_channels", "out_channels")
    )
    if other.rank != kernel.rank or not same:
        return False
    smaller = all(a <= b for a, b in zip(other.kernel_size, kernel.kernel_size, strict=True))
    return smaller and other.kernel_size != kernel.kernel_size and other.stride == kernel.stride


def _foreign(kernels: Sequence[Kernel]) -> list[str]:
    """Return layers whose class has a forward of its own, which may do more than convolve with ``weight``."""
    names = []
    for kernel in kernels:
        home = next(cls for cls in type(kernel.module).__mro__ if "forward" in vars(cls))
        if not home.__module__.startswith(("torch.", "timm.layers.", "widerf.")):
            names.append(kernel.name)
    return names


def warnings_of(model: nn.Module, steps: Sequence[Step], rows: Sequence[LayerChange]) -> Iterator[str]:
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
    for start, said in _BY_VERDICT:
        names = [row.name for row in rows if row.verdict.startswith(start)]
        if names:
            yield f"{listed(names)} {said}."
    partly = [row.name for row in rows if "undone in part" in row.verdict]
    if partly:
        yield f"{listed(partly)}: narrower branches of the same block put the energy back on the centre tap."
    foreign = [name for name in _foreign(chosen) if name in widened]
    if foreign:
        yield f"{listed(foreign)}: the class has a forward of its own; its weight is taken to be the kernel as it is."
    yield from _of_strength(steps, rows)


def _of_strength(steps: Sequence[Step], rows: Sequence[LayerChange]) -> Iterator[str]:
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
            f"zero padding takes more than {_BORDER:.0%} of the signal energy in {len(lost)} layers, most in {name}: "
            f"{after:.0%} (before: {before:.0%})."
        )
