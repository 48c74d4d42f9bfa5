from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.reference import fingerprint
from widerf import ERFTracker, measure
from widerf.erf.logs import coarse


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))


def train(model: nn.Module, steps: int, tracker: ERFTracker | None) -> torch.Tensor:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    handle = tracker.attach(optimizer) if tracker else None
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 9, 9)).square().mean().backward()
        optimizer.step()
    if handle:
        handle.remove()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_goes_on_as_if_nobody_looked() -> None:
    plain, watched = network(), network()
    tracker = ERFTracker(watched, every=2, input_size=(2, 9, 9), samples=2)
    assert torch.equal(train(plain, 6, None), train(watched, 6, tracker))
    assert [row["step"] for row in tracker.history] == [0, 2, 4]
    assert torch.equal(plain[1].running_mean, watched[1].running_mean)
    assert watched.training


def test_a_row_is_what_measure_finds_in_eval_mode() -> None:
    model = network()
    tracker = ERFTracker(model, input_size=(2, 9, 9), layers=[None, "0", model[3]])
    before = fingerprint(model)
    tracker.step()
    assert fingerprint(model) == before
    erf = measure(model.eval(), (2, 9, 9), samples=8)
    assert tracker.history[0]["std"] == erf.std
    assert [row["layer"] for row in tracker.history] == ["", "0", "3"]
    assert torch.equal(tracker.latest["3"].map, erf.map)


def test_json_lines_hold_scalars_and_a_coarse_map(tmp_path: Path) -> None:
    tracker = ERFTracker(network(), every=1, input_size=(2, 70, 70), samples=2, log=tmp_path / "runs" / "erf.jsonl")
    tracker.step()
    tracker.step()
    rows = [json.loads(line) for line in (tmp_path / "runs" / "erf.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["std"] == tracker.history[0]["std"]
    assert rows[0]["map_shape"] == [24, 24]
    assert sum(rows[0]["map"]) == pytest.approx(1, abs=1e-2)


def test_coarse_maps_keep_their_mass_and_place() -> None:
    share = torch.zeros(70, 33)
    share[69, 0] = 1
    small = coarse(share)
    assert small.shape == (24, 17)
    assert small[23, 0] == 1


def test_tensorboard_gets_scalars_and_maps(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracker = ERFTracker(network(), every=1, input_size=(2, 9, 9), samples=2, log=tmp_path / "board")
        tracker.step()
        tracker.step()
        events = tensorboard.EventAccumulator(str(tmp_path / "board"))
        events.Reload()
    assert [event.step for event in events.Scalars("erf/std")] == [0, 1]
    assert events.Scalars("erf/std")[0].value == pytest.approx(tracker.history[0]["std"], rel=1e-6)
    assert len(events.Images("erf/map")) >= 1


def test_a_lightning_trainer_calls_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch")

        class Task(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = network()

            def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
                return self.net(batch[0]).square().mean()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.01)

        task = Task()
        tracker = ERFTracker(task.net, every=2, input_size=(2, 9, 9), samples=2)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(5, 2, 9, 9)), batch_size=1)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[tracker.lightning()],
        )
        trainer.fit(task, data)
    assert [row["step"] for row in tracker.history] == [0, 2, 4]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="every must be a positive integer, got 0"):
        ERFTracker(network(), every=0)
    with pytest.raises(TypeError, match="log must be a path, a SummaryWriter or None"):
        ERFTracker(network(), log=3)
    with pytest.raises(TypeError, match="layers must be a sequence"):
        ERFTracker(network(), layers="0")
    with pytest.raises(ValueError, match="did you mean"):
        ERFTracker(network(), input_size=(2, 9, 9), layers=["33"]).step()


def test_a_dead_unit_is_a_row_of_nan_and_training_goes_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
    rows: list[dict] = []
    tracker = ERFTracker(model, every=1, input_size=(2, 9, 9), samples=2, log=rows.append)
    tracker.step()
    model[0].bias.data.fill_(-1e9)
    with pytest.warns(UserWarning, match="cannot be measured"):
        tracker.step()
    model[0].weight.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="cannot be measured"):
        tracker.step()
    assert [math.isnan(row["std"]) for row in rows] == [False, True, True]
    assert rows[0]["error"] is None and "dead" in rows[1]["error"] and "finite" in rows[2]["error"]
    written = ERFTracker(model, every=1, input_size=(2, 9, 9), log=tmp_path / "erf.jsonl")
    written._known = True
    with pytest.warns(UserWarning):
        written.step()
    assert json.loads((tmp_path / "erf.jsonl").read_text())["std"] is None


def test_a_wrong_layer_is_told_at_the_first_measurement() -> None:
    with pytest.raises(ValueError, match="layer must be"):
        ERFTracker(network(), input_size=(2, 9, 9), layers=["nowhere"]).step()


def test_a_resumed_tracker_goes_on_where_it_was() -> None:
    whole, first, second = (ERFTracker(network(), every=2, input_size=(2, 9, 9), samples=2) for _ in range(3))
    for _ in range(5):
        whole.step()
    for _ in range(3):
        first.step()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(2):
        second.step()
    assert second.history == whole.history and second.steps == whole.steps


def test_other_ranks_neither_measure_nor_write(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = ERFTracker(network(), every=1, input_size=(2, 9, 9), samples=2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    tracker.step()
    assert tracker.history == [] and tracker.steps == 1
