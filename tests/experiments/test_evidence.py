"""The evidence on a card: every part runs at a tiny size, and no run begins that would not end in time."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from experiments.compare import tasks
from experiments.compare.far_pair import far_pair_batch
from experiments.gpu import evidence
from experiments.gpu.evidence_parts import PARTS, device_batch
from experiments.gpu.evidence_study import Run
from experiments.gpu.evidence_training import Pictures, Plan, batches, score, train
from experiments.harness.inputs import InputError
from experiments.harness.ledger import Ledger
from tests.experiments.images import write_images

CPU = torch.device("cpu")
# The larger networks of the image parts take a while to be made and predicted.
TESTED = [*(pytest.param(name, marks=[pytest.mark.slow] if name in ("cifar10", "paper17") else []) for name in PARTS)]


class Clock:
    """A clock that only runs when it is told to."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def write_camvid(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "camvid.tar", "w") as tar:
        for part, count in (("train", 12), ("val", 3)):
            for number in range(count):
                frame = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
                labels = rng.integers(0, 12, (24, 32), dtype=np.uint8)
                for where, image in ((part, frame), (f"{part}annot", labels)):
                    content = io.BytesIO()
                    Image.fromarray(image).save(content, "PNG")
                    info = tarfile.TarInfo(f"camvid/{where}/{number:02}.png")
                    info.size = content.tell()
                    content.seek(0)
                    tar.addfile(info, content)


@pytest.mark.parametrize("name", TESTED)
def test_a_part_runs_end_to_end_at_a_tiny_size_and_twice_does_nothing_twice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path)
    write_camvid(tmp_path)
    number = str(list(PARTS).index(name) + 1)
    options = ["--part", number, "--small", "--device", "cpu", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    evidence.main(options)
    path = tmp_path / f"evidence-small-{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows
    assert not any("failed" in row for row in rows), rows
    assert all(row["device"].startswith("cpu") for row in rows)
    before = path.read_bytes()
    evidence.main(options)
    assert path.read_bytes() == before
    assert "0 runs done, 0 left" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [1.0, 35.0, 100.0, 1000.0])
@pytest.mark.parametrize("cost", [lambda n: 10.0, lambda n: 10.0 + n % 3, lambda n: 10.0 * 1.02**n])
def test_no_run_begins_that_would_not_end_in_time(seconds: float, cost: Callable[[int], float], tmp_path: Path) -> None:
    """Under a fake clock, with runs whose time is even, varies by a fifth, or creeps up; only the first is a leap."""
    clock, begun = Clock(), list[int]()

    def run(number: int) -> list[dict]:
        begun.append(number)
        clock.time += cost(number)
        return [{"seed": number}]

    runs = [Run("arm", number, lambda number=number: run(number)) for number in range(40)]  # type: ignore[misc]
    rows = Ledger(tmp_path / "rows.jsonl", ("arm", "seed"))
    done, left = evidence.do_part(runs, rows, evidence.Allowance(seconds, clock), CPU)
    assert done + left == 40
    assert done == len(begun) == len(rows.rows())
    assert clock.time <= max(seconds, cost(0))
    assert left == 0 or seconds - clock.time <= evidence.SPARE * max(cost(n) for n in begun), "it stopped too early"
    again, _ = evidence.do_part(runs, rows, evidence.Allowance(1e9, clock), CPU)
    assert again == left
    assert begun == list(range(40))


