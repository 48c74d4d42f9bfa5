"""Over the whole of timm: one small model for each module, measured, predicted and traced.

``python -m experiments.timm.erf`` writes ``docs/results/timm_erf.csv`` row by row (models that are there already are
skipped, so that a run can be broken off) and sums it up in ``docs/results/timm_erf.md``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

from experiments.harness.runs import Record
from experiments.timm.models import SmallModel, read
from experiments.timm.sweep import sweep

_GIVEN = ["module", "model", "input", "parameters", "attention"]
_FOUND = ["layer", "map", "measured_std", "standard_error", "centroid_off", "clipped", "predicted_std"]
_FIELD = ["trf", "jump", "global_paths"]
_SAID = ["measure_says", "predict_says", "trace_says", "seconds"]
COLUMNS = _GIVEN + _FOUND + _FIELD + _SAID
SAMPLES, BATCH = 4, 2


def look_at(small: SmallModel, samples: int = SAMPLES) -> Record:
    """Measure, predict and trace one model with seed 0 in eval mode; what fails says so in its column."""
    import timm
    import torch

    import widerf
    from widerf.trace.site import spatial_layer

    row: Record = {"module": small.module, "model": small.name, "parameters": small.parameters}
    row["input"] = "×".join(map(str, small.input_size))
    start = time.perf_counter()
    torch.manual_seed(0)
    model = timm.create_model(small.name).eval()
    row["attention"] = _attention(model)

    def site() -> None:
        found = spatial_layer(model, small.input_size)
        row.update(layer=found.name, map="×".join(map(str, found.shape)))

    def measured() -> None:
        erf = widerf.measure(model, small.input_size, samples=samples, batch_size=BATCH)
        off = max(abs(a - b) for a, b in zip(erf.centroid, erf.center, strict=True))
        row.update(
            measured_std=_short(erf.std), standard_error=_short(erf.standard_error()), clipped=_short(erf.clipped)
        )
        row.update(centroid_off=_short(off))

    def predicted() -> None:
        row["predicted_std"] = _short(widerf.predict(model, small.input_size).std)

    def traced() -> None:
        field = widerf.receptive_field(model, small.input_size)
        row.update(trf="×".join(map(str, field.size)), jump=_short(field.jump[0]), global_paths=len(field.global_paths))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row["measure_says"] = _outcome(site) or _outcome(measured)
        row["predict_says"] = _outcome(predicted)
        row["trace_says"] = _outcome(traced)
    row["seconds"] = round(time.perf_counter() - start)
    return row


def _outcome(action: Callable[[], None]) -> str:
    """Empty if the action succeeds, else what it says, in one line."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return ""


def _attention(model: Any) -> str:
    """First module whose class calls itself attention: marks the families that are not convolutional."""
    named = (type(m).__name__ for m in model.modules())
    return next((n for n in named if "attention" in n.lower() or n.lower().endswith("attn")), "")


def _short(number: float) -> str:
    return f"{number:.4g}"


def summarise(rows: list[Record]) -> str:
    """Counts over all models, and over those without attention."""
    convolutional = [r for r in rows if not r["attention"]]
    measured = [r for r in rows if not r["measure_says"]]
    predicted = [r for r in convolutional if not r["predict_says"]]
    traced = [r for r in rows if not r["trace_says"]]
    both = [r for r in rows if r["measured_std"] and r["predicted_std"]]
    lines = [
        "# One small model for each module of timm",
        "",
        f"`python -m experiments.timm.erf`: {len(rows)} of {len(read())} models (the fewest parameters in each",
        f"module of `timm.models`), default initialisation, seed 0, eval mode, n = {SAMPLES} draws of N(0, 1) images;",
        "± is one standard error. Layer: the last spatial map before global pooling. All columns: `timm_erf.csv`.",
        "",
        f"- `measure` gives an ERF for {len(measured)} of {len(rows)}.",
        f"- `predict` gives one for {len(predicted)} of the {len(convolutional)} without an attention module, and for"
        f" {sum(not r['predict_says'] for r in rows)} of all {len(rows)}.",
        f"- `receptive_field` follows {len(traced)} of {len(rows)}.",
        f"- Where both give a std, predicted / measured is {_quantiles(both)} (10 %, median, 90 %; n = {len(both)}).",
        *_remarks(rows, both),
        "",
        "| module | model | map | measured std, px | predicted std, px | theoretical field | says |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        says = "; ".join(s.replace("|", "/") for s in (r["measure_says"], r["predict_says"], r["trace_says"]) if s)
        std = f"{r['measured_std']} ± {r['standard_error']}" if r["measured_std"] else "–"
        field = r["trf"] + (f", {r['global_paths']} global paths" if r["global_paths"] not in ("", "0") else "")
        cells = (r["module"], r["model"], r["map"] or "–", std, r["predicted_std"] or "–", field or "–", says)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _remarks(rows: list[Record], both: list[Record]) -> list[str]:
    """The rows that are off by more than the draws explain, and the modules that were not run."""
    off = []
    for row in both:
        ratio, error = float(row["predicted_std"]) / float(row["measured_std"]), float(row["standard_error"])
        # One prediction is that of one image, which scatters like a single draw.
        scatter = error * SAMPLES**0.5 / float(row["measured_std"])
        if abs(ratio - 1) > max(0.1, 2 * scatter):
            off.append(f"{row['model']} {ratio:.2f}" + (f" ({row['attention']})" if row["attention"] else ""))
    missing = sorted({small.module for small in read()} - {row["module"] for row in rows})
    lines = [f"- Off by more than 10 % and by more than twice the scatter of one draw: {', '.join(off) or 'none'}."]
    if off:
        lines += [
            "  Not treated are what attention and group norms make common to all positions, and correlations in",
            "  branches without weights (PoolFormer's pool(x) − x, the quotient of linear attention); see",
            "  `widerf.erf.energy`.",
        ]
    if missing:
        lines += [f"- Not run yet: {', '.join(missing)}."]
    return lines


def _quantiles(rows: list[Record]) -> str:
    import numpy as np

    if not rows:
        return "not known"
    ratios = [float(r["predicted_std"]) / float(r["measured_std"]) for r in rows]
    return ", ".join(f"{q:.3f}" for q in np.quantile(ratios, [0.1, 0.5, 0.9]))


def main() -> None:
    """Fill the table and sum it up."""
    sweep("timm_erf", COLUMNS, look_at, summarise, __doc__)


if __name__ == "__main__":
    main()
