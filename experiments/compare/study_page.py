"""The page of a study in ``docs/results``: every table made from the raw rows, nothing typed in.

python -m experiments.compare.study_page far-pair
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.compare import figures, table
from experiments.compare.arms import choose
from experiments.compare.page import MACHINE
from experiments.compare.protocol import Cell, Protocol, names, protocol
from experiments.compare.study import ledger, rate_of
from experiments.compare.verdict import LEVEL, Row, Verdict
from experiments.harness import markdown
from experiments.harness.inputs import InputError, main_guard
from experiments.harness.judge import judge
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record, write_whole
from experiments.harness.statistics import Estimate, holm, paired_difference, sign_flip

JUDGED = 400  # series in which the harness holds the baseline against itself


def verdict_of(cell: Cell, about: Protocol, rows: Sequence[Record]) -> Verdict | None:
    """Return the verdict on one cell, over the seeds of arms whose runs are all there; None without the baseline."""
    costs = {row["arm"]: row["seconds"]["step"] for row in rows if row["part"] == "cost"}
    kinds = {arm.name: arm.taps for arm in choose(about.arms, [])}
    there = [
        {
            **row,
            "task": str(cell),
            "test_accuracy": row.get("test_accuracy"),
            # What a step costs was measured apart: the runs shared the processor with other work.
            "seconds": {"step": costs.get(kinds[row["arm"]]), "run": row["seconds"]["run"]},
        }
        for row in rows
        if row["part"] == "confirm" and cell.options.items() <= row.items()
    ]
    if not any(row["arm"] == about.baseline for row in there):
        return None
    there.sort(key=lambda row: (about.arms.index(row["arm"]), row["seed"]))
    return Verdict(there, target=about.target, longest=cell.steps)


def page(about: Protocol, rows: Ledger) -> str:
    """Return the page as Markdown.

    Raises:
        InputError: there is no row yet.
    """
    all_rows = rows.rows()
    if not all_rows:
        raise InputError(f"{rows.path} must hold runs: python -m experiments.compare.study {about.name}")
    found = [(cell, verdict_of(cell, about, all_rows)) for cell in about.cells]
    verdicts = [(cell, verdict) for cell, verdict in found if verdict is not None]
    parts = [_accuracy(*each) for each in verdicts] if about.by_seed else [_steps(*each) for each in verdicts]
    overview = [] if about.by_seed else [_overview(verdicts)]
    undone = [str(cell) for cell, verdict in found if verdict is None]
    whole = [*overview, *parts, _rates(about, rows), _judgement(about, verdicts), _made(about, all_rows, undone)]
    return "\n\n".join(part for part in whole if part)


def _overview(verdicts: Sequence[tuple[Cell, Verdict]]) -> str:
    """Return the map: arms down, cells across, ratios of restricted means."""
    arms = list(dict.fromkeys(row.arm for _, verdict in verdicts for row in verdict.rows))
    told = (
        "Steps to the target against the baseline's, as ratios of restricted means; **bold** where the 95 % interval\n"
        "is clear of 1 and p after Holm over the arms of the cell is below .05; in brackets runs that never arrived."
    )
    head = ["arm", *(f"{cell.options['depth']} layers, r = {cell.options['radius']}" for cell, _ in verdicts)]
    rows = [[arm, *(_place(arm, verdict) for _, verdict in verdicts)] for arm in arms]
    return f"## The map\n\n{told}\n\n{_table(head, rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown.table(head, rows))


def _place(arm: str, verdict: Verdict) -> str:
    row = next((row for row in verdict.rows if row.arm == arm), None)
    if row is None:
        return "not run"
    missed = f" ({row.missed} of {row.n})" if row.missed else ""
    if row.steps_ratio is None:
        return f"1, {row.steps:.0f} steps{missed}"
    if row.missed == row.n and all(record["steps_to_target"] is None for record in verdict.of(verdict.baseline)):
        return f"neither arrives{missed}"
    text = f"{row.steps_ratio.mean:.2f}"
    return (f"**{text}**" if row.clear else text) + missed


def _steps(cell: Cell, verdict: Verdict) -> str:
    """Return the table of one cell."""
    extra = [
        f"- {row.arm}: {row.arrived_ratio.mean:.2f} ({row.arrived_ratio.low:.2f}–{row.arrived_ratio.high:.2f}) × over "
        f"the {row.arrived_ratio.n} pairs in which both arrived"
        for row in verdict.rows
        if row.arrived_ratio is not None and row.arrived_ratio.n < row.n
    ]
    lines = [f"## {cell}", verdict.headline, table.markdown(verdict.rows, accuracy=False)]
    return "\n\n".join([*lines, "\n".join(extra)] if extra else lines) + _note(verdict.notes)


def _note(notes: str) -> str:
    return f"\n\n{notes.strip()}" if notes else ""


def accuracies(verdict: Verdict) -> list[tuple[Row, Estimate | None, float | None]]:
    """Return every arm with the difference of its accuracy to the baseline's, in points, and p after Holm."""
    compared: list[tuple[Row, Estimate | None, float | None]] = []
    for row in verdict.rows:
        if row.arm == verdict.baseline:
            compared.append((row, None, None))
            continue
        new, old = ([verdict.accuracy(record) for record in side] for side in verdict.pairs(row.arm))
        compared.append((row, paired_difference(new, old), sign_flip(new, old)))
    adjusted = iter(holm([p for _, _, p in compared if p is not None]))
    return [(row, gap, None if p is None else next(adjusted)) for row, gap, p in compared]


