"""What the pattern experiment finds: the learning rate of each arm, steps, and the table with its intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.harness.runs import Record
from experiments.harness.statistics import paired_difference, paired_ratio, sign_flip


def best_rates(records: Sequence[Record]) -> dict[str, float]:
    """Return for each arm the learning rate of the highest mean score on the held-out images.

    Example:
        >>> best_rates([{"arm": "a", "rate": r, "score": s} for r, s in [(0.1, 0.5), (0.1, 0.1), (0.2, 0.4)]])
        {'a': 0.2}
    """
    scores: dict[str, dict[float, list[float]]] = {}
    for r in records:
        scores.setdefault(r["arm"], {}).setdefault(r["rate"], []).append(r["score"])
    return {arm: max(by, key=lambda rate: sum(by[rate]) / len(by[rate])) for arm, by in scores.items()}


def steps_to(record: Record, target: float) -> float:
    """Return the first step at which the held-out score was at ``target``; the last step if it never was."""
    curve = record["curve"]
    return float(
        next((s for s, m in zip(curve["step"], curve["score"], strict=True) if m >= target), curve["step"][-1])
    )


def summary(task: str, records: Sequence[Record], tuned: Sequence[Record], settings: Record) -> str:
    """Return two tables: each arm against dense and against the grids, seed by seed; and how each arm was tuned."""
    by: dict[str, dict[int, Record]] = {}
    for r in records:
        by.setdefault(r["arm"], {})[r["seed"]] = r
    seeds = sorted(set.intersection(*(set(runs) for runs in by.values())))
    metric = (
        f"mIoU of the 101 `val` frames at {settings['size']}" if task == "camvid" else "accuracy on 2,000 test images"
    )
    lines = [
        f"# Patterns against grids: {task}",
        "",
        f"`python -m experiments.patterns {task}`, n = {len(seeds)} paired seeds, {settings['steps']} steps of",
        f"{settings['batch']} images, {settings['channels']} channels. Score: {metric}; differences and ratios with",
        "95 % t-intervals over pairs. Steps: to the final score on the held-out images that dense of the same seed",
        "ends with, an arm that never gets there counts with all its steps.",
        "",
        "| arm | lr | score | − dense | − grid-1-2-5 | − grid-growing | steps / dense | ERF std before | after |",
        "|---" * 9 + "|",
    ]
    for arm in by:
        runs = [by[arm][s] for s in seeds]
        cells = [arm, f"{runs[0]['rate']:g}", f"{sum(r['test_score'] for r in runs) / len(runs):.4f}"]
        for rival in ("dense", "grid-1-2-5", "grid-growing"):
            known = rival in by and rival != arm
            pairs = [by[rival][s]["test_score"] for s in seeds] if known else []
            cells.append(str(paired_difference([r["test_score"] for r in runs], pairs)) if known else "")
        if "dense" in by and arm != "dense":
            targets = [by["dense"][s]["score"] for s in seeds]
            steps = [steps_to(r, t) for r, t in zip(runs, targets, strict=True)]
            base = [steps_to(by["dense"][s], t) for s, t in zip(seeds, targets, strict=True)]
            cells.append(str(paired_ratio(steps, base)))
        else:
            cells.append("")
        cells += [f"{sum(r[key]['std'] for r in runs) / len(runs):.2f}" for key in ("erf_before", "erf_after")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *held_out(by, seeds), "", *_tuning(tuned, settings)]) + "\n"


def held_out(by: Mapping[str, Mapping[int, Record]], seeds: Sequence[int]) -> list[str]:
    """Return the table of the scores on held-out images, seconds, and p of the differences on the test images."""
    rivals = [rival for rival in ("dense", "grid-1-2-5", "grid-growing") if rival in by]
    least = 2 ** (1 - len(seeds))  # of an exact sign-flip test
    columns = ["arm", "held-out score", *(f"− {rival}" for rival in rivals), "p, in that order", "seconds / dense"]
    lines = [
        "On the held-out images at the end of training; p by sign flips of the differences on the test images, to each",
        f"rival, not corrected for their number: {len(seeds)} pairs can give no less than {least:.2g}. Seconds are",
        "those of whole runs, looks included.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for arm in by:
        mine = {key: [by[arm][s][key] for s in seeds] for key in ("score", "test_score", "seconds")}
        cells, p_values = [], []
        for rival in rivals:
            if rival == arm:
                cells.append("")
                continue
            theirs = {key: [by[rival][s][key] for s in seeds] for key in ("score", "test_score")}
            cells.append(str(paired_difference(mine["score"], theirs["score"])))
            p_values.append(f"{sign_flip(mine['test_score'], theirs['test_score']):.2g}")
        known = "dense" in by and arm != "dense"
        ratio = str(paired_ratio(mine["seconds"], [by["dense"][s]["seconds"] for s in seeds])) if known else ""
        mean = sum(mine["score"]) / len(seeds)
        lines.append(f"| {arm} | {mean:.4f} | {' | '.join(cells)} | {', '.join(p_values)} | {ratio} |")
    return lines


def _tuning(tuned: Sequence[Record], settings: Record) -> list[str]:
    rates = settings["rates"]
    lines = [
        f"Tuning: score on the held-out images after {settings['tune_steps']} steps, one number a seed.",
        "",
        "| arm | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |",
        "|---" * (1 + len(rates)) + "|",
    ]
    for arm in dict.fromkeys(r["arm"] for r in tuned):
        cells = [[f"{r['score']:.3f}" for r in tuned if (r["arm"], r["rate"]) == (arm, rate)] for rate in rates]
        lines.append(f"| {arm} | " + " | ".join(" ".join(cell) for cell in cells) + " |")
    return lines
