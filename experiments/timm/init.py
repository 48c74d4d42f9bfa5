"""The initialiser over the whole of timm: one small model for each module under ``timm.models``.

``python -m experiments.timm.init`` writes ``docs/results/timm_init.csv`` row by row (models that are there already are
skipped, so that a run can be broken off) and sums it up in ``docs/results/timm_init.md``. For each model, seed 0:
``widerf.init.apply(model, 0.5)``, one forward pass on noise before and after, a verdict for every convolution that
the model holds, and the state dict's keys, dtypes, devices, strides and ``requires_grad`` compared.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.timm.models import SmallModel, read

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STRENGTH = 0.5
COLUMNS = [
    "module", "model", "input", "convolutions", "widened", "verdicts", "without_verdict", "finite_before",
    "finite_after", "state_unchanged", "energy_error", "warnings", "error", "seconds",
]  # fmt: skip


def description(model: nn.Module) -> dict[str, Any]:
    """Return what an initialiser must not change: everything about the state dict but the values."""
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return {key: (t.dtype, t.device, t.shape, t.stride(), t.requires_grad) for key, t in tensors.items()}


def _convolutions(model: nn.Module) -> list[str]:
    """Return the modules that hold a convolution weight, found without the library."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) or type(module).__name__ == "CondConv2d"
    ]


def _energies(model: nn.Module) -> dict[str, float]:
    named = [(name, p) for name, p in model.named_parameters() if p.ndim >= 3 or name.endswith("conv.weight")]
    return {name: float(p.detach().double().square().sum()) for name, p in named}


def _finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return bool(output.isfinite().all())
    values = output.values() if isinstance(output, dict) else output
    return all(_finite(value) for value in values if isinstance(value, Tensor | tuple | list | dict))


@torch.no_grad()
def look_at(small: SmallModel) -> dict[str, Any]:
    """Widen one model; an exception goes into the column ``error``."""
    import timm

    import widerf

    row: dict[str, Any] = {"module": small.module, "model": small.name, "input": "×".join(map(str, small.input_size))}
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        model = timm.create_model(small.name).eval()
        image = torch.randn(1, *small.input_size)
        row["finite_before"] = _finite(model(image))
        was, energies = description(model), _energies(model)
        report = widerf.init.apply(model, STRENGTH)
        row["finite_after"] = _finite(model(image))
        row["state_unchanged"] = description(model) == was
        now = _energies(model)
        row["energy_error"] = f"{max(abs(now[n] / e - 1) if e else abs(now[n]) for n, e in energies.items()):.1e}"
        found = _convolutions(model)
        told = {change.name: change.verdict for change in report}
        row["convolutions"] = len(found)
        row["without_verdict"] = sum(not told.get(name) for name in found)
        row["widened"] = sum(change.widened for change in report)
        counts = Counter(_kind(change.verdict) for change in report)
        row["verdicts"] = "; ".join(f"{verdict}: {count}" for verdict, count in counts.most_common())
        row["warnings"] = " | ".join(report.warnings)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    row["seconds"] = f"{time.perf_counter() - start:.1f}"
    return row


def _kind(verdict: str) -> str:
    return verdict.split(" (")[0].split(":")[0]


def good(row: dict[str, str]) -> bool:
    """Return whether everything that is promised held for this model."""
    promised = ("finite_before", "finite_after", "state_unchanged")
    return not row["error"] and row["without_verdict"] == "0" and all(row[key] == "True" for key in promised)


def summary(rows: Sequence[dict[str, str]]) -> str:
    """Return the table in Markdown."""
    held = [row for row in rows if good(row)]
    none = [row for row in rows if "hold at least one convolution" in row["error"]]
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("--only", nargs="*", help="modules of timm to do again")
    arguments = parser.parse_args()
    table = arguments.out / "timm_init.csv"
    rows = list(csv.DictReader(table.open(encoding="utf-8"))) if table.exists() else []
    rows = [row for row in rows if row["module"] not in (arguments.only or ())]
    done = {row["module"] for row in rows}
    todo = sorted((small for small in read() if small.module not in done), key=lambda small: small.parameters)
    for small in tqdm(todo, unit="model", disable=None):
        rows.append(_as_text(look_at(small)))
        rows.sort(key=lambda row: row["module"])
        with table.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    (arguments.out / "timm_init.md").write_text(summary(rows), encoding="utf-8")


def _as_text(row: dict[str, Any]) -> dict[str, str]:
    return {key: str(row.get(key, "")) for key in COLUMNS}


if __name__ == "__main__":
    main()
