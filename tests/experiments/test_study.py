"""The far-pair map: stacked runs are the runs one by one, controls are what they say, the protocol is followed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import widerf
from experiments.compare import arms, draws, stacked, study, study_page, tasks, training, when_to_widen
from experiments.compare.curve import ARRIVED, BUDGET, DIVERGED, Curve
from experiments.compare.far_pair import Stack, far_pair
from experiments.compare.protocol import FOLDER, Protocol, names, protocol, read
from experiments.harness.inputs import InputError
from experiments.harness.ledger import RESULTS
from widerf.init.lasting import profile_of

CPU = torch.device("cpu")
SOME = arms.choose(["he", "xavier", "torch", "orthogonal", "widened-1", "inverse", "shuffled", "dilated"], [])
SOME += arms.choose(["lasting", "lasting_only-0.8", "covariance"], [])


@pytest.mark.parametrize(("depth", "radius"), [(1, 1), (4, 2), (4, 4), (6, 3), (8, 8)])
@pytest.mark.parametrize("taps", ["dense", "dilated"])
def test_a_stack_answers_as_its_networks_do(depth: int, radius: int, taps: str) -> None:
    task = far_pair(radius, depth)
    nets = [arms.Arm("x", base="torch", taps=taps).build(task.network, seed).double() for seed in range(3)]
    images = torch.randn(4, 3, 2 * radius + 3, 2 * radius + 3, dtype=torch.float64)
    answers = Stack(nets)(images)
    for index, net in enumerate(nets):
        torch.testing.assert_close(answers[:, index], net(images[:, index : index + 1]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("arm", SOME, ids=lambda arm: arm.name)
def test_stacked_runs_have_the_curves_and_weights_of_runs_one_by_one(arm: arms.Arm) -> None:
    single = far_pair(2, 2)
    task = dataclasses.replace(
        single,
        validation=(single.validation[0].double(), single.validation[1]),
        batches=lambda seed: ((images.double(), labels) for images, labels in single.batches(seed)),
        steps=32,
        every=3,
        target=0.65,
        lr=1e-2,
    )
    together = [arm.build(task.network, seed).double() for seed in range(4)]
    alone = [arm.build(task.network, seed).double() for seed in range(4)]
    curves, _ = stacked.train(together, task, range(4))
    for seed, net in enumerate(alone):
        curve, _ = training.train(net, task, seed, CPU)
        assert (curve.steps, curve.accuracy) == (curves[seed].steps, curves[seed].accuracy)
        torch.testing.assert_close(curve.loss, curves[seed].loss, rtol=1e-9, atol=0)
        for one, stack in zip(net.parameters(), together[seed].parameters(), strict=True):
            torch.testing.assert_close(one, stack, rtol=1e-7, atol=1e-10)
    assert len({len(curve.steps) for curve in curves}) > 1, "no run left the stack before another one"


@pytest.mark.slow
def test_a_stacked_run_takes_less_than_half_of_the_processor_time_of_a_run_alone() -> None:
    """On one core both are bound by multiplications; what is saved is pixels that the answer does not need."""
    task = dataclasses.replace(far_pair(4), steps=20, target=1.0)
    arm = arms.choose(["he"], [])[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        for _ in range(5):
            nets = [arm.build(task.network, seed) for seed in range(8)]
            started = time.process_time()
            training.train(arm.build(task.network, 0), dataclasses.replace(task, faster=None), 0, CPU)
            between = time.process_time()
            stacked.train(nets, task, range(8))
            ratios.append((between - started) / ((time.process_time() - between) / len(nets)))
    finally:
        torch.set_num_threads(threads)
    assert sorted(ratios)[2] > 2, ratios


def test_the_inverse_takes_as_much_variance_away_as_soft_corners_add() -> None:
    for size in ((3, 3), (5, 5), (3, 5)):
        taps = widerf.geometry.tap_coordinates(size).double()
        flat = torch.full(size, 1.0, dtype=torch.float64) / (size[0] * size[1])
        shapes = (draws.centre_weighted(size, 0.5), flat, widerf.profile.soft_corners(size, 0.5))
        less, uniform, more = ((shape.flatten()[:, None] * taps.reshape(-1, 2) ** 2).sum(0) for shape in shapes)
        torch.testing.assert_close(more - uniform, uniform - less, rtol=1e-6, atol=0)
        assert shapes[0].sum() == pytest.approx(1)


def test_reweighting_by_soft_corners_is_what_the_initialiser_does() -> None:
    network = far_pair(4).network
    ours, theirs = (arms.choose([name], [])[0].build(network, 3) for name in ("he", "widened-0.5"))
    draws.reweight(ours, lambda size: widerf.profile.soft_corners(size, 0.5))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_networks_with_other_profiles_are_no_stack() -> None:
    nets = [arms.choose([name], [])[0].build(far_pair(2, 2).network, 0) for name in ("lasting", "lasting-0.2", "he")]
    for other in nets[1:]:
        with pytest.raises(ValueError, match="nets must share their lasting profiles"):
            Stack([nets[0], other])


@pytest.mark.parametrize("name", ["lasting", "lasting_only"])
def test_lasting_arms_start_as_the_arms_that_do_not_last(name: str) -> None:
    task = far_pair(4)
    twin, arm = (
        arms.choose([kind], [])[0].build(task.network, 0)
        for kind in ("widened-0.5" if name == "lasting" else "he", name)
    )
    images, _ = next(task.batches(0))
    torch.testing.assert_close(twin(images), arm(images), rtol=1e-4, atol=1e-5)
    assert sum(profile_of(module) is not None for module in arm.modules()) == 6


def test_the_covariance_draw_has_the_covariance_that_it_names() -> None:
    # By counting: the taps of very many filters of the last of two layers, whose width is that at depth 1.
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(60, 4000, 3))
    draws.draw(net, "he", 0)
    energy = net[1].weight.square().sum()
    draws.covary(net)
    filters = net[1].weight.detach().double().flatten(0, 1).flatten(1)
    counted, wanted = filters.T @ filters / len(filters), draws.covariance((3, 3), draws.width_at(1.0))
    torch.testing.assert_close(counted / counted.trace(), wanted / wanted.trace(), rtol=0, atol=3e-3)
    torch.testing.assert_close(net[1].weight.square().sum(), energy)


def test_the_covariance_of_a_filter_is_that_of_the_paper_tap_by_tap() -> None:
    # The static part Z ⊗ 1, the shifted blocks, and the block transpose, as written there; its negative part cut off.
    k, width = 5, 0.6

    def bump(y: int, x: int) -> float:
        return math.exp(-(y**2 + x**2) / (2 * width))

    raw = torch.zeros(k * k, k * k, dtype=torch.float64)
    for a, b, c, d in itertools.product(range(-2, 3), repeat=4):
        static, shifted = bump(a, b), bump(c - a, d - b)
        raw[5 * (a + 2) + b + 2, 5 * (c + 2) + d + 2] = static * (shifted - bump(c, d) / 2)
    matrix = (raw + raw.T) / 2
    # The nearest positive semi-definite matrix: what was added is one, too, and orthogonal to it.
    found = draws.covariance((k, k), width)
    added = found - matrix
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-12 and float(torch.linalg.eigvalsh(added).min()) > -1e-12
    assert float((found @ added).abs().max()) < 1e-12
    assert float(added.norm()) < 0.02 * float(matrix.norm())


def test_the_penalty_arm_trains_towards_a_wider_field() -> None:
    stds = {}
    for name in ("he", "penalty-1"):
        arm = arms.choose([name], [])[0]
        task = arm.of(dataclasses.replace(far_pair(2, 3), steps=40, every=20, target=1.0))
        net = arm.build(task.network, 0)
        training.train(net, task, 0, CPU)
        stds[name] = widerf.predict(net, task.erf_size, layer="features").std
    assert stds["penalty-1"] > 1.05 * stds["he"]


@pytest.mark.parametrize("name", ["inverse", "shuffled", "widened-1"])
def test_every_profile_keeps_the_gain_and_the_zeros_of_the_base(name: str) -> None:
    network = far_pair(4).network
    base, arm = (arms.choose([kind], [])[0].build(network, 0) for kind in ("he", name))
    for a, b in zip(base.parameters(), arm.parameters(), strict=True):
        torch.testing.assert_close(a.square().sum(), b.square().sum())
        assert (a[b != 0].sign() == b[b != 0].sign()).all()


def test_shuffled_factors_are_those_of_the_widened_arm_on_other_taps() -> None:
    network = far_pair(4).network
    nets = [arms.choose([name], [])[0].build(network, 0) for name in ("he", "widened-0.5", "shuffled")]
    convs = [[module.weight for module in net.modules() if isinstance(module, nn.Conv2d)] for net in nets]
    moved = 0
    for base, widened, shuffled in zip(*convs, strict=True):
        factors = [(weight / base).mean((0, 1)).flatten() for weight in (widened, shuffled)]
        scaled = [(each / each.norm()).detach() for each in factors]
        torch.testing.assert_close(scaled[0].sort().values, scaled[1].sort().values)
        moved += not torch.allclose(scaled[0], scaled[1])
    assert moved >= 4


def test_every_base_is_drawn_from_the_same_normal_numbers() -> None:
    """Their signs agree, but for the orthogonal one, which turns the draw; its layers are orthogonal up to √2."""
    network = far_pair(4).network
    he, xavier, default, orthogonal = (
        arms.choose([kind], [])[0].build(network, 5) for kind in ("he", "xavier", "torch", "orthogonal")
    )
    for a, b, c in zip(he.parameters(), xavier.parameters(), default.parameters(), strict=True):
        if a.ndim > 1:
            assert (a.sign() == b.sign()).all()
            assert (a.sign() == c.sign()).all()
            bound = a[0].numel() ** -0.5
            assert c.abs().max() <= bound
            assert float(c.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.2)
    weight = orthogonal.features[2].weight.flatten(1)  # type: ignore[union-attr,index]
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("accuracy", "loss", "outcome", "steps"),
    [
        ([0.5, 0.91, 0.92], 0.1, ARRIVED, 20),
        ([0.91, 0.5, 0.92], 0.1, BUDGET, None),
        ([0.91, 0.92, 0.5], 0.1, ARRIVED, 10),
        ([0.5, 0.5, 0.5], float("nan"), DIVERGED, None),
        ([0.5, 0.5, 0.5], float("inf"), DIVERGED, None),
    ],
)
def test_a_crossing_is_two_looks_in_a_row(accuracy: list[float], loss: float, outcome: str, steps: int | None) -> None:
    curve = Curve(0.9)
    for look, value in enumerate(accuracy):
        curve.look(10 * look + 10, value, loss)
    assert (curve.outcome, curve.steps_to_target) == (outcome, steps)
    assert json.loads(json.dumps(curve.record(), allow_nan=False))["outcome"] == outcome


TINY = {
    "seeds": {"choose": [0], "confirm": [100, 102]},
    "rates": [1e-3, 1e-2],
    "arms": ["he", "sparse"],
    "cells": [{"depth": 2, "radius": 1, "steps": 20}, {"depth": 3, "radius": 1, "steps": 20}],
}


@pytest.fixture
def tiny(tmp_path: Path) -> Protocol:
    said = json.loads((FOLDER / "far-pair.json").read_text()) | TINY
    (tmp_path / "protocol.json").write_text(json.dumps(said))
    return read(tmp_path / "protocol.json")


def test_the_map_does_what_the_protocol_says_once_and_goes_on_where_it_was_stopped(
    tiny: Protocol, tmp_path: Path
) -> None:
    ledger = study.ledger(tiny, tmp_path / "map.jsonl")
    for number, stack in enumerate(study.plan(tiny, ledger)):
        for record in study.do(stack, tiny):
            ledger.append(record)
        if number == 2:
            break
    before = ledger.rows()
    half = ledger.path.read_text().splitlines()
    ledger.path.write_text("\n".join(half[:-1]) + "\n")  # as if stopped in the middle of the last stack
    for stack in study.plan(tiny, ledger):
        for record in study.do(stack, tiny):
            ledger.append(record)
    rows = ledger.rows()
    assert [(r["part"], r["depth"], r["arm"]) for r in rows] == [
        *[("choose", 2, "he")] * 2, *[("confirm", 2, "he")] * 2, *[("choose", 2, "sparse")] * 2,
        *[("confirm", 2, "sparse")] * 2, *[("confirm", 3, "he")] * 2, *[("confirm", 3, "sparse")] * 2,
    ]  # fmt: skip
    assert not list(study.plan(tiny, ledger))
    assert {row["protocol"] for row in rows} == {tiny.hash}
    assert {row["seed"] for row in rows if row["part"] == "choose"}.isdisjoint(tiny.confirm)
    for old, new in zip(before, rows, strict=False):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}


def test_the_rate_is_the_one_that_arrives_soonest_and_a_miss_counts_as_the_budget(
    tiny: Protocol, tmp_path: Path
) -> None:
    ledger = study.ledger(tiny, tmp_path / "map.jsonl")
    where = {"part": "choose", "depth": 2, "radius": 1, "arm": "he"}
    for seed, (slow, fast) in enumerate([(15, 10), (15, None), (15, 10)]):
        ledger.append({**where, "seed": seed, "lr": 1e-3, "steps_to_target": slow})
        ledger.append({**where, "seed": seed, "lr": 1e-2, "steps_to_target": fast})
    assert study.rate_of("he", tiny, ledger) == 1e-2  # 40/3 steps against 15


def test_a_diverged_run_is_a_record_and_the_others_of_its_stack_go_on() -> None:
    task = dataclasses.replace(far_pair(1, 2), steps=20)
    nets = [arms.choose(["he"], [])[0].build(task.network, seed) for seed in range(3)]
    with torch.no_grad():
        next(nets[1].parameters()).fill_(float("nan"))
    curves, _ = stacked.train(nets, task, range(3))
    assert [curve.outcome == DIVERGED for curve in curves] == [False, True, False]
    assert [curve.steps[-1] for curve in curves] == [20, 10, 20]


@pytest.mark.parametrize("name", names())
def test_a_protocol_names_arms_and_tasks_that_exist_and_seeds_of_two_kinds(name: str) -> None:
    about = protocol(name)
    assert about.name == name
    assert [arm.name for arm in arms.choose(about.arms, [])] == list(about.arms)
    assert about.baseline in about.arms
    assert max(about.choose, default=0) < 100 <= min(about.confirm)
    assert about.choose or len(about.rates) == 1
    assert len(about.confirm) >= 20
    for cell in about.cells:
        assert cell.task in tasks.TASKS
        assert list(cell.options) == list(about.cells[0].options)


@pytest.mark.slow
def test_the_page_when_to_widen_says_what_the_rows_say() -> None:
    assert (RESULTS / "when-to-widen.md").read_text() == when_to_widen.text()


def test_a_study_page_is_made_from_its_rows_alone(tiny: Protocol, tmp_path: Path) -> None:
    rows = study.ledger(tiny, tmp_path / "map.jsonl")
    for group in study.plan(tiny, rows):
        for record in study.do(group, tiny):
            rows.append(record)
    for record in study.costs(tiny, None, rounds=1, steps=2):
        rows.append(record)
    text = study_page.page(tiny, rows)
    assert "| he | 1, " in text
    assert "## far-pair depth 2 radius 1" in text
    assert tiny.hash in text
    assert "dense" in text.split("Milliseconds of processor time")[1]
    with pytest.raises(InputError, match="must hold runs"):
        study_page.page(tiny, study.ledger(tiny, tmp_path / "none.jsonl"))


def test_a_step_with_a_dead_unit_goes_without_the_penalty() -> None:
    task = dataclasses.replace(far_pair(radius=2, depth=3), steps=2, every=2, penalty=1.0)
    net = arms.choose(["he"], [])[0].build(task.network, 0)
    with torch.no_grad():
        net.features[2].weight.zero_()  # type: ignore[union-attr]
    assert training.penalty(net, task) == 0.0
    curve, _ = training.train(net, task, 0, torch.device("cpu"))
    assert curve.accuracy
