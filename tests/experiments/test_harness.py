"""What every experiment shares: real images, and statistics against independent twins."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from experiments.harness import data
from experiments.harness.ledger import Ledger
from experiments.harness.statistics import paired_ratio
from tests.experiments.images import write_images


def test_a_tree_and_a_tar_of_it_hold_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tree = write_images(tmp_path / "tree")
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar10.tar.xz", "w:xz") as tar:
        tar.add(tree / "cifar10", "cifar10")
    from_tree = data.cifar10(tree)
    for source in (data.cifar10(packed), data.cifar10(packed)):  # the second one comes from the cache
        for name in data.Images.__dataclass_fields__:
            assert torch.equal(getattr(source, name), getattr(from_tree, name))
    assert from_tree.train_labels.tolist() == sorted(2 * list(range(10)))
    assert from_tree.train[from_tree.train_labels == 3].unique().tolist() == [60, 61]


def test_the_interval_of_a_ratio_is_that_of_the_paired_t_test_on_logs() -> None:
    rng = np.random.default_rng(0)
    new, old = rng.uniform(50, 100, 9), rng.uniform(80, 160, 9)
    twin = stats.ttest_rel(np.log(new), np.log(old)).confidence_interval(0.95)
    ratio = paired_ratio(new.tolist(), old.tolist())
    assert np.allclose([ratio.low, ratio.high], np.exp([twin.low, twin.high]))
    assert ratio.n == 9


def test_a_ratio_of_paired_logs_covers_the_truth_in_95_of_100_series() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        noise = rng.normal(0, 0.3, 5)
        estimate = paired_ratio(np.exp(np.log(0.5) + noise).tolist(), [1.0] * 5)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 930 <= hits <= 970


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_ledger_does_what_is_missing_and_nothing_twice(ending: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / f"rows.{ending}", ("name", "seed"), ("name", "seed", "value"))
    done: list[int] = []

    def work(job: int) -> dict:
        done.append(job)
        return {"value": 10 * job}

    ledger.fill({("a", 1): 1, ("a", 2): 2}, work)
    rows = ledger.fill({("a", 2): 2, ("b", 1): 3}, work)
    assert done == [1, 2, 3]
    assert [(row["name"], int(row["seed"]), int(row["value"])) for row in rows] == [
        ("a", 1, 10),
        ("a", 2, 20),
        ("b", 1, 30),
    ]
    assert rows == ledger.rows()


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_what_a_kill_left_of_a_line_is_done_again(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    ledger = Ledger(path, ("name",), ("name", "value"))
    ledger.fill({("a",): 1, ("b",): 2}, lambda job: {"value": job})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        ledger.fill({("a",): 1, ("b",): 2}, lambda job: {"value": job})
        assert path.read_bytes() == whole


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_row_made_again_takes_the_place_of_the_earlier_one(ending: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / f"rows.{ending}", ("name",), ("name", "value"))
    ledger.fill({("a",): 1, ("b",): 2}, lambda job: {"value": job})
    seen: list[object] = []
    rows = ledger.fill({("a",): 7}, lambda job: {"value": job}, again=True, after=seen.append)
    assert [(row["name"], int(row["value"])) for row in rows] == [("a", 7), ("b", 2)]
    assert seen == [{"name": "a", "value": 7}]


def test_a_value_that_is_no_column_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "rows.csv", ("name",), ("name",))
    with pytest.raises(ValueError, match="other"):
        ledger.append({"name": "a", "other": 1})
    assert not ledger.path.exists()