def _accuracy(cell: Cell, verdict: Verdict) -> str:
    head = ["arm", "n", "accuracy, %", "difference, points", "p (Holm)", "diverged", "dead", "smallest budget",
            "ERF std before", "after"]  # fmt: skip
    rows = []
    for row, gap, p in accuracies(verdict):
        mark = "**" if p is not None and p < LEVEL else ""
        text = "0" if gap is None else f"{mark}{gap.mean:+.2f}{mark} ({gap.low:+.2f} to {gap.high:+.2f})"
        counts = [str(row.diverged), str(row.dead), str(row.budget or "none")]
        stds = [f"{row.std_before:.2f}", f"{row.std_after:.2f}"]
        told = "" if p is None else f"{p:.2g}"
        rows.append([row.arm, str(row.n), f"{row.accuracy:.1f}", text, told, *counts, *stds])
    return f"## {cell}\n\n{_table(head, rows)}"


def _rates(about: Protocol, rows: Ledger) -> str:
    if not about.choose:
        return f"## Learning rate\n\n{about.rates[0]:g} in every arm. {about.said['why']}"
    lines = []
    for arm in about.arms:
        tried = [row for row in rows.rows() if row["part"] == "choose" and row["arm"] == arm]
        if {row["lr"] for row in tried} != set(about.rates):
            continue
        each = []
        for lr in about.rates:
            those = [row for row in tried if row["lr"] == lr]
            found = [f"{100 * row['accuracy']:.1f} %" if about.by_seed else row["steps_to_target"] for row in those]
            each.append(f"{lr:g}: {', '.join(map(str, found))}")
        lines.append([arm, f"{rate_of(arm, about, rows):g}", "; ".join(each)])
    what = "held-out accuracy" if about.by_seed else "steps to the target; None: never"
    told = f"Chosen on seeds {', '.join(map(str, about.choose))} ({what})."
    return f"## Learning rates\n\n{told}\n\n{_table(['arm', 'rate', 'the tried ones'], lines)}"


def _judgement(about: Protocol, verdicts: Sequence[tuple[Cell, Verdict]]) -> str:
    if about.by_seed:
        return ""
    cell, verdict = verdicts[0]
    steps = [row["steps_to_target"] for row in verdict.of(about.baseline) if row["steps_to_target"] is not None]
    if len(steps) < 2:
        return ""
    small, large = (judge(steps, ratio, n=len(about.confirm), series=JUDGED) for ratio in (0.9, 0.75))
    return "## The harness, judged by itself\n\n" + (
        f"{JUDGED} series of {len(about.confirm)} pairs, drawn from the {len(steps)} runs of {about.baseline}\n"
        f"({cell}) that arrived and paired at random: the test rejects in {small.false_alarms:.1%}. With a ratio of\n"
        f"0.9 put in, the interval holds it in {small.covered:.1%} and the test finds it in {small.found:.1%}; with\n"
        f"0.75 in {large.covered:.1%} and {large.found:.1%}. Runs paired at random scatter more than runs of one\n"
        "seed, so this is the harder case."
    )


def _made(about: Protocol, rows: Sequence[Record], undone: Sequence[str]) -> str:
    machines = sorted({"; ".join(f"{key}: {row[key]}" for key in MACHINE) for row in rows})
    hashes = ", ".join(sorted({row["protocol"] for row in rows}))
    hours = sum(row["seconds"]["run"] for row in rows) / 3600
    confirm = [row["seed"] for row in rows if row["part"] == "confirm"]
    costs = [f"{row['arm']} {1000 * row['seconds']['step']:.1f}" for row in rows if row["part"] == "cost"]
    lines = [
        f"{len(confirm)} runs on the seeds of the comparison ({min(confirm)} to {max(confirm)}) and "
        f"{sum(row['part'] == 'choose' for row in rows)} that chose rates; {hours:.1f} hours on a shared processor.",
        f"Protocol `experiments/compare/protocols/{about.name}.json`, hash {about.hash}; the rows carry {hashes}.",
        f"{about.said['network']}.",
        f"Milliseconds of processor time a step, one network, one thread: {', '.join(costs) or 'not measured'}.",
        *[f"{machine}." for machine in machines],
        *([f"Not run: {', '.join(undone)}."] if undone else []),
        f"A look every {rows[0]['curve']['every']} steps. ERF: {about.said['erf']}.",
    ]
    return "## How it was made\n\n" + "\n".join(f"- {line}" for line in lines)


def main() -> None:
    """Write the page beside its rows."""
    line = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    line.add_argument("protocol", help=f"one of {', '.join(names())}")
    line.add_argument("--rows", type=Path, help="default: docs/results/study-PROTOCOL.jsonl")
    options = line.parse_args()
    about = protocol(options.protocol)
    path = options.rows or RESULTS / f"study-{about.name}.jsonl"
    rows = ledger(about, path)
    text, there = page(about, rows), path.with_suffix(".md")
    head = there.read_text().split("\n## ")[0] if there.exists() else f"# Study: {about.name}"
    write_whole(there, f"{head.rstrip()}\n\n{text}\n")
    first = verdict_of(about.cells[0], about, rows.rows())
    if first is not None and not about.by_seed:
        picture = figures.forest(first.rows, first.baseline)
        picture.savefig(path.with_suffix(".png"), dpi=110, transparent=True)
    print(f"page: {there}")


if __name__ == "__main__":
    main_guard(main)
