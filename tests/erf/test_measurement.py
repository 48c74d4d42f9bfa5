from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.reference import energy, fingerprint, uniform_stack
from widerf.erf.measurement import measure
from widerf.erf.prediction import predict
from widerf.errors import ClippedWarning

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def plain(
    layers: int, channels: int = 4, rank: int = 2, act: type[nn.Module] | None = None, image: int = 2
) -> nn.Sequential:
    """Layers of 3 taps, zero padding 1, no bias, float64."""
    torch.manual_seed(layers)
    parts: list[nn.Module] = []
    for i in range(layers):
        parts.append(CONV[rank](channels if i else image, channels, 3, padding=1, bias=False))
        parts += [act()] if act else []
    return nn.Sequential(*parts).double()


def he(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            fan = module.weight[0].numel()
            with torch.no_grad():
                module.weight.normal_(0, math.sqrt(2 / fan), generator=generator)


# ── the map is what it should be ───────────────────────────────────────────────────────────────────────────────────


def test_five_layers_of_ones_give_the_trinomial_coefficients() -> None:
    """Luo et al. (2016), section 2.2: with all weights 1 the gradient counts paths."""
    model = plain(5, channels=1, rank=1, image=1)
    for layer in model:
        nn.init.ones_(layer.weight)
    erf = measure(model, (1, 11), samples=2)
    gradient = erf.map.sqrt() / erf.map.sqrt().min()
    assert gradient.tolist() == pytest.approx([1, 5, 15, 30, 45, 51, 45, 30, 15, 5, 1], abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_signs_converge_to_the_energy_summed_channel_by_channel(rank: int) -> None:
    model = plain(3, rank=rank)
    exact = energy(model, torch.zeros(1, 2, *(9,) * rank, dtype=torch.float64), (4,) * rank)
    exact /= exact.sum()
    errors = []
    for samples in (32, 512):
        erf = measure(model, (2, *(9,) * rank), samples=samples, batch_size=32)
        errors.append(float((erf.map - exact).abs().sum()))
    assert errors[1] < 0.15
    # 16 times the draws: a quarter of the error.
    assert 0.12 < errors[1] / errors[0] < 0.5


def test_a_nonlinear_net_is_averaged_over_the_images_given() -> None:
    model = plain(3, act=nn.Tanh)
    images = torch.randn(4, 2, 9, 9, dtype=torch.float64)
    exact = energy(model, images, (4, 4))
    erf = measure(model, (2, 9, 9), inputs=images.repeat(200, 1, 1, 1), samples=800, batch_size=100)
    assert erf.samples == 800
    assert float((erf.map - exact / exact.sum()).abs().sum()) < 0.1


@pytest.mark.parametrize("unit", [(0, 0), (2, 6), (-1, 3)])
def test_any_unit_of_any_layer(unit: tuple[int, int]) -> None:
    model = plain(4)
    exact = energy(model[:2], torch.zeros(1, 2, 9, 9, dtype=torch.float64), unit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        erf = measure(model, (2, 9, 9), layer="1", unit=unit, samples=512, batch_size=128)
    assert float((erf.map - exact / exact.sum()).abs().sum()) < 0.1
    assert erf.center == tuple(float(i % 9) for i in unit)
    assert erf.trf_size == (5, 5)


def test_several_units_add_their_energies() -> None:
    model = plain(2)
    zeros = torch.zeros(1, 2, 13, 13, dtype=torch.float64)
    exact = energy(model, zeros, (4, 4)) + energy(model, zeros, (6, 9))
    erf = measure(model, (2, 13, 13), unit=[(4, 4), (6, 9)], samples=512, batch_size=128)
    assert float((erf.map - exact / exact.sum()).abs().sum()) < 0.1
    assert (erf.center, erf.trf_size) == ((5.0, 6.5), (7, 10))


def test_a_layer_overwritten_in_place_is_seen_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)).double()
    images = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    exact = energy(model[:1], images, (4, 4))
    erf = measure(model, (2, 9, 9), layer="0", inputs=images.expand(600, -1, -1, -1), samples=600, batch_size=200)
    assert float((erf.map - exact / exact.sum()).abs().sum()) < 0.1


@pytest.mark.parametrize("layers", [5, 10, 20, 40])
def test_two_sigma_sizes_of_uniform_stacks_lie_in_their_intervals(layers: int) -> None:
    side = 2 * layers + 1
    truth = uniform_stack(layers)
    model = plain(layers, channels=12, image=12).float()
    erf = measure(model, (12, side, side), samples=32, redraw=he)
    assert erf.clipped == 0
    low, high = erf.interval("std", 0.99)
    assert low < math.sqrt(layers * 2 / 3) < high
    for of in ("energy", "amplitude"):
        values = truth if of == "energy" else truth.sqrt()
        size = float((values > 0.0455 * values.max()).sum()) ** 0.5
        low, high = erf.interval("size", 0.99, of=of)
        assert low <= size <= high, (of, erf.size(of=of), size)
        assert high - low < 0.25 * size


def test_the_95_per_cent_interval_covers_the_truth_in_90_to_99_per_cent_of_200_repetitions() -> None:
    model = plain(3)
    exact = energy(model, torch.zeros(1, 2, 9, 9, dtype=torch.float64), (4, 4))
    from widerf.erf.map import ERF

    truth = ERF.from_energy(exact, center=(4, 4), trf_size=(7, 7))
    hits = {"std": 0, "excess_kurtosis": 0}
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        erf = measure(model, (2, 9, 9), samples=32, batch_size=32, generator=generator)
        for figure in hits:
            low, high = erf.interval(figure)
            hits[figure] += low <= getattr(truth, figure) <= high
    assert 180 <= hits["std"] <= 198, hits
    assert 180 <= hits["excess_kurtosis"] <= 198, hits


@pytest.mark.slow
def test_the_interval_over_redraws_covers_the_expected_std() -> None:
    """Truth: 3 layers of 3 uniform taps have variance 3 · 2/3."""
    model = plain(3, channels=8, image=8).float()
    hits = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        low, high = measure(model, (8, 7, 7), samples=32, redraw=he, generator=generator).interval()
        hits += low <= math.sqrt(2) <= high
    assert 180 <= hits <= 198, hits


# ── the ways to give images ────────────────────────────────────────────────────────────────────────────────────────


def test_all_ways_to_give_the_same_images_give_the_same_map() -> None:
    model = plain(2, act=nn.Tanh).float()
    images = torch.randn(12, 2, 9, 9)
    data = TensorDataset(images, torch.zeros(12))

    def generated() -> Iterator[Tensor]:
        yield from images

    sources: list[Any] = [
        images,
        list(images),
        generated(),
        images.split(5),
        DataLoader(data, batch_size=5),
        [{"image": images, "label": torch.zeros(12)}],
        ((i, 0) for i in images),
    ]
    found = [measure(model, (2, 9, 9), inputs=source, batch_size=4) for source in sources]
    assert all(erf.samples == 12 for erf in found)
    assert all(torch.equal(erf.map, found[0].map) for erf in found)


def silent(channels: int = 24) -> nn.Module:
    """A stem and what is left of a residual network whose branches are silent: pointwise layers and batch norm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for _ in range(2):
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False)]
    return nn.Sequential(*layers).double().train()


def test_the_share_that_batch_statistics_spread_falls_as_one_over_the_images() -> None:
    shares = []
    for batch in (1, 2, 4, 8):
        erf = measure(silent(), (3, 15, 15), samples=192, batch_size=batch)
        shares.append(1 - float(erf.map[6:9, 6:9].sum()))
    slope = torch.tensor(shares).log2().diff().mean()
    assert abs(slope + 1) < 0.15


def test_in_training_mode_the_default_is_what_predict_sees() -> None:
    model = silent()
    measured = measure(model, (3, 15, 15), samples=256)
    predicted = predict(model, (3, 15, 15))
    assert torch.equal(measured.map, measure(model, (3, 15, 15), samples=256, batch_size=1).map)
    assert abs(predicted.std / measured.std - 1) < 0.05 + 2 * measured.standard_error("std") / measured.std


def test_no_more_images_are_taken_than_asked_for() -> None:
    taken = []

    def endless() -> Iterator[Tensor]:
        while True:
            taken.append(1)
            yield torch.randn(2, 9, 9)

    assert measure(plain(1), (2, 9, 9), inputs=endless(), samples=10).samples == 10
    assert len(taken) == 10


def test_redraw_finds_the_model_as_given_each_time() -> None:
    model = plain(2)
    given = model[0].weight.detach().clone()
    seen = []

    def redraw(m: nn.Module, generator: torch.Generator) -> None:
        seen.append(torch.equal(m[0].weight, given))
        he(m, generator)

    before = fingerprint(model)
    assert measure(model, (2, 9, 9), samples=5, redraw=redraw, batch_size=3).samples == 5
    assert seen == [True] * 5
    assert fingerprint(model) == before


def test_rtol_stops_at_the_precision_asked_for() -> None:
    model = plain(3)
    loose = measure(model, (2, 9, 9), samples=4000, rtol=0.03)
    tight = measure(model, (2, 9, 9), samples=4000, rtol=0.01)
    assert loose.standard_error() <= 0.03 * loose.std
    assert tight.standard_error() <= 0.01 * tight.std
    assert 8 <= loose.samples < tight.samples < 4000


def test_the_standard_error_falls_with_the_root_of_the_draws() -> None:
    model = plain(3)
    draws = [32, 128, 512, 2048]
    errors = [measure(model, (2, 9, 9), samples=n, batch_size=32).standard_error() for n in draws]
    logs = torch.tensor([draws, errors]).log()
    slope = torch.linalg.lstsq(torch.stack([logs[0], torch.ones(4)], 1), logs[1]).solution[0]
    assert -0.7 < slope < -0.3


def test_equal_generators_give_equal_maps_and_the_default_repeats() -> None:
    model = nn.Sequential(*plain(2), nn.Dropout(0.5))

    def once(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return measure(model, (2, 9, 9), samples=4, generator=generator).map

    assert torch.equal(once(3), once(3))
    assert torch.equal(once(None), once(None))
    assert not torch.equal(once(3), once(4))


def test_a_progress_bar_counts_draws(capsys: pytest.CaptureFixture[str]) -> None:
    measure(plain(1), (2, 9, 9), samples=4, progress=True)
    assert "4/4" in capsys.readouterr().err
    measure(plain(1), (2, 9, 9), samples=4)
    assert capsys.readouterr().err == ""


# ── the border and the theoretical field ───────────────────────────────────────────────────────────────────────────


def test_the_centre_is_that_of_the_unit_and_not_of_the_image() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2))
    erf = measure(model, (1, 64, 64), samples=16)
    assert erf.center == (34.0, 34.0)
    assert erf.untraced is None
    assert erf.centroid == pytest.approx((34, 34), abs=1.5)


def test_an_input_larger_than_the_field_clips_nothing_and_a_smaller_one_says_so() -> None:
    model = plain(10, channels=8)
    whole = measure(model, (2, 21, 21), samples=64, batch_size=32)
    assert whole.clipped == 0
    with pytest.warns(ClippedWarning, match=r"\(21, 21\)"):
        part = measure(model, (2, 9, 9), samples=64, batch_size=32)
    inside = float(whole.map[6:15, 6:15].sum())
    assert part.clipped >= 0.7 * (1 - inside)


class Opaque(torch.autograd.Function):
    """An operator that no trace can see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.cummax(x, -1).values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Opaque.apply(x)


def test_where_the_trace_cannot_say_the_cell_stands_in_and_it_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        erf = measure(nn.Sequential(Wrapped(), nn.Conv2d(1, 4, 4, stride=4)), (1, 16, 16), samples=8)
    assert "cummax" in (erf.untraced or "")
    assert erf.center == (9.5, 9.5)
    assert erf.trf_size is None


# ── bad input, and the model afterwards ────────────────────────────────────────────────────────────────────────────


class Dead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (-x.abs()).relu() + 0 * x


def test_a_dead_unit_is_said_to_be_dead() -> None:
    with pytest.raises(ValueError, match="no gradient reaches the input: dead or silent unit"):
        measure(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), Dead()), (1, 9, 9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": "3"}, ValueError, "layer must be one of"),
        ({"unit": (9, 0)}, ValueError, r"unit must lie on the map of shape \(9, 9\), got \(9, 0\)"),
        ({"unit": [(0, 0), (9, 9)]}, ValueError, "unit must lie on the map"),
        ({"unit": "center"}, TypeError, "unit must hold integers only"),
        ({"unit": []}, ValueError, "unit must"),
        ({"samples": 0}, ValueError, "samples must be a positive integer, got 0"),
        ({"rtol": 0.0}, ValueError, "rtol must be positive"),
        ({"batch_size": 0}, ValueError, "batch_size must be positive"),
        ({"redraw": 3}, TypeError, "redraw must be callable"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
        ({"inputs": 3}, TypeError, "inputs must be a tensor, an iterable or None"),
        ({"inputs": ["a"]}, TypeError, "inputs must yield tensors"),
        ({"inputs": torch.zeros(2, 3, 9, 9)}, ValueError, r"inputs must have the shape of input_size \(2, 9, 9\)"),
        ({"inputs": torch.zeros(2, 2, 9, 9, dtype=torch.uint8)}, TypeError, "inputs must hold floating-point images"),
        ({"inputs": []}, ValueError, "inputs must hold at least one image"),
        ({"inputs": torch.full((1, 2, 9, 9), math.nan)}, ValueError, "inputs must be finite"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = plain(2)
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        measure(model, (2, 9, 9), **arguments)
    assert fingerprint(model) == before


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got 'function'"):
        measure(lambda x: x, (2, 9, 9))  # type: ignore[arg-type]


@pytest.mark.parametrize("train", [True, False])
def test_the_model_and_the_random_state_are_bit_identical_afterwards(train: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.1)).train(train)
    model(torch.randn(2, 2, 9, 9)).sum().backward()
    before = fingerprint(model)
    measure(model, (2, 9, 9), samples=4)
    assert fingerprint(model) == before

    def interrupt(m: nn.Module, _: torch.Generator) -> None:
        nn.init.zeros_(m[0].weight)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, (2, 9, 9), samples=4, redraw=interrupt)
    assert fingerprint(model) == before


def test_inference_mode_around_it_does_not_matter() -> None:
    model = plain(2)
    with torch.inference_mode():
        inside = measure(model, (2, 9, 9), samples=4).map
    assert torch.equal(inside, measure(model, (2, 9, 9), samples=4).map)
