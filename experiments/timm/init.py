"""The initialiser over the whole of timm: one small model for each module under ``timm.models``.

``python -m experiments.timm.init`` writes ``docs/results/timm_init.csv`` row by row (models that are there already are
skipped, so that a run can be broken off) and sums it up in ``docs/results/timm_init.md``. For each model, seed 0:
``widerf.init.apply(model, 0.5)``, one forward pass on noise before and after, a verdict for every convolution that
the model holds, and the state dict's keys, dtypes, devices, strides and ``requires_grad`` compared.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.harness.runs import Record
from experiments.timm.models import SmallModel
from experiments.timm.sweep import convolutions, sweep

STRENGTH = 0.5
COLUMNS = [
    "module", "model", "input", "convolutions", "widened", "verdicts", "without_verdict", "finite_before",
    "finite_after", "state_unchanged", "energy_error", "warnings", "error", "seconds",
]  # fmt: skip


def description(model: nn.Module) -> dict[str, Any]:
    """Return what an initialiser must not change: everything about the state dict but the values."""
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {key: (t.dtype, t.device, t.shape, t.stride(), t.requires_grad) for key, t in tensors.items()}


def _energies(model: nn.Module) -> dict[str, float]:
    named = [(name, p) for name, p in model.named_parameters() if p.ndim >= 3 or name.endswith("conv.weight")]
    return {name: float(p.detach().double().square().sum()) for name, p in named}


def _finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return bool(output.isfinite().all())
    values = output.values() if isinstance(output, dict) else output
    return all(_finite(value) for value in values if isinstance(value, Tensor | tuple | list | dict))


@torch.no_grad()
def look_at(small: SmallModel) -> Record:
    """Widen one model; an exception goes into the column ``error``."""
    import timm

    import widerf

    row: Record = {"module": small.module, "model": small.name, "input": "×".join(map(str, small.input_size))}
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        model = timm.create_model(small.name).eval()
        found = convolutions(model)
        row["convolutions"] = len(found)
        image = torch.randn(1, *small.input_size)
        row["finite_before"] = _finite(model(image))
        was, energies = description(model), _energies(model)
        report = widerf.init.apply(model, STRENGTH)
        row["finite_after"] = _finite(model(image))
        row["state_unchanged"] = description(model) == was
        now = _energies(model)
        row["energy_error"] = f"{max(abs(now[n] / e - 1) if e else abs(now[n]) for n, e in energies.items()):.1e}"
        told = {change.name: change.verdict for change in report}
        row["without_verdict"] = sum(not told.get(name) for name in found)
        row["widened"] = sum(change.widened for change in report)
        counts = Counter(change.verdict.code for change in report)
        row["verdicts"] = "; ".join(f"{verdict}: {count}" for verdict, count in counts.most_common())
        row["warnings"] = " | ".join(report.warnings)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row["seconds"] = f"{time.perf_counter() - start:.1f}"
    return row


def good(row: Record) -> bool:
    """Return whether everything that is promised held for this model."""
    promised = ("finite_before", "finite_after", "state_unchanged")
    return not row["error"] and row["without_verdict"] == "0" and all(row[key] == "True" for key in promised)


def summary(rows: Sequence[Record]) -> str:
    """Return the table in Markdown."""
    rows = sorted(rows, key=lambda row: str(row["module"]))
    held = [row for row in rows if good(row)]
    none = [row for row in rows if row["convolutions"] == "0" and row["error"]]
    lines = [
        "# The initialiser over timm",
        "",
        f"One small model for each of the {len(rows)} modules under `timm.models`, seed 0, "
        f"`widerf.init.apply(model, {STRENGTH})`: {len(held)} passed in every column, {len(none)} hold no convolution "
        f"and say so, {len(rows) - len(held) - len(none)} did not pass. In all "
        f"{sum(int(r['convolutions'] or 0) for r in rows)} convolutions, "
        f"{sum(int(r['widened'] or 0) for r in rows)} of them widened.",
        "",
        "Passed: `apply` works, the forward pass is finite before and after, every convolution has a verdict, and "
        "keys, dtypes, devices, shapes, strides and `requires_grad` of the state dict are unchanged. *Σw² off* is the "
        "largest relative change of Σw² of any convolution. Made by `python -m experiments.timm.init`; all columns "
        "are in [timm_init.csv](timm_init.csv).",
        "",
        "| module | model | input | convolutions | widened | passed | Σw² off | verdicts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        passed = "yes" if good(row) else row["error"] or "**no**"
        cells = [row[key] for key in ("module", "model", "input", "convolutions", "widened")]
        lines.append("| " + " | ".join([*cells, passed, row["energy_error"], row["verdicts"]]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Do the models that are still missing, then write the summary."""
    sweep("timm_init", COLUMNS, look_at, summary, __doc__)


if __name__ == "__main__":
    main()
