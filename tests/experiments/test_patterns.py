"""The experiment that sets patterns against grids: what its arms share, and how its table counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import widerf
from experiments.patterns.command import ARMS, Problem, batches, network
from experiments.patterns.page import best_rates, steps_to, summary


def problem(side: tuple[int, int], strides: tuple[int, ...] = (1,) * 6) -> Problem:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 3, *side), generator=generator, dtype=torch.uint8)
    part = images, torch.randint(11, (5, *side), generator=generator)
    return Problem(part, part, part, strides, lambda channels: nn.Conv2d(channels, 11, 1), lambda net, batch: 0.0)


@pytest.mark.parametrize("arm", ARMS)
def test_arms_share_their_weights_and_differ_in_their_taps_alone(arm: str) -> None:
    about = problem((20, 24))
    dense, net = network("dense", 3, 8, about), network(arm, 3, 8, about)
    offsets = {name for name, _ in net.named_buffers() if name.endswith("offsets")}
    for name, value in dense.state_dict().items():
        if name not in offsets:
            torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_no_window_is_wider_than_its_map(arm: str) -> None:
    about = problem((16, 16), (2, 1, 1, 2, 1, 1))
    sides = (16, 8, 8, 8, 4, 4)
    layers = [m for m in network(arm, 0, 8, about) if isinstance(m, widerf.SparseConv2d)]
    assert all(max(layer.extent) <= side for layer, side in zip(layers, sides, strict=True))


def test_batches_follow_their_seed_and_mirror_labels_with_images() -> None:
    about = problem((4, 6))
    images = about.train[1][:, None].expand(-1, 3, -1, -1).to(torch.uint8)  # labels as images: both must move together
    first, again, other = (next(batches((images, about.train[1]), seed, 4)) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again)
    assert not torch.equal(first[1], other[1])
    for x, y in (first, other):
        torch.testing.assert_close(x[:, 0], (y.float() / 255 - 0.5) / 0.25)


def record(arm: str, seed: int, scores: list[float], test: float) -> dict[str, Any]:
    figures = {"std": 2.0}
    curve = {"step": [10 * (i + 1) for i in range(len(scores))], "score": scores}
    return {
        "arm": arm, "seed": seed, "rate": 0.01, "curve": curve, "score": scores[-1], "test_score": test,
        "erf_before": figures, "erf_after": figures, "seconds": 3.0 if arm == "dense" else 6.0,
    }  # fmt: skip


def test_steps_are_counted_to_the_first_score_at_the_target() -> None:
    run = record("a", 0, [0.1, 0.5, 0.4, 0.6], 0.0)
    assert [steps_to(run, target) for target in (0.05, 0.5, 0.6, 0.9)] == [10, 20, 40, 40]


def test_the_table_pairs_runs_by_seed() -> None:
    runs = [record("dense", s, [0.2, 0.4], 0.3 + s / 10) for s in range(3)]
    runs += [record("mixed-9", s, [0.4, 0.5], 0.35 + s / 10) for s in (2, 0, 1)]
    tuned = [{"arm": "dense", "rate": 0.01, "score": 0.25}, {"arm": "dense", "rate": 0.03, "score": 0.125}]
    settings = {"steps": 2, "batch": 4, "channels": 8, "size": (4, 6), "rates": [0.01, 0.03], "tune_steps": 1}
    page = summary("camvid", runs, tuned, settings)
    assert "n = 3 paired seeds" in page
    assert "| mixed-9 | 0.01 | 0.4500 | 0.05 (0.05 to 0.05) |" in page  # equal differences: no width
    assert "| 0.5 (0.5 to 0.5) |" in page
    assert "| dense | 0.250 | 0.125 |" in page
    # Held out 0.5 against 0.4 in every pair, no p below 2 / 2³, twice the seconds.
    assert "| mixed-9 | 0.5000 | 0.1 (0.1 to 0.1) | 0.25 | 2 (2 to 2) |" in page
    assert "3 pairs can give no less than 0.25" in page
    assert best_rates(tuned) == {"dense": 0.01}