def test_a_run_that_raises_is_a_record_and_is_tried_again(tmp_path: Path) -> None:
    rows, well = Ledger(tmp_path / "rows.jsonl", ("arm", "seed")), [False]

    def fragile() -> list[dict]:
        if not well[0]:
            raise RuntimeError("out of memory")
        return [{"seed": 1}]

    runs = [Run("a", 1, fragile), Run("b", 1, lambda: [{"seed": 1}])]
    assert evidence.do_part(runs, rows, evidence.Allowance(99, Clock()), CPU) == (2, 0)
    assert [row.get("failed") for row in rows.rows()] == ["RuntimeError: out of memory", None]
    well[0] = True
    assert evidence.do_part(runs, rows, evidence.Allowance(99, Clock()), CPU) == (1, 0)
    assert not any("failed" in row for row in rows.rows())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "0"], "--part must be from 1 to 14"),
        (["--part", "1", "--minutes", "0"], "--minutes must be positive"),
        (["--part", "1", "--device", "cpu"], "--device must be a CUDA device without --small"),
    ],
)
def test_bad_input_is_named(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        evidence.main([*options, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_images_drawn_for_a_stack_follow_the_law_of_the_task() -> None:
    images, labels = device_batch(300, 2, radius=3, generator=torch.Generator().manual_seed(0))
    one, _ = far_pair_batch(600, 3, 9, torch.Generator().manual_seed(1))
    assert images.shape[2:] == one.shape[2:]
    for image, label in zip(images.flatten(0, 1), labels.flatten(), strict=True):
        at = (image.abs() == 3).nonzero() - 4
        assert len(at) == 2
        assert (at[0] == -at[1]).all()
        assert at.abs().max() == 3
        assert (image[tuple(at[0] + 4)] == image[tuple(at[1] + 4)]) == bool(label)
    assert float(images.std()) == pytest.approx(float(one.std()), rel=0.02)


def pictures() -> Pictures:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = (images.float().mean((1, 2, 3)) > 127).long()
    return Pictures((images, labels), (images[:6], labels[:6]), (images[6:9], labels[6:9]), shift=2)


def test_every_arm_of_a_seed_sees_the_same_pictures_and_labels_move_with_them() -> None:
    for (x, y), (u, v) in zip(batches(pictures(), 8, 3), batches(pictures(), 8, 3), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
        break
    maps = pictures().train[0][:, 0]
    pair = Pictures((maps[:, None].expand(-1, 3, -1, -1), maps), pictures().held_out, pictures().test, shift=2)
    x, y = next(batches(pair, 8, 5))
    torch.testing.assert_close(x[:, 0], (y.float() / 255 - 0.5) / 0.25)


def test_training_learns_and_a_loss_that_is_no_number_is_an_outcome() -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    broken = net()
    with torch.no_grad():
        broken[0].weight.fill_(float("nan"))
    plan = Plan(60, 8, 2)
    good, bad, slow = train([net(), broken, net()], pictures(), plan, [0.05, 0.05, 0.01], seed=0)
    assert good.loss is not None
    assert good.loss < 0.6
    assert len(good.curve) == 6
    assert bad.loss is None
    assert len(bad.curve) == 1
    assert slow.loss is not None
    assert slow.loss > good.loss


def test_a_network_learns_the_same_beside_others() -> None:
    def net(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    plan = Plan(12, 8, 2, looks=3)
    together = train([net(0), net(1)], pictures(), plan, [0.05, 0.02], seed=4)
    alone = [train([net(seed)], pictures(), plan, [rate], seed=4)[0] for seed, rate in ((0, 0.05), (1, 0.02))]
    assert together == alone


def test_the_score_of_labels_that_are_right_is_100() -> None:
    class Oracle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(((x[:, 0] * 0.25 + 0.5) * 255).round().long(), 11).movedim(-1, 1).float()

    labels = torch.randint(11, (4, 5, 6), dtype=torch.uint8)
    images = labels[:, None].expand(-1, 3, -1, -1)
    void = labels.clone()
    void[0] = 11
    assert score(Oracle(), images, void, 11) == 100
    assert score(Oracle(), images, (labels + 1) % 11, 11) == 0


def test_plain20_has_19_layers_at_three_scales() -> None:
    net = tasks.plain20_network(3, width=4)(nn.Conv2d)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [4] * 7 + [8] * 6 + [16] * 6
    assert [i for i, conv in enumerate(convs) if conv.stride == (2, 2)] == [7, 13]
    with pytest.raises(InputError, match="--kernel must be odd"):
        tasks.plain20_network(4)
