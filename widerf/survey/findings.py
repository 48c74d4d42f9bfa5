"""Findings about a network, and remedies that are tried in a sandbox before they are proposed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from widerf.trace.sandbox import untouched

_NOTHING = 1e-3  # relative change of a figure below which a call mends nothing


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a network, or right.

    Attributes:
        name: a fixed word: ``"covers"``, ``"field_too_small"``, ``"erf_too_small"``, ``"silent"``, ``"strided_grid"``,
            ``"off_the_map"``, ``"clipped"``, ``"skip_dominates"``, ``"pretrained"``, ``"only_pointwise"``,
            ``"global_paths"`` or ``"not_predicted"``.
        what: what is the matter.
        how: how that is known.
        layers: modules that it is about; for a field that is too small those that limit it, the strongest first.
        call: Python that mends it, to be run with ``model``, ``torch`` and ``widerf`` in scope; ``None`` where there
            is none.
        figure: what ``before`` and ``after`` count.
        before: that figure now.
        after: what it is after ``call``, found by making the call on the model in a sandbox.
    """

    name: str
    what: str
    how: str
    layers: tuple[str, ...] = ()
    call: str | None = None
    figure: str = ""
    before: float | None = None
    after: float | None = None

    @property
    def fault(self) -> bool:
        """Whether something is the matter; else it is good or neutral news."""
        return self.name not in ("covers", "global_paths", "pretrained")


@dataclass(frozen=True)
class Remedy:
    """A call as a user would write it, and the same call."""

    text: str
    run: Callable[[nn.Module], object]


Look = Callable[[nn.Module], float]


def call_of(name: str, function: Callable[..., object], **arguments: Any) -> Remedy:
    """Return the remedy ``widerf.<name>(model, …)``."""
    told = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return Remedy(f"widerf.{name}(model{told})", lambda model: function(model, **arguments))


def after(model: nn.Module, remedy: Remedy, look: Look) -> float | None:
    """Return what ``look`` finds once the remedy was applied; the model comes back; ``None`` if it does not apply."""
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            remedy.run(model)
            return look(model)
        except (ValueError, NotImplementedError):
            return None


def mended(model: nn.Module, finding: Finding, remedy: Remedy, look: Look) -> Finding:
    """Return the finding with the remedy and what it would give, if it applies and changes the figure."""
    found = after(model, remedy, look)
    if found is None or (finding.before is not None and math.isclose(found, finding.before, rel_tol=_NOTHING)):
        return finding
    return replace(finding, call=remedy.text, after=found)


def waking(model: nn.Module, silent: Sequence[str]) -> Remedy:
    """Return the remedy that sets silent scales to 1."""
    ends = tuple(sorted({".".join(name.split(".")[-2:]) for name in silent}))
    matched = {name for name, _ in model.named_parameters() if name.endswith(ends)}
    if len(silent) > 2 and matched == set(silent):
        text = f"[torch.nn.init.ones_(p) for n, p in model.named_parameters() if n.endswith({ends!r})]"
    else:
        text = f"[torch.nn.init.ones_(model.get_parameter(n)) for n in {tuple(silent)!r}]"
    return Remedy(text, lambda model: [torch.nn.init.ones_(model.get_parameter(name)) for name in silent])


def spaced(model: nn.Module, name: str, dilation: Sequence[int], spacing: Sequence[int]) -> Remedy | None:
    """Return the remedy that gives a convolution other spacings at the same output size, if there is such a padding."""
    module: Any = model.get_submodule(name)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    more = [(new - old) * (k - 1) for new, old, k in zip(spacing, dilation, module.kernel_size, strict=True)]
    padding = tuple(p + m // 2 for p, m in zip(module.padding, more, strict=True))
    if any(m % 2 for m in more) or min(padding) < 0:
        return None

    def run(model: nn.Module) -> None:
        conv: Any = model.get_submodule(name)
        conv.dilation, conv.padding = tuple(spacing), padding

    conv = f"model.get_submodule({name!r})"
    return Remedy(f"{conv}.dilation, {conv}.padding = {tuple(spacing)}, {padding}", run)
