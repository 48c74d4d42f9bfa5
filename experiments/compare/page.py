"""The report of the main job: one self-contained HTML page, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

from experiments.compare import figures, table
from experiments.compare.protocol import Protocol
from experiments.compare.task import Task
from experiments.compare.verdict import Row, Verdict
from experiments.harness.runs import Record, write_whole

MACHINE = ("device", "python", "torch", "timm", "widerf")
ONE_RUN = (
    "arm", "seed", "outcome", "steps_to_target", "accuracy", "test_accuracy", "ERF before", "after", "s a step", "s",
)  # fmt: skip


def write(path: Path, verdict: Verdict, task: Task, settings: Record, protocol: Protocol) -> Path:
    """Write the report to ``path`` and, beside it, the same as Markdown; return ``path``."""
    first = verdict.records[0]
    shared = {
        "verdict": verdict,
        "settings": {name: value for name, value in settings.items() if value is not None},
        "machine": {key: first[key] for key in MACHINE},
        "erf_on": "validation images" if task.erf_inputs is not None else "N(0, 1) inputs",
        "accuracy_on": "test" if task.test is not None else "validation",
        "seeds": sorted({record["seed"] for record in verdict.records}),
        "minutes": sum(record["seconds"]["run"] for record in verdict.records) / 60,
        "protocol": protocol,
        "runs": [one_run(record) for record in verdict.records],
        "run_head": ONE_RUN,
    }
    drawn = {
        "Each arm against the baseline": figures.forest(verdict.rows, verdict.baseline),
        "Who is still waiting": figures.waiting(verdict),
        "Training curves": figures.curves(verdict),
        "Dose and response": figures.doses(verdict.rows),
    }
    head, *rows = table.lines_of(verdict.rows, not task.stop_at_target)
    page = _template("report.html").render(
        **shared,
        head=head,
        rows=rows,
        pictures={title: figures.png(figure) for title, figure in drawn.items() if figure is not None},
        maps=_maps(verdict),
    )
    write_whole(path, page)
    text = table.markdown(verdict.rows, not task.stop_at_target)
    write_whole(path.with_suffix(".md"), _template("report.md").render(**shared, table=text))
    return path


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def one_run(record: Record) -> tuple[str, ...]:
    """Write one run as a row, in the order of ``ONE_RUN``."""
    erfs = ["dead" if record[f"erf_{w}"] is None else f"{record[f'erf_{w}']['std']:.2f}" for w in ("before", "after")]
    step, run = record["seconds"]["step"], record["seconds"]["run"]
    test = record["test_accuracy"]
    return (
        record["arm"], str(record["seed"]), record["outcome"], str(record["steps_to_target"] or ""),
        f"{record['accuracy']:.3f}", "" if test is None else f"{test:.3f}", *erfs,
        "" if step is None else f"{step:.4f}", f"{run:.1f}",
    )  # fmt: skip


def _maps(verdict: Verdict) -> list[Record]:
    """Return the ERF of every arm before and after training, with what a caption says."""
    rows: Sequence[Row] = verdict.rows
    return [
        {
            "arm": row.arm,
            "before": figures.erf_map(verdict.of(row.arm), "before"),
            "after": figures.erf_map(verdict.of(row.arm), "after"),
            "caption": f"std {row.std_before:.2f} → {row.std_after:.2f} px",
        }
        for row in rows
    ]
