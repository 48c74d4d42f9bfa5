"""The conversion over the whole of timm: one small model for each module under ``timm.models``.

``python -m experiments.timm.convert`` writes ``docs/results/timm_convert.csv`` row by row (models that are there
already are skipped, so that a run can be broken off) and sums it up in ``docs/results/timm_convert.md``. For each
model, seed 0, at most 96 pixels a side where the model takes them: ``widerf.convert(model, extent=11, seed=0)`` (the
first stage dense, layers of a kernel of 7 or more stay), forward and backward in training mode, output shapes and
number of weights compared with those before, the plain model's checkpoint loaded strictly, then ``densify`` and the
largest difference of its output, relative to the largest output, in evaluation mode.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import widerf
from experiments.harness.runs import Record
from experiments.timm.models import SmallModel, read
from experiments.timm.sweep import convolutions, sweep

EXTENT, SIDE, TOLERANCE = 11, 96, 1e-4
COLUMNS = [
    "module", "model", "input", "convolutions", "sparse", "shapes_kept", "weights_kept", "gradients_finite",
    "checkpoint_loads", "densify_error", "left_dense", "error", "seconds",
]  # fmt: skip


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output, whatever holds them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def shapes(output: Any) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors of an output."""
    return [tuple(t.shape) for t in tensors(output)]


def build(row: SmallModel) -> tuple[nn.Module, Tensor]:
    """Return the model and an input, smaller than its configuration asks for if the model takes that."""
    import timm

    channels, *sides = row.input_size
    for side in (SIDE, None):
        spatial = [min(side, s) if side else s for s in sides]
        torch.manual_seed(0)
        model = timm.create_model(row.name)
        x = torch.randn(2, channels, *spatial)
        try:
            with torch.no_grad():
                model.eval()(x)
        except (AssertionError, RuntimeError, ValueError):
            if side is None:
                raise
            continue
        return model, x
    raise AssertionError


def check(row: SmallModel) -> Record:
    """Convert, run and densify one model, and return its line."""
    model, x = build(row)
    if not convolutions(model):
        return {"convolutions": 0}
    with torch.no_grad():
        before = shapes(model.eval()(x))
    checkpoint = {key: value.clone() for key, value in model.state_dict().items()}
    weights = sum(p.numel() for p in model.parameters())
    report = widerf.convert(model, extent=EXTENT, seed=0)
    output = model.train()(x)
    sum(t.float().square().mean() for t in tensors(output) if t.is_floating_point()).backward()  # type: ignore[union-attr]
    gradients = [m.weight.grad for m in model.modules() if hasattr(m, "offsets") and hasattr(m, "extent")]
    loads = not any(model.load_state_dict(checkpoint))
    with torch.no_grad():
        after = list(tensors(model.eval()(x)))
        dense = list(tensors(widerf.densify(model)(x)))
    left_dense = Counter(r.verdict for r in report if not r.converted)
    error = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(after, dense, strict=True))
    return {
        "input": "x".join(map(str, x.shape[1:])),
        "convolutions": len(report),
        "sparse": sum(r.converted for r in report),
        "shapes_kept": before == [tuple(t.shape) for t in after],
        "weights_kept": report.weights == (weights, weights),
        "gradients_finite": all(g is None or bool(g.isfinite().all()) for g in gradients),
        "checkpoint_loads": loads,
        "densify_error": f"{error:.1e}",
        "left_dense": "; ".join(f"{n}× {why}" for why, n in left_dense.most_common()),
    }


def look_at(row: SmallModel) -> Record:
    """Check one model; what fails says so in its column."""
    started = time.perf_counter()
    line: Record = {"model": row.name}
    try:
        line |= check(row)
    except Exception as error:  # one model that fails must not end the sweep: it becomes a line
        line["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    line["seconds"] = round(time.perf_counter() - started, 1)
    gc.collect()
    return line


def summary(lines: list[Record]) -> str:
    """Return the page about the sweep."""
    parameters = {model.module: model.parameters for model in read()}
    lines = sorted(lines, key=lambda line: parameters.get(line["module"], 0))
    failed = [x for x in lines if x.get("error")]
    without = [x for x in lines if not x.get("error") and x["convolutions"] == "0"]
    sparse = [x for x in lines if not x.get("error") and int(x.get("sparse") or 0) > 0]
    right = [
        x
        for x in sparse
        if x["shapes_kept"] == x["weights_kept"] == x["gradients_finite"] == x["checkpoint_loads"] == "True"
        and float(x["densify_error"]) <= TOLERANCE
    ]
    worst = max((float(x["densify_error"]) for x in sparse), default=0.0)
    layers, all_layers = (sum(int(x[key]) for x in sparse) for key in ("sparse", "convolutions"))
    held = len(lines) - len(without) - len(failed)
    said = [
        "# Conversion over timm",
        "",
        f"`python -m experiments.timm.convert`: the smallest model of each of {len(lines)} modules under",
        f"`timm.models`, seed 0, extent {EXTENT}.",
        "",
        f"- {held} have convolutions, {len(without)} have none, {len(failed)} failed.",
        f"- In {len(sparse)} at least one layer became sparse. In {len(right)} of these output shapes and the",
        "  number of weights stay, gradients are finite, the plain checkpoint loads strictly, and the densified output",
        f"  is equal to {TOLERANCE:g}.",
        f"- Largest relative difference after densifying: {worst:.1e}.",
        f"- {layers} of {all_layers} convolutions in them became sparse.",
        "",
    ]
    if failed:
        said += ["| model | error |", "|---|---|", *(f"| {x['model']} | {x['error']} |" for x in failed), ""]
    said += [
        "| module | model | convolutions | sparse | densify error | left dense because |",
        "|---|---|---|---|---|---|",
    ]
    for x in sparse:
        cells = [x[key] for key in ("module", "model", "convolutions", "sparse", "densify_error", "left_dense")]
        said.append("| " + " | ".join(cells) + " |")
    return "\n".join(said) + "\n"


def main() -> None:
    """Run what is missing and write both files."""
    sweep("timm_convert", COLUMNS, look_at, summary, __doc__)


if __name__ == "__main__":
    main()
