"""The page of the pattern study, on made-up rows whose answers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.harness.inputs import InputError
from experiments.harness.statistics import holm, paired_difference, sign_flip
from experiments.patterns import regret, settings
from experiments.patterns.confirmed import BEST, Confirmed, gather, read, regrets

NOISE = (0.3, -0.1, 0.2, 0.0, -0.2, 0.1, -0.3, 0.15)
# Test score, and held-out score: the second grid is the best on held-out images, the third on the test images.
SHALLOW = {
    "dense": (50.0, 48.0),
    "grid 1 2 2 4 4 7": (60.0, 58.0),
    "grid 1 2 5 1 2 5": (61.0, 59.5),
    "grid 1 2 4 1 4 7": (62.0, 59.0),
    "halfgrid": (64.0, 62.0),
    "mixed": (58.0, 57.0),
}
CIFAR = {
    "dense": (70.0, 70.0),
    "grid 1 2 2 4 4 7": (75.0, 76.0),
    "grid 1 2 5 1 2 5": (74.0, 74.0),
    "grid 1 2 4 1 4 7": (73.0, 73.0),
    "halfgrid": (71.5, 72.0),
    "mixed": (74.5, 75.0),
}
FOVEA = {"dense": (30.0, 30.0), "grid 1 2 3 4": (35.0, 35.0), "foveal": (36.0, 36.0)}


def row(setting: str, arm: str, seed: int, **values: Any) -> dict[str, Any]:
    common = {"arm": f"{setting}: {arm}", "run": f"{setting}: {values['phase']}", "seed": seed, "device": "cuda: X"}
    return common | {"protocol": settings.HASH, "rate": 0.003, "outcome": "budget"} | values


def confirmed(setting: str, means: dict[str, tuple[float, float]], n: int = 8, **more: Any) -> list[dict[str, Any]]:
    """Scores of a seed share its noise; an arm's own grows with its place."""
    return [
        row(
            setting, arm, 100 + i, phase="confirm", score=test + NOISE[i] * (1 + place / 10),
            curve=[1.0, held + NOISE[-i]], **more,
        )
        for i in range(n)
        for place, (arm, (test, held)) in enumerate(means.items())
    ]  # fmt: skip


