"""The command for a GPU, on tiny shapes on the CPU: its rows, its page, and what it says of what it did not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.gpu import evidence_page, layers, race, sweep, uses
from experiments.gpu.command import Run, main
from experiments.gpu.page import FOUR, HALF, asked, page
from experiments.harness.inputs import InputError
from experiments.harness.ledger import Ledger
from widerf.kernels import configurations


def test_the_command_checks_and_races_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["kernels", "--small", "--device", "cpu", "--layers", "2", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "gpu-cpu.jsonl").read_text().splitlines()]
    assert [row["right"] for row in rows if row["part"] == "layer"] == [True, True]
    assert not [row for row in rows if "failed" in row and row["arm"] != "deform_conv2d"]
    for heat in race.heats(small=True):
        timed = [row for row in rows if row["heat"] == heat.name]
        assert [row["arm"] for row in timed] == [name for name, _ in heat.arms]
        assert timed[0]["both ratio"] == 1
    assert next(row for row in rows if row["part"] == "network")["layers by path"]
    text = (tmp_path / "gpu-cpu.md").read_text()
    assert "not measured" in text  # the shapes that were asked for were not run
    assert "2 layers drawn at random, all three maps against float64: **0 wrong**, 0 with other bits" in text
    assert "gpu-cpu.md" in capsys.readouterr().out


def test_without_time_every_part_is_named_as_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path / "rows.jsonl", 0.0)
    run.say({"part": "machine", "name": "none", "torch": "0", "small": False})
    run.attempt({"part": "network", "heat": "resnet50", "arm": "eager"}, 15, lambda: iter([{}]))
    run.attempt({"part": "convolution", "heat": "one"}, -1, lambda: (1 / 0 for _ in range(1)))  # type: ignore[arg-type,misc]
    text = page(run.ledger.rows(), "rows.jsonl")
    assert "- resnet50 eager: 15 s needed, 0 s left" in text
    assert "- one : ZeroDivisionError" in text
    assert [value for _, value, _, _ in asked(run.ledger.rows())] == [None] * 9


def test_the_worst_of_the_four_shapes_is_what_counts() -> None:
    ratios = {"forward ratio": 1.2, "both ratio": 1.5, "bytes ratio": 1.0}
    rows = [{"part": "convolution", "heat": f"{shape}, {HALF}", "arm": "default pattern", **ratios} for shape in FOUR]
    rows[2]["both ratio"] = 1.7
    found = {name: (value, note) for name, value, _, note in asked(rows)}
    assert found["bf16, default pattern, forward + backward, worst of four shapes"] == (1.7, "")
    less = {name: (value, note) for name, value, _, note in asked(rows[:1])}
    assert less["bf16, default pattern, forward, worst of four shapes"][0] == 1.2
    assert "128×512@7²" in less["bf16, default pattern, forward, worst of four shapes"][1]


def test_a_layer_that_is_wrong_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = layers.draw(0, small=True)
    assert layers.check(case, "cpu")["right"]
    exact = layers.maps

    def off(layer: layers.SparseConv2d, x: torch.Tensor, up: torch.Tensor) -> dict[str, torch.Tensor]:
        found = exact(layer, x, up)
        return found if x.dtype == torch.float64 else found | {"grad_weight": found["grad_weight"] * 1.1}

    monkeypatch.setattr(layers, "maps", off)
    row = layers.check(case, "cpu")
    assert not row["right"] and row["errors"]["grad_weight"] > row["bound"] >= row["errors"]["forward"]


def test_the_layers_drawn_take_every_path_and_kind_of_numbers() -> None:
    cases = [layers.draw(seed, small=False) for seed in range(300)]
    for key, values in {
        "block": {0, 16, 32, 64},
        "numbers": set(layers.BOUNDS),
        "stride": {(1, 1), (2, 2), (2, 1)},
        "channels_last": {True, False},
    }.items():
        assert {case[key] for case in cases} == values
    assert 50 <= sum(case["groups"] > 1 for case in cases) <= 150


def test_without_a_gpu_only_the_small_run_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="CUDA device without --small"):
        main(["kernels", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(InputError, match="--seconds must be positive"):
        main(["kernels", "--seconds", "0"])


def test_every_use_of_a_layer_is_tried_and_one_that_breaks_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(uses.USES, "torch.compile, one graph")  # half a minute
    rows = {row["heat"]: row for row in uses.check(torch.device("cpu"))}
    assert rows.pop("CUDA graph")["left out"] == "it needs a CUDA device"
    assert all(row["right"] for row in rows.values()), rows

    def broken(device: torch.device) -> float:
        raise RuntimeError("no such device")

    monkeypatch.setitem(uses.USES, "autocast", (broken, 0.0))
    monkeypatch.setitem(uses.USES, "memory format", (lambda device: float("nan"), 1.0))
    rows = {row["heat"]: row for row in uses.check(torch.device("cpu"))}
    assert rows["autocast"]["why"] == "RuntimeError: no such device"
    assert [rows[name]["right"] for name in ("autocast", "memory format", "depthwise")] == [False, False, True]


def test_a_sweep_measures_every_candidate_and_names_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = configurations.Shape("forward", "16-bit", 64, 64, 128, 784, 64)
    asked: list[configurations.Configuration] = []

    def call() -> torch.Tensor:
        asked.append(configurations.choose(shape))
        return torch.zeros(1)

    def clock(call: Callable[[], object], *_: object, **__: object) -> float:
        call()
        if asked[-1].pixels == 64:
            raise RuntimeError("out of shared memory")
        return float(asked[-1].pixels) + asked[-1].stages

    monkeypatch.setattr(sweep, "maps", lambda layer, device: {"forward": call})
    monkeypatch.setattr(sweep, "microseconds", clock)
    (row,) = sweep.run(sweep.layers(small=True)[0], torch.device("cpu"), 0.0)
    wanted = configurations.candidates(shape)
    assert set(asked) == set(wanted)
    assert len(row["times"]) == len(wanted)
    assert row["best time"] == min(c.pixels + c.stages for c in wanted if c.pixels > 64)
    assert any("out of shared memory" in str(time) for time in row["times"].values())


def test_a_cell_of_the_evidence_is_compared_with_he_seed_by_seed(tmp_path: Path) -> None:
    rows = Ledger(tmp_path / "evidence-card-far-pair.jsonl", ("run", "arm", "seed"))
    for seed in range(12):
        for arm, steps in (("he", 100 + seed), ("fast", 50 + seed), ("same", 100 + seed), ("never", None)):
            place = {"run": "cell", "arm": f"cell: {arm}", "seed": seed, "budget": 800, "device": "cuda: card"}
            rows.append({**place, "steps_to_target": steps, "accuracy": 1.0, "torch": "0"})
    rows.append({"run": "cell 2", "arm": "cell 2", "seed": 0, "failed": "RuntimeError: no"})
    parts = evidence_page.read(tmp_path, "card")
    (verdict,) = evidence_page.cells(parts["far-pair"]).values()
    found = {row.arm: row for row in verdict.rows}
    fast, never = found["fast"].steps_ratio, found["never"].steps_ratio
    assert fast is not None and fast.mean == pytest.approx(55.5 / 105.5)
    assert evidence_page.ratio(found["fast"]).startswith("**0.53")
    assert evidence_page.ratio(found["same"]) == "1.00 (1.00–1.00)"
    assert found["never"].missed == 12
    assert never is not None and never.mean == pytest.approx(800 / 105.5)
    text = evidence_page.page(parts, "card")
    assert "He: median 106 steps, 0 of 12 never arrive within 800." in text
    assert "cell 2" not in text
