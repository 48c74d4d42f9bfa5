"""The page of a run on a GPU: what was asked for, what came out, and what was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.harness import markdown
from experiments.harness.runs import Record

FOUR = ("128×64@56²", "128×128@28²", "128×256@14²", "128×512@7²")
HALF, FULL = "bfloat16, channels_last", "float32, channels_last"
SIXTY = "64×96@56², bfloat16, channels_last"


def _find(rows: Sequence[Record], heat: str, arm: str) -> Record:
    return next((row for row in rows if row["heat"] == heat and row["arm"] == arm and "failed" not in row), {})


def _worst(rows: Sequence[Record], numbers: str, key: str) -> tuple[float | None, str]:
    """Return the greatest ratio of the default pattern over the four shapes, and the shapes that are missing."""
    ratios = {shape: _find(rows, f"{shape}, {numbers}", "default pattern").get(f"{key} ratio") for shape in FOUR}
    there = [ratio for ratio in ratios.values() if ratio is not None]
    missing = [shape for shape, ratio in ratios.items() if ratio is None]
    return (max(there) if there else None), f"without {', '.join(missing)}" if missing and there else ""


def _relative(rows: Sequence[Record], arm: str, rival: str) -> float | None:
    ours, theirs = (_find(rows, SIXTY, name).get("both") for name in (arm, rival))
    return round(ours / theirs, 3) if ours and theirs else None


def asked(rows: Sequence[Record]) -> list[tuple[str, float | None, float, str]]:
    """Return (figure, measured or None, limit, note) of what was asked for."""
    forward, both, full = _worst(rows, HALF, "forward"), _worst(rows, HALF, "both"), _worst(rows, FULL, "both")
    nine = _relative(rows, "9 taps, blocks of 32", "dense 3×3")
    many = _relative(rows, "49 taps, blocks of 32", "dense 7×7")
    steps = {way: _find(rows, "resnet50, 64×3@224²", way) for way in ("graph", "eager", "compiled")}
    return [
        ("bf16, default pattern, forward, worst of four shapes", forward[0], 1.3, forward[1]),
        ("bf16, default pattern, forward + backward, worst of four shapes", both[0], 1.6, both[1]),
        ("TF32, default pattern, forward + backward, worst of four shapes", full[0], 2.0, full[1]),
        ("depthwise, 9 taps, forward + backward, to the 3×3", nine, 1.5, ""),
        ("depthwise, 49 taps, forward + backward, to the 7×7", many, 1.2, ""),
        *((f"resnet50, training step, {way}", row.get("ratio"), 1.25, "") for way, row in steps.items()),
        ("resnet50, most memory of a training step", steps["eager"].get("bytes ratio"), 1.2, ""),
    ]


def _verdict(measured: float | None, limit: float) -> str:
    return "not measured" if measured is None else "yes" if measured <= limit else "**no**"


def _layers(rows: Sequence[Record]) -> list[str]:
    checked = [row for row in rows if "case" in row]
    wrong = [row for row in checked if not row["right"]]
    unequal = [row for row in checked if row.get("same_bits") is False]
    lines = [f"{len(checked)} layers drawn at random, all three maps against float64: **{len(wrong)} wrong**, "
             f"{len(unequal)} with other bits the second time."]  # fmt: skip
    paths = sorted({row["path"] for row in checked if "path" in row})
    table = []
    for path in paths:
        for numbers in ("bfloat16", "float16", "tf32", "float32"):
            group = [r for r in checked if r.get("path") == path and r["case"]["numbers"] == numbers]
            worst = max((e for r in group for e in r["errors"].values()), default=math.nan)
            if group:
                table.append((path, numbers, len(group), f"{worst:.1e}", f"{group[0]['bound']:.1e}"))
    lines += ["", *markdown.table(("path", "numbers", "layers", "worst relative error", "bound"), table)]
    return lines + [f"- wrong: {row['case']} {row.get('errors') or row.get('failed')}" for row in wrong]


def page(rows: Sequence[Record], source: str) -> str:
    """Return the page in Markdown; ``source`` is the name of the file that holds the rows."""
    head = next(row for row in rows if row["part"] == "machine")
    note = " **Tiny shapes: this run shows that the command works, nothing else.**" if head["small"] else ""
    lines = [
        f"# Kernels on {head['name']}",
        "",
        f"PyTorch {head['torch']}. Medians in microseconds of calls replayed as CUDA graphs; ratios are to the first "
        f"arm of the heat, 'launched singly' with Python's launches.{note}",
        f"Made by `python -m experiments.gpu kernels`; every row is in [{source}]({source}).",
        "",
        "## What was asked for",
        "",
        *markdown.table(("figure", "measured", "limit", "holds"), [
            (f"{name}{f' ({extra})' if extra else ''}", value, f"≤ {limit}", _verdict(value, limit))
            for name, value, limit, extra in asked(rows)
        ]),
        "",
        "## Right?",
        "",
        *_layers([row for row in rows if row["part"] == "layer"]),
    ]  # fmt: skip
    for heat in dict.fromkeys(
        row["heat"] for row in rows if row["part"] in ("convolution", "depthwise", "launch", "rivals")
    ):
        timed = [row for row in rows if row["heat"] == heat and "forward" in row]
        keys = ("arm", "forward", "forward ratio", "both", "both ratio", "eager both ratio", "bytes ratio", "path")
        titles = ("arm", "forward", "ratio", "forward + backward", "ratio", "launched singly", "memory", "path")
        lines += ["", f"## {heat}", "", *markdown.table(titles, [[row.get(key) for key in keys] for row in timed])]
    steps = [row for row in rows if row["part"] == "network" and "ratio" in row]
    keys = ("heat", "arm", "plain", "converted", "ratio", "bytes ratio", "layers by path")
    lines += [
        "",
        "## Training steps, milliseconds",
        "",
        *markdown.table(keys, [[row.get(key) for key in keys] for row in steps]),
    ]
    missing = [row for row in rows if "left out" in row or ("failed" in row and "case" not in row)]
    lines += ["", "## Left out", ""]
    lines += [f"- {row['heat']} {row['arm']}: {row.get('left out') or row['failed']}" for row in missing] or [
        "Nothing."
    ]
    return "\n".join(lines) + "\n"