def file_of(folder: Path, rows: list[dict[str, Any]], name: str = "evidence-x.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def gathered(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Confirmed]:
    return gather(read([file_of(folder, rows)]))


def test_the_best_grid_is_chosen_by_held_out_scores_and_never_by_test_scores(tmp_path: Path) -> None:
    found = gathered(tmp_path, confirmed("shallow", SHALLOW))["shallow"]
    assert found.best_grid == "grid 1 2 5 1 2 5"
    better = {arm: (1000.0 if arm == "grid 1 2 4 1 4 7" else t, h) for arm, (t, h) in SHALLOW.items()}
    assert gathered(tmp_path, confirmed("shallow", better))["shallow"].best_grid == "grid 1 2 5 1 2 5"


def test_differences_are_paired_and_their_p_values_are_holm_adjusted_over_the_arms(tmp_path: Path) -> None:
    rows = confirmed("shallow", SHALLOW)
    found = gathered(tmp_path, rows)["shallow"]
    scores = {arm: [r["score"] for r in rows if r["arm"] == f"shallow: {arm}"] for arm in SHALLOW}
    base = scores["grid 1 2 5 1 2 5"]
    others = [arm for arm in SHALLOW if arm != "grid 1 2 5 1 2 5"]
    assert list(found.comparisons) == others
    for arm, p in zip(others, holm([sign_flip(scores[arm], base) for arm in others]), strict=True):
        assert found.comparisons[arm].test == paired_difference(scores[arm], base)
        assert found.comparisons[arm].p == p
    assert found.comparisons["halfgrid"].test.mean == pytest.approx(3.0, abs=0.1)
    assert found.comparisons["halfgrid"].held_out.mean == pytest.approx(2.5)
    assert [found.comparisons[arm].clear for arm in ("halfgrid", "mixed")] == [1, -1]


def test_regret_is_the_distance_to_the_best_arm_and_its_maximum_over_settings(tmp_path: Path) -> None:
    flat = confirmed("shallow", SHALLOW) + confirmed("cifar10", CIFAR)
    for each in flat:
        setting, _, arm = each["arm"].partition(": ")
        each["score"] = {"shallow": SHALLOW, "cifar10": CIFAR}[setting][arm][0] + NOISE[each["seed"] - 100]
    lost = regrets(list(gathered(tmp_path, flat).values()))
    assert lost["halfgrid"].by == pytest.approx({"shallow": 0.0, "cifar10": 3.5})
    assert lost["mixed"].by == pytest.approx({"shallow": 6.0, "cifar10": 0.5})
    assert lost["grid, growing"].by == pytest.approx({"shallow": 4.0, "cifar10": 0.0})
    assert lost["grid, third"].by == pytest.approx({"shallow": 2.0, "cifar10": 2.0})
    assert lost[BEST].by == pytest.approx({"shallow": 3.0, "cifar10": 0.0})  # 1 2 5, then the growing one
    assert lost["halfgrid"].worst.mean == pytest.approx(3.5)
    # The noise is the seeds' alone, so that no resampling changes a difference.
    assert (lost["halfgrid"].worst.low, lost["halfgrid"].worst.high) == pytest.approx((3.5, 3.5))
    assert [lost[arm].least for arm in ("halfgrid", "mixed", "grid, third", "grid, growing")] == [1, 0, 1, 0]


def test_an_arm_that_some_settings_lack_is_not_called_the_least_of_all(tmp_path: Path) -> None:
    rows = confirmed("shallow", SHALLOW) + confirmed("depthwise-49", FOVEA)
    found = list(gathered(tmp_path, rows).values())
    lost = regrets(found)
    assert not lost["foveal"].everywhere
    assert math.isnan(lost["foveal"].least)
    assert regrets(found[1:])["foveal"].everywhere
    assert "foveal" in regret.verdict(found[1:])
    text = regret.page(found)
    assert "Preliminary" in text
    assert "| foveal | – | 0.00 | – | – | – | 0.00 (0.00 to 0.00) |" in text


def test_the_verdict_names_the_pattern_that_loses_least_at_worst(tmp_path: Path) -> None:
    found = list(gathered(tmp_path, confirmed("shallow", SHALLOW) + confirmed("cifar10", CIFAR)).values())
    words = regret.verdict(found)
    assert words.startswith("**`halfgrid` loses least at worst among the patterns: 3.")
    assert "among the grids grid, third does: 2." in words
    assert "clearly ahead in 1 and clearly behind in 1 of 2 settings" in words
    assert "shallow (8 of 20)" in words
    assert "depthwise-25 (0 of 20)" in words
    swapped = {arm: (SHALLOW["mixed"] if arm == "halfgrid" else SHALLOW["halfgrid"] if arm == "mixed" else pair)
               for arm, pair in SHALLOW.items()}  # fmt: skip
    found = list(gathered(tmp_path, confirmed("shallow", swapped) + confirmed("cifar10", CIFAR)).values())
    assert regret.verdict(found).startswith("**`mixed` loses least at worst among the patterns: 0.")


def test_all_seeds_of_all_settings_are_no_longer_preliminary(tmp_path: Path) -> None:
    rows = []
    for name, setting in settings.SETTINGS.items():
        means = {arm: (50.0 + i, 50.0) for i, arm in enumerate(setting.arms())}
        rows += [row(name, arm, seed, phase="confirm", score=t + seed % 3, curve=[h]) for seed in settings.CONFIRM
                 for arm, (t, h) in means.items()]  # fmt: skip
    assert "Preliminary" not in regret.verdict(list(gathered(tmp_path, rows).values()))
    assert "Preliminary" in regret.verdict(list(gathered(tmp_path, rows[:-1]).values()))


def test_seconds_come_from_runs_alone_on_the_device_that_trained(tmp_path: Path) -> None:
    costs = [row("shallow", arm, 0, phase="cost", run=f"shallow: {arm}", seconds={"step": 0.001 * (i + 1)})
             for i, arm in enumerate(SHALLOW)]  # fmt: skip
    other = [{**each, "run": "other", "device": "cpu: Y", "seconds": {"step": 9.0}} for each in costs]
    found = gathered(tmp_path, confirmed("shallow", SHALLOW) + other + costs)["shallow"]
    assert found.clock == "cuda: X"
    assert found.seconds["halfgrid"] == 0.005
    assert "5.00 (1.67 ×)" in "\n".join(regret.differences([found]))


def test_rows_of_another_protocol_are_counted_and_left_out(tmp_path: Path) -> None:
    old = confirmed("shallow", dict.fromkeys(SHALLOW, (0.0, 0.0)), n=3, protocol="old", run="old")
    found = gathered(tmp_path, old + confirmed("shallow", SHALLOW))["shallow"]
    assert (len(found.seeds), found.aside) == (8, 3 * len(SHALLOW))
    text = regret.page([found])
    assert "18 rows of other protocols are not counted" in text
    assert "has changed since" not in text
    stale = gathered(tmp_path, old)["shallow"]
    assert "has changed since" in regret.page([stale])
    assert "no setting has 6 pairs" in regret.page([stale])
    assert "## Regret" not in regret.page([stale])


def test_the_runs_of_a_pair_are_of_one_file(tmp_path: Path) -> None:
    few = confirmed("shallow", dict.fromkeys(SHALLOW, (0.0, 0.0)), n=2, device="cuda: A")
    more = confirmed("shallow", SHALLOW, n=4, device="cuda: B")
    extra = [{**each, "seed": 110} for each in few[: len(SHALLOW)]]
    files = [file_of(tmp_path, few + extra, "evidence-a.jsonl"), file_of(tmp_path, more, "evidence-b.jsonl")]
    found = gather(read(files))["shallow"]
    assert found.devices == {100: "cuda: B", 101: "cuda: B", 102: "cuda: B", 103: "cuda: B", 110: "cuda: A"}
    assert found.test["mixed"][100] > 50
    assert found.test["mixed"][110] < 1


def test_a_run_whose_loss_became_no_number_is_told_and_is_worst_on_held_out_images(tmp_path: Path) -> None:
    rows = confirmed("shallow", SHALLOW)
    for each in rows:
        if each["arm"] == "shallow: grid 1 2 5 1 2 5" and each["seed"] == 101:
            each |= {"outcome": "diverged", "curve": []}
    found = gathered(tmp_path, rows)["shallow"]
    assert found.best_grid == "grid 1 2 4 1 4 7"
    assert "1 diverged" in regret.page([found])


def test_the_command_works_with_rates_alone_and_refuses_what_holds_no_runs(tmp_path: Path) -> None:
    choosing = [row("shallow", arm, seed, phase="choose", run=f"choose {rate}", score=None, rate=rate,
                    curve=[h + 100 * rate]) for arm, (_, h) in SHALLOW.items() for rate in (0.001, 0.01)
                for seed in (0, 1)]  # fmt: skip
    failed = {"arm": "shallow: choose 0.01", "run": "shallow: choose 0.01", "seed": 2, "failed": "no"}
    regret.main([str(file_of(tmp_path, [*choosing, failed])), "--out", str(tmp_path)])
    text = (tmp_path / "patterns-regret.md").read_text()
    assert "Nothing is confirmed yet" in text
    assert "| shallow | halfgrid | 62.10 (n 2) | 63.00 (n 2) | +2.50 |" in text
    assert "| shallow | grid 1 2 5 1 2 5 | 59.60 (n 2) | 60.50 (n 2) | +0.00 |" in text
    assert not (tmp_path / "patterns-regret.png").exists()
    with pytest.raises(InputError, match="rows must hold runs of the pattern study, got none in 1 files"):
        regret.main([str(file_of(tmp_path, [failed])), "--out", str(tmp_path)])
    with pytest.raises(InputError, match="rows must name files, got .*nowhere"):
        regret.main([str(tmp_path / "nowhere")])


def test_the_page_and_the_picture_have_every_arm_and_setting(tmp_path: Path) -> None:
    path = file_of(tmp_path, confirmed("shallow", SHALLOW) + confirmed("depthwise-49", FOVEA))
    regret.main([str(path), "--out", str(tmp_path)])
    text = (tmp_path / "patterns-regret.md").read_text()
    assert all(f"| shallow | {arm} |" in text for arm in SHALLOW)
    assert all(f"| depthwise-49 | {arm} |" in text for arm in FOVEA)
    from matplotlib import image

    assert image.imread(tmp_path / "patterns-regret.png").std() > 0.01
