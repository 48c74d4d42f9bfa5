"""Findings about a network, and remedies that are tried in a sandbox before they are proposed."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from widerf.report import listed, rendered
from widerf.trace.sandbox import untouched

_HTML = """\
<div class="widerf-report">
{%- for line in lines %}
<p>{{ line }}</p>
{%- endfor %}
{%- for finding, details in findings %}
<h3>{{ loop.index }}. {{ finding.name }}</h3>
<p>{{ finding.what }}.</p>
<table>
{%- for word, text in details %}
<tr><th style="text-align:left">{{ word }}</th><td style="text-align:left">
{%- if word == "do" %}<code>{{ text }}</code>{% else %}{{ text }}{% endif %}</td></tr>
{%- endfor %}
</table>
{%- endfor %}
</div>"""
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


def as_text(number: int, finding: Finding, width: int = 120) -> str:
    """Return a finding as a numbered paragraph; a call is never broken."""
    told = [f"{number}. {finding.name}: {finding.what}.", *(f"   {word}: {text}" for word, text in _details(finding))]
    return "\n".join(line if line.startswith("   do: ") else _filled(line, width) for line in told)


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, subsequent_indent="   ", break_on_hyphens=False, break_long_words=False)


def _details(finding: Finding) -> list[tuple[str, str]]:
    told = [("known by", finding.how)]
    if finding.layers:
        told.append(("layers", listed(finding.layers)))
    if finding.call is not None:
        told.append(("do", finding.call))
    if finding.before is not None:
        gives = "" if finding.after is None else f" → {finding.after:.3g}"
        told.append((finding.figure, f"{finding.before:.3g}{gives}"))
    return told


def as_html(lines: Sequence[str], findings: Sequence[Finding]) -> str:
    """Return findings one below the other, as a phone can show them."""
    told = [(finding, _details(finding)) for finding in findings]
    return rendered(_HTML, lines=lines, findings=told)
