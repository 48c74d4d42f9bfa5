"""The paper's claims, re-run: how a verdict is reached, what the slopes and fields are, a smoke run of each script."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import widerf
from experiments.harness.ledger import RESULTS
from experiments.harness.runs import Record
from experiments.harness.statistics import Estimate
from experiments.paper import activations, architecture, fields, fig1, fig2, growth, subsampling, trained
from experiments.paper.__main__ import PARTS
from experiments.paper.common import (
    Part,
    about,
    ledger,
    log_sum,
    measured,
    predicted,
    ratio,
    row,
    slope_weights,
    verdict,
)
from experiments.paper.networks import Setting, network
from experiments.paper.page import counts, page, trained_section
from experiments.patterns.command import Problem
from experiments.roads.cases import plain

SMOKE: dict[str, Callable[[Path], list[Record]]] = {
    "fig1": partial(fig1.rows, depths=(2, 3), runs=2, channels=4),
    "activations": partial(activations.rows, depth=3, runs=5, channels=4),
    "fig2": partial(fig2.rows, grids=((2, 3), (2, 4)), runs=2, channels=4),
    "subsampling": partial(subsampling.rows, runs=2, channels=2),
    "growth": partial(growth.rows, depths=(2, 4), sides=(3, 5), depth=5, runs=(2, 2), channels=(4, 4)),
    "architecture": partial(architecture.rows, arms=("dense 3×3", "3×3, partition"), runs=2, channels=9),
    "fields": fields.rows,
}


@pytest.mark.parametrize(
    ("low", "high", "accepted", "said"),
    [
        (0.46, 0.54, about(0.5), "holds"),
        (0.44, 0.54, about(0.5), "cannot tell"),
        (0.40, 0.70, about(0.5), "cannot tell"),
        (0.56, 0.70, about(0.5), "differs"),
        (-0.46, -0.40, about(-0.43), "holds"),
        (1.10, 9.00, (1, None), "holds"),
        (0.90, 9.00, (1, None), "cannot tell"),
        (0.10, 0.90, (1, None), "differs"),
        (-0.4, -0.1, (None, 0), "holds"),
        (0.1, 0.2, (None, 0), "differs"),
        (0.1, 0.2, None, "–"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(low: float, high: float, accepted: Any, said: str) -> None:
    assert verdict(row("", "", Estimate((low + high) / 2, low, high, 20), accepted)) == said


def test_slope_weights_are_those_of_the_least_squares_line() -> None:
    depths, values = (5, 10, 20, 40), np.random.default_rng(0).normal(size=4)
    expected = np.polyfit(np.log(depths), values, 1)[0]
    assert float(np.dot(slope_weights(depths), values)) == pytest.approx(expected, rel=1e-12)


def test_the_predicted_std_grows_like_the_root_of_depth_and_the_size_of_a_power_law_has_its_slope() -> None:
    erfs = [predicted(partial(plain, nn.Identity, 1, n), 2 * n + 5) for n in (3, 6, 12)]
    assert log_sum(slope_weights((3, 6, 12)), erfs, fig1.std).mean == pytest.approx(0.5, abs=1e-6)
    assert erfs[0].std == pytest.approx(math.sqrt(3 * 8 / 12), rel=1e-6)


def test_a_ratio_of_measured_figures_covers_the_true_one_and_is_exact_only_without_draws() -> None:
    new, old = (measured(partial(plain, nn.Identity, 8, n), 2 * n + 5, 64, seed=n) for n in (8, 2))
    found = ratio(new, old, fig1.std)
    assert found.low < 2 < found.high
    assert found.high - found.low < 0.5 and found.n == 64
    told = ratio(*(predicted(partial(plain, nn.Identity, 1, n), 2 * n + 5) for n in (8, 2)), fig1.std)
    assert told.mean == told.low == told.high == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("name", SMOKE)
def test_every_script_makes_rows_and_draws(name: str, tmp_path: Path) -> None:
    part = next(part for part in PARTS if part.name == name)
    found = SMOKE[name](tmp_path)
    assert found and all(line["low"] <= line["mean"] <= line["high"] and line["n"] >= 1 for line in found)
    assert part.figure(tmp_path).exists() == part.draws


def test_the_same_seeds_give_the_same_rows_and_the_same_figure(tmp_path: Path) -> None:
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        rows = fig1.rows(folder, depths=(2,), runs=2, channels=4)
        made.append((rows, fig1.PART.figure(folder).read_bytes()))
    assert made[0] == made[1]


def test_what_has_rows_is_kept_unless_asked_for_again(tmp_path: Path) -> None:
    calls: list[Path] = []

    def work(out: Path) -> list[Record]:
        calls.append(out)
        return [row("claim", "1", Estimate(len(calls), 0.0, 9.0, 2), (1, None))]

    part, out = Part("some", "Some", "", work, draws=False), tmp_path / "new" / "folder"
    kept = [part.fill(out, again=again)["rows"][0]["mean"] for again in (False, False, True, False)]
    assert kept == [1, 1, 2, 2]


def test_every_part_has_a_smoke_run() -> None:
    assert set(SMOKE) == {part.name for part in PARTS}


def test_slopes_of_size_and_share_differ_by_that_of_the_field(tmp_path: Path) -> None:
    found = {line["claim"]: line["mean"] for line in fig2.rows(tmp_path, grids=((2, 3, 4),), runs=2, channels=4)}
    start = "depths 2, 3, 4: slope of "
    expected = np.polyfit(np.log([2, 3, 4]), np.log([5, 7, 9]), 1)[0]
    for of in fig2.READINGS:
        gap = found[f"{start}size, {of} map"] - found[f"{start}share, {of} map"]
        assert gap == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("pooling", "way"), [(False, fields.WAYS[0]), (True, fields.WAYS[1])])
def test_the_formula_of_a_field_is_what_the_library_traces(pooling: bool, way: str) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 1, 5, padding=2)]
    for number, blocks in enumerate((1, 2, 1)):
        if number:
            layers += [nn.MaxPool2d(2) if pooling else nn.Conv2d(1, 1, 3, stride=2, padding=1)]
        layers += [nn.Conv2d(1, 1, 3, padding=1) for _ in range(2 * blocks)]
    found = widerf.receptive_field(nn.Sequential(*layers), (3, 96, 96)).size[0]
    assert found == fields.field((1, 2, 1), way, 5)


def test_a_strided_first_layer_sees_what_the_library_traces() -> None:
    layers = [nn.Conv2d(3, 1, 3, padding=1), *(nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))]
    layers += [nn.Conv2d(1, 1, 3, stride=2, padding=1), *(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))]
    assert widerf.receptive_field(nn.Sequential(*layers), (3, 64, 64)).size[0] == fields.field(
        (1, 2), fields.WAYS[2], 3
    )


def tiny(task: str) -> tuple[Problem, Setting]:
    generator = torch.Generator().manual_seed(0)
    setting = Setting(task, channels=2, epochs=2, batch=2, height=32, width=48)
    side = (32, 32) if task == "cifar10" else (32, 48)
    shape = (4,) if task == "cifar10" else (4, *side)
    images = torch.randint(256, (4, 3, *side), generator=generator, dtype=torch.uint8)
    part = images, torch.randint(10, shape, generator=generator)
    return Problem(part, part, part, (), lambda channels: nn.Identity(), lambda net, batch: 0.0), setting


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
@pytest.mark.parametrize("task", ["cifar10", "camvid"])
def test_a_training_that_was_broken_off_equals_one_that_was_not(task: str, tmp_path: Path) -> None:
    about, setting = tiny(task)
    whole = trained.run(about, setting, tmp_path / "whole.pt", torch.device("cpu"))
    assert len(whole["curve"]) == 2 and whole["before"]["std"] > 0 and whole["after"] != whole["before"]

    class Stop(Exception):  # noqa: N818
        pass

    calls = 0
    score = trained.score

    def once(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stop
        return score(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "score", once)
        with pytest.raises(Stop):
            trained.run(about, setting, tmp_path / "cut.pt", torch.device("cpu"))
    assert trained.run(about, setting, tmp_path / "cut.pt", torch.device("cpu")) == whole


def write_camvid(folder: Path) -> Path:
    with tarfile.open(folder / "camvid.tar", "w") as tar:
        for split, count in (("train", 7), ("val", 1)):
            for number in range(count):
                for kind, shape in (("", (32, 48, 3)), ("annot", (32, 48))):
                    file = io.BytesIO()
                    Image.fromarray(np.full(shape, number, np.uint8)).save(file, "png")
                    info = tarfile.TarInfo(f"camvid/{split}{kind}/{number}.png")
                    info.size = file.tell()
                    file.seek(0)
                    tar.addfile(info, file)
    return folder


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
def test_the_training_command_writes_one_row_that_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--channels=2", "--epochs=1", "--batch=2", "--height=32", "--width=48", "--device=cpu"]
    folders = [f"--data-dir={write_camvid(tmp_path)}", f"--out={tmp_path}", f"--checkpoints={tmp_path / 'runs'}"]
    monkeypatch.setattr("sys.argv", ["trained", "camvid", *options, *folders])
    for _ in range(2):  # the second call finds the row
        trained.main()
    rows = trained.ledger(tmp_path).rows()
    assert len((tmp_path / "paper-trained.jsonl").read_text().splitlines()) == len(rows) == 1
    assert "| camvid | ERF diameter 100 → 150; TRF 505 | 0 | 1 |" in trained_section(rows)
    assert "Not trained" not in trained_section(rows) and "Not trained yet" in trained_section([])


def test_the_networks_of_figure_3_have_as_many_blocks_as_the_papers() -> None:
    for task, blocks in (("cifar10", 17), ("camvid", 16)):
        found = [m for m in network(Setting(task, channels=2)).modules() if type(m).__name__ == "Block"]
        assert len(found) == blocks


def test_the_page_is_that_of_the_committed_rows_and_its_figures_are_small() -> None:
    rows = {line["part"]: line for line in ledger(RESULTS).rows()}
    assert set(rows) == {part.name for part in PARTS}
    assert page(PARTS, rows, trained.ledger(RESULTS).rows()) == (RESULTS / "paper.md").read_text(encoding="utf-8")
    assert all(part.figure(RESULTS).stat().st_size < 100_000 for part in PARTS if part.draws)


def test_the_counts_leave_out_what_claims_nothing() -> None:
    kept = [row("", "", Estimate(0.5, low, high, 20), (0, 1)) for low, high in ((0.4, 0.6), (0.4, 1.6), (0.4, 0.6))]
    lines = counts([fields.PART], {"fields": {"rows": [*kept, row("", "", Estimate(0, 0, 0, 1), None)]}})
    assert lines.splitlines()[-1] == f"| {fields.PART.title} | 2 | 0 | 1 |"
