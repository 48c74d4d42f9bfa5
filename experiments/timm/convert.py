"""The conversion over the whole of timm: one small model for each module under ``timm.models``.

``python -m experiments.timm.convert`` writes ``docs/results/timm_convert.csv`` row by row (models that are there
already are skipped, so that a run can be broken off) and sums it up in ``docs/results/timm_convert.md``. For each
model, seed 0, at most 96 pixels a side where the model takes them: ``widerf.convert(model, extent=7, seed=0)`` (the
first stage dense, layers of a kernel of 7 or more stay), forward and backward in training mode, output shapes and
number of weights compared with those before, the plain model's checkpoint loaded strictly, then ``densify`` and the
largest difference of its output, relative to the largest output, in evaluation mode.
"""

from __future__ import annotations

import argparse
import csv
import gc
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import widerf
from experiments.timm.models import SmallModel, read

RESULTS = Path(__file__).parents[2] / "docs" / "results"
EXTENT, SIDE, TOLERANCE = 11, 96, 1e-4
COLUMNS = [
    "module", "model", "input", "convolutions", "sparse", "shapes_kept", "weights_kept", "gradients_finite",
    "checkpoint_loads", "densify_error", "verdicts", "error", "seconds",
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


def check(row: SmallModel) -> dict[str, Any]:
    """Convert, run and densify one model, and return its line."""
    model, x = build(row)
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
        "verdicts": "; ".join(f"{n}× {verdict}" for verdict, n in Counter(r.verdict for r in report).most_common()),
    }


def run(models: list[SmallModel], path: Path) -> list[dict[str, str]]:
    """Check every model that ``path`` does not hold yet; return all lines."""
    done: dict[str, dict[str, str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            done = {line["model"]: line for line in csv.DictReader(file)}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        for row in tqdm([m for m in models if m.name not in done], disable=None):
            started = time.perf_counter()
            line: dict[str, Any] = {"module": row.module, "model": row.name}
            try:
                line |= check(row)
            except Exception as error:  # one model that fails must not end the sweep: it becomes a line
                text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                none = "hold at least one convolution" in text
                line |= {"convolutions": 0} if none else {"error": text}
            line["seconds"] = round(time.perf_counter() - started, 1)
            writer.writerow(line)
            file.flush()
            done[row.name] = {key: str(value) for key, value in line.items()}
            gc.collect()
    return [done[m.name] for m in models if m.name in done]


def summary(lines: list[dict[str, str]]) -> str:
    """Return the page about the sweep."""
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
        why = "; ".join(v for v in x["verdicts"].split("; ") if not v.endswith("× sparse"))
        said.append(
            f"| {x['module']} | {x['model']} | {x['convolutions']} | {x['sparse']} | {x['densify_error']} | {why} |"
        )
    return "\n".join(said) + "\n"


def main() -> None:
    """Run what is missing and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", nargs="*", help="modules to run, default all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [m for m in read() if not options.only or m.module in options.only]
    models = sorted(chosen, key=lambda model: model.parameters)  # what is quick comes first
    lines = run(models, options.out / "timm_convert.csv")
    (options.out / "timm_convert.md").write_text(summary(lines))


if __name__ == "__main__":
    main()
