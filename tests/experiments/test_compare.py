"""The main job end to end: bad input, kill and resume, pairing, and the verdict."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.compare import arms, page, tasks, training
from experiments.compare.command import main
from experiments.compare.far_pair import far_pair_batch
from experiments.compare.verdict import Verdict
from experiments.harness.inputs import InputError, main_guard
from tests.experiments.images import write_images

ROOT = Path(__file__).parents[2]
QUICK = ["far-pair", "--radius", "1", "--steps", "20", "--seeds", "2", "--erf-samples", "4", "--arms", "he", "widened",
         "--strengths", "0.5", "--workers", "2"]  # fmt: skip


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "experiments.compare", *map(str, options)]


def results(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(*QUICK, "--out", folder), cwd=ROOT, check=True, capture_output=True)
    return folder


def test_a_run_killed_in_the_middle_and_started_again_gives_the_same_results(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = subprocess.Popen(
        command(*QUICK, "--out", folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(folder.glob("runs/*.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = len(list(folder.glob("runs/*.json")))
    assert not (folder / "results.jsonl").exists()
    assert left < 4
    subprocess.run(command(*QUICK, "--out", folder), cwd=ROOT, check=True, capture_output=True)
    assert results(folder) == results(finished)


def test_one_line_a_run_and_a_self_contained_page(finished: Path) -> None:
    records = results(finished)
    assert [(record["arm"], record["seed"]) for record in records] == [
        ("he", 0), ("widened-0.5", 0), ("he", 1), ("widened-0.5", 1),
    ]  # fmt: skip
    for record in records:
        assert {"steps_to_target", "accuracy", "curve", "erf_before", "erf_after", "torch", "seconds"} - {
            "seconds"
        } <= set(record)
        assert record["erf_before"]["std"] > 0
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 2 * 2  # three pictures, two ERFs an arm
    assert "http" not in page
    assert Verdict(records, target=0.9, longest=20).sentence in page.replace("&#39;", "'")


def test_results_of_other_settings_are_refused_and_kept(finished: Path) -> None:
    before = (finished / "results.jsonl").read_bytes()
    options = [option if option != "20" else "30" for option in QUICK]
    done = subprocess.run(command(*options, "--out", finished), cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--out must be a new folder" in done.stderr
    assert (finished / "results.jsonl").read_bytes() == before


def bad_inputs(folder: Path) -> dict[str, tuple[list[object], str]]:
    corrupt = write_images(folder / "corrupt")
    (corrupt / "cifar10" / "train" / "class3" / "0.png").write_bytes(b"not an image")
    truncated = write_images(folder / "truncated")
    image = truncated / "cifar10" / "test" / "class0" / "1.png"
    image.write_bytes(image.read_bytes()[:60])
    broken_tar = folder / "broken"
    broken_tar.mkdir()
    (broken_tar / "cifar10.tar").write_bytes(b"x" * 2000)
    empty = folder / "empty"
    empty.mkdir()
    few = write_images(folder / "few", classes=4)
    return {
        "no such folder": (["cifar10", "--data-dir", folder / "nowhere"], "--data-dir must be an existing folder"),
        "empty folder": (["cifar10", "--data-dir", empty], "--data-dir must hold cifar10/train"),
        "corrupt image": (["cifar10", "--data-dir", corrupt], "train/class3/0.png"),
        "truncated image": (["cifar10", "--data-dir", truncated], "test/class0/1.png"),
        "broken tar": (["cifar10", "--data-dir", broken_tar], "--data-dir must hold a readable tar"),
        "too few classes": (["cifar10", "--data-dir", few], "10 classes"),
        "unknown arm": (
            ["far-pair", "--arms", "he", "wide"],
            "--arms must be among xavier, he, torch, orthogonal, widened, inverse, shuffled, "
            "lasting, lasting_only, penalty, covariance, sparse, dilated, "
            "got 'wide'",
        ),
        "unknown task": (
            ["far-pear"],
            "task must be one of far-pair, cifar10, plain20, or module:callable, got 'far-pear'",
        ),
        "strength": (["far-pair", "--strengths", "1.5"], "--strengths must be in [0, 1], got 1.5"),
        "seeds": (["far-pair", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        "radius": (["far-pair", "--radius", "9"], "--radius must be from 1 to 6"),
        "device": (["far-pair", "--device", "abacus"], "--device must be auto or a device"),
    }


CASES = ["no such folder", "empty folder", "corrupt image", "truncated image", "broken tar", "too few classes",
         "unknown arm", "unknown task", "strength", "seeds", "radius", "device"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_that_names_it_status_2_and_nothing_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = bad_inputs(tmp_path)[case]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main_guard(lambda: main([*map(str, options), "--out", str(out)]))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()
    assert not (tmp_path / "cache").exists()


def test_bad_input_leaves_no_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        command("far-pair", "--strengths", "1.5", "--out", tmp_path / "o"),
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: --strengths must be in [0, 1], got 1.5\n"
    assert done.stdout == ""


def test_arms_of_a_seed_share_one_base_draw() -> None:
    task = tasks.make("far-pair")
    built = {arm.name: arm.build(task.network, 3) for arm in arms.choose(arms.KINDS, [0.5])}
    he = dict(built["he"].named_parameters())
    for name, weight in built["sparse"].named_parameters():
        assert torch.equal(weight, he[name]), name
    for name, weight in built["xavier"].named_parameters():
        ratio = weight[he[name] != 0] / he[name][he[name] != 0]
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio)) or not len(ratio), name
    widened = dict(built["widened-0.5"].named_parameters())["features.2.weight"]
    assert torch.equal(widened.sign(), he["features.2.weight"].sign())
    assert not torch.allclose(widened, he["features.2.weight"])
    assert torch.isclose(widened.square().sum(), he["features.2.weight"].square().sum())


def test_every_arm_sees_the_same_data_in_the_same_order() -> None:
    task = tasks.make("far-pair")
    first, second = (list(itertools.islice(task.batches(5), 3)) for _ in range(2))
    for (x, y), (u, v) in zip(first, second, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    other = next(task.batches(6))
    assert not torch.equal(first[0][0], other[0])


@pytest.mark.parametrize("radius", [1, 4, 6])
def test_far_pair_is_two_markers_at_opposite_offsets_whose_signs_make_the_label(radius: int) -> None:
    side = 2 * radius + 3
    images, labels = far_pair_batch(500, radius, side, torch.Generator().manual_seed(0))
    for image, label in zip(images[:, 0], labels, strict=True):
        at = (image.abs() == 3).nonzero() - side // 2
        assert len(at) == 2
        assert (at[0] == -at[1]).all()
        assert at.abs().max() == radius
        first, second = image[tuple(at[0] + side // 2)], image[tuple(at[1] + side // 2)]
        assert (first == second) == bool(label)
    assert 0.4 < labels.double().mean() < 0.6


def record(arm: str, seed: int, steps: int | None, std: float = 2.0) -> dict:
    erf = {"std": std}
    return {"task": "t", "arm": arm, "seed": seed, "steps_to_target": steps, "accuracy": 0.9, "test_accuracy": None,
            "erf_before": erf, "erf_after": erf}  # fmt: skip


def test_runs_that_never_arrive_count_as_the_longest_training_and_are_named() -> None:
    records = [record("he", s, steps) for s, steps in enumerate([None, 400, 300])]
    records += [record("widened-0.5", s, steps) for s, steps in enumerate([200, 200, 150])]
    verdict = Verdict(records, target=0.9, longest=800)
    assert verdict.steps("he") == [800, 400, 300]
    assert "1 of 3 he runs" in verdict.sentence
    assert "counted as 800 steps" in verdict.sentence
    assert f"{(200 + 200 + 150) / (800 + 400 + 300):.2f} × the steps of he" in verdict.sentence


def test_a_verdict_without_a_clear_interval_claims_no_speed_up() -> None:
    records = [record("he", s, steps) for s, steps in enumerate([300, 400, 300])]
    records += [record("widened-0.5", s, steps) for s, steps in enumerate([200, 500, 310])]
    assert "no clear difference from he" in Verdict(records, target=0.9, longest=800).sentence


def test_nothing_is_claimed_when_no_run_arrives() -> None:
    records = [record(arm, s, None) for arm in ("he", "widened-0.5") for s in range(3)]
    assert "neither widened-0.5 nor he ever arrived" in Verdict(records, target=0.9, longest=800).sentence


def test_a_dead_run_is_named_and_left_out_of_the_erf_figures_only() -> None:
    records = [record("he", s, 300) for s in range(4)] + [record("widened-0.5", s, 200 + s, std=3.0) for s in range(4)]
    records[5]["erf_after"] = None
    verdict = Verdict(records, target=0.9, longest=800)
    row = verdict.rows[1]
    assert (row.dead, row.n, row.std_after) == (1, 4, 3.0)
    assert row.steps_ratio is not None
    assert row.std_ratio_after is not None
    assert (row.steps_ratio.n, row.std_ratio_after.n) == (4, 3)
    assert "1 of 4 widened-0.5 runs" in verdict.sentence


def test_the_sentence_of_one_arm_says_that_there_is_nothing_to_compare() -> None:
    assert "nothing to compare" in Verdict([record("he", 0, 10)], target=0.9, longest=800).sentence


def test_overrides_reach_the_task_and_change_nothing_else() -> None:
    plain, changed = tasks.make("far-pair"), tasks.make("far-pair", steps=7, lr=None)
    assert changed.steps == 7
    assert dataclasses.replace(plain, steps=7).lr == changed.lr


def test_sparse_arms_keep_the_first_layer_dense_and_the_number_of_weights() -> None:
    task = tasks.make("far-pair")
    dense, sparse = (arms.Arm("x", taps=taps).build(task.network, 0) for taps in ("dense", "sparse"))
    assert type(next(iter(sparse.features))) is nn.Conv2d  # type: ignore[arg-type]
    assert sum(p.numel() for p in dense.parameters()) == sum(p.numel() for p in sparse.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals between processes")
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    process = subprocess.Popen(
        command(*QUICK, "--out", folder),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background inherits that Ctrl-C is ignored, and would pass it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    while not (folder / "settings.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors


def test_a_loss_that_is_no_number_and_a_dead_unit_are_records() -> None:
    task = dataclasses.replace(tasks.make("far-pair", options={"radius": 1, "depth": 2}), steps=20)
    good, dead = (arms.Arm("he").build(task.network, 0) for _ in range(2))
    with torch.no_grad():
        dead.features[2].bias.fill_(-1e3)  # type: ignore[union-attr,index]
    records = []
    for seed, (net, lr) in enumerate([(good, 1e20), (dead, task.lr)]):
        record = training.one_run(net, dataclasses.replace(task, lr=lr), 1000 + seed, torch.device("cpu"), 2)
        records.append({"task": "t", "arm": "he", "seed": seed, **json.loads(json.dumps(record, allow_nan=False))})
    assert [record["outcome"] for record in records] == ["diverged", "budget"]
    assert records[0]["curve"]["step"] == [10], "it went on after its loss was no number"
    assert records[1]["erf_before"] is None
    verdict = Verdict(records, target=0.9, longest=20)
    assert "Diverged (their loss is no number): 1 of 2 he runs" in verdict.notes
    assert "Dead after training (no gradient from the unit): 1 of 2 he runs" in verdict.notes
    assert page.one_run(records[1])[6:8] == ("dead", "dead")


def own_task(radius: int = 1) -> tasks.Task:
    return dataclasses.replace(tasks.make("far-pair", options={"radius": radius, "depth": 2}), name="mine", steps=10)


def test_a_task_of_ones_own_is_named_by_module_and_callable() -> None:
    name = f"{__name__}:own_task"
    assert tasks.make(name, steps=7).steps == 7
    assert tasks.make(name, options={"radius": 2}).validation[0].shape[-1] == 7
    for bad in ("no.such.module:task", f"{__name__}:nothing", f"{__name__}:command", "json:dumps"):
        with pytest.raises(InputError, match="module:callable"):
            tasks.make(bad)


def test_a_claim_needs_a_small_p_and_an_interval_clear_of_one() -> None:
    def pairs(n: int) -> Verdict:
        records = [record("he", s, 300 + 10 * s) for s in range(n)]
        return Verdict(records + [record("widened-0.5", s, 200 + 7 * s) for s in range(n)], target=0.9, longest=800)

    assert pairs(5).headline.startswith("Cannot tell")  # five pairs cannot give a p below .0625
    assert pairs(6).headline.startswith("Yes, faster: widened-0.5 reaches 90% in ")
    slower = Verdict([{**r, "arm": {"he": "widened-0.5"}.get(r["arm"], "he")} for r in pairs(8).records], 0.9, 800)
    assert slower.headline.startswith("No, slower")
    alone = Verdict([record("he", 0, 10)], target=0.9, longest=800)
    assert alone.headline.startswith("No answer")


def test_the_report_in_markdown_has_every_run(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    for run in results(finished):
        assert f"| {run['arm']} | {run['seed']} | {run['outcome']} |" in text
    assert Verdict(results(finished), target=0.9, longest=20).headline in text
