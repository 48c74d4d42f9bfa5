"""What the initialiser does to kernels: the profile, the signal that is kept, the base draws."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.reference import fingerprint, shares, stack
from widerf.init import apply, periphery_
from widerf.profile import soft_corners

pytestmark = pytest.mark.usefixtures("double_precision")


# ── the profile lands on the weights
# ────────────────────────────────────────────────────────────────────────────────────

LAYERS = {
    "1-D": lambda: nn.Conv1d(4, 6, 5),
    "2-D": lambda: nn.Conv2d(4, 6, 3),
    "3-D": lambda: nn.Conv3d(4, 6, 3),
    "rectangular": lambda: nn.Conv2d(4, 6, (3, 7)),
    "even": lambda: nn.Conv2d(4, 6, 4),
    "row": lambda: nn.Conv2d(4, 6, (1, 5)),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 5, groups=4),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2),
    "transposed 1-D": lambda: nn.ConvTranspose1d(4, 6, 5),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "complex": lambda: nn.Conv2d(4, 6, 3, dtype=torch.complex128),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_relative_energy_of_each_tap_becomes_the_profile(make: object) -> None:
    layer = make()  # type: ignore[operator]
    rank = layer.weight.ndim - 2
    before = layer.weight.detach().clone()
    (row,) = apply(nn.Sequential(layer), 0.6)
    assert row.verdict == "widened" and row.strength == 0.6
    profile = soft_corners(layer.kernel_size, 0.6) * math.prod(layer.kernel_size)
    ratio = (layer.weight / before).abs() ** 2
    scale = float(before.abs().square().sum() / (before.abs().square() * profile).sum())
    assert torch.allclose(ratio, (profile * scale).expand_as(ratio), rtol=1e-12)
    weight = layer.weight.detach()
    assert float(weight.abs().square().sum() / before.abs().square().sum()) == pytest.approx(1, abs=1e-12)
    assert row.std_after > row.std_before > 0
    assert rank == len(row.kernel_size)


def test_energies_are_the_profile_when_they_were_uniform() -> None:
    layer = nn.Conv2d(64, 64, 5)
    nn.init.ones_(layer.weight)
    (row,) = apply(nn.Sequential(layer), 0.5)
    assert torch.allclose(shares(layer.weight), soft_corners((5, 5), 0.5), atol=1e-12)
    assert row.std_before == pytest.approx(math.sqrt(2.0)) and row.std_after == pytest.approx(math.sqrt(3.0))


@given(st.integers(1, 3), st.lists(st.integers(1, 6), min_size=3, max_size=3), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_sum_of_squares_is_kept(rank: int, size: list[int], strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, *size[:rank], generator=generator)
    wide = periphery_(weight.clone(), strength)
    assert float(wide.square().sum() / weight.square().sum()) == pytest.approx(1.0, abs=1e-12)


def test_strength_zero_is_bit_identical_to_no_call() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 5)))
    before = copy.deepcopy(model.state_dict())
    report = apply(model, 0.0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [row.verdict for row in report] == ["strength 0: as it was"] * 2
    weight = torch.randn(4, 4, 3, 3)
    assert torch.equal(periphery_(weight.clone(), 0.0), weight)


def test_strength_one_leaves_the_four_corners() -> None:
    weight = periphery_(torch.ones(2, 2, 5, 5), 1.0)
    assert int((weight[0, 0] != 0).sum()) == 4
    assert torch.allclose(weight[weight != 0], torch.tensor(2.5))


def test_three_by_three_is_its_closed_form() -> None:
    s = 0.37
    weight = periphery_(torch.ones(1, 1, 3, 3), s)[0, 0] ** 2 / 9
    closed = [(2 + s) ** 2 / 36, (2 + s) * (1 - s) / 18, (1 - s) ** 2 / 9]
    assert torch.allclose(weight[[0, 0, 1], [0, 1, 1]], torch.tensor(closed), atol=1e-8)


def test_variance_is_linear_and_monotone_in_strength() -> None:
    strengths = torch.linspace(0, 1, 11)
    variances = []
    for strength in strengths.tolist():
        layer = nn.Conv2d(2, 2, (5, 3))
        nn.init.ones_(layer.weight)
        (row,) = apply(nn.Sequential(layer), strength)
        variances.append(row.std_after**2)
    steps = torch.tensor(variances).diff()
    assert float(steps.min()) > 0 and torch.allclose(steps, steps.mean().expand(10), rtol=1e-7)


# ── the signal
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_activation_variance_stays_that_of_he_layer_by_layer_in_the_interior(strength: float) -> None:
    layers, width, draws = 20, 64, 32
    energy = {arm: torch.zeros(draws, layers) for arm in ("he", "wide")}
    for draw, arm in itertools.product(range(draws), energy):
        torch.manual_seed(draw)
        x = torch.randn(2, width, 6, 6, dtype=torch.float32)
        for index in range(layers):
            weight = nn.init.kaiming_normal_(torch.empty(width, width, 3, 3, dtype=torch.float32))
            if arm == "wide":
                periphery_(weight, strength)
            x = nn.functional.conv2d(
                nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight
            )  # a torus has no border
            energy[arm][draw, index] = x.square().mean().log()
            x = x.relu()
    difference = (energy["wide"] - energy["he"]).mean(0)
    error = torch.stack([e.var(0) for e in energy.values()]).sum(0).div(draws).sqrt()
    assert bool((difference.abs() <= 4 * error).all()), difference / error
    assert float(4 * error[-1]) < 1.2, "a loss of 6 % a layer, as bare depthwise layers have, must show"


def test_without_restoring_the_scale_small_depthwise_layers_would_drift() -> None:
    """The check above must be able to fail: bare √(n·v) changes Σ w² of a depthwise layer by several per cent."""
    drifts = []
    for seed in range(50):
        torch.manual_seed(seed)
        weight = torch.randn(16, 1, 3, 3)
        bare = weight * (9 * soft_corners((3, 3), 1.0)).sqrt()
        drifts.append(float(bare.square().sum() / weight.square().sum()) - 1)
        kept = periphery_(weight.clone(), 1.0)
        assert float(kept.square().sum() / weight.square().sum()) == pytest.approx(1, abs=1e-12)
    assert torch.tensor(drifts).std() > 0.05


@pytest.mark.parametrize(("kernel", "stride"), [(6, 2), (9, 3), (5, 2), (7, 2)])
def test_output_phases_of_transposed_layers_keep_their_energy(kernel: int, stride: int) -> None:
    layer = nn.ConvTranspose2d(8, 8, kernel, stride=stride, bias=False)
    before = layer.weight.detach().clone()
    (row,) = apply(nn.Sequential(layer), 0.7)
    assert row.verdict == "widened"
    for y, x in itertools.product(range(stride), repeat=2):
        old, new = (w[..., y::stride, x::stride] for w in (before, layer.weight.detach()))
        assert float(new.square().sum() / old.square().sum()) == pytest.approx(1.0, abs=1e-12)
        if max(new.shape[2:]) > 2:
            assert torch.allclose(new, periphery_(old.clone(), 0.7), rtol=1e-10)


@pytest.mark.parametrize(("kernel", "stride"), [(6, 2), (5, 2), (3, 2)])
@pytest.mark.parametrize("base", ["kaiming_normal", "kaiming_uniform"])
def test_output_phases_of_drawn_transposed_layers_are_equal(kernel: int, stride: int, base: str) -> None:
    layer = nn.ConvTranspose2d(64, 128, kernel, stride=stride, bias=False)
    apply(nn.Sequential(layer), 0.5, base=base)
    y = layer(torch.randn(2, 64, 14, 14) / 2**0.5)[..., 2 * kernel : -2 * kernel, 2 * kernel : -2 * kernel]
    energies = torch.stack([y[..., a::stride, b::stride].square().mean() for a in range(stride) for b in range(stride)])
    # He: twice the mean square of the input, which is that of a rectified N(0, 1), in every phase.
    assert torch.allclose(energies, torch.ones(stride**2), atol=0.12), energies


def test_no_random_number_is_drawn_without_base() -> None:
    model = stack(3)
    state = torch.get_rng_state()
    apply(model, 0.5, input_size=(3, 32, 32))
    apply(model, target=1.03, input_size=(3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)


# ── base initialisations
# ────────────────────────────────────────────────────────────────────────────────────────────────

BASES = ["kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "orthogonal"]


@pytest.mark.parametrize("base", BASES)
def test_base_draws_what_torch_draws_for_an_ungrouped_convolution(base: str) -> None:
    model, twin = nn.Sequential(nn.Conv2d(4, 6, 3)), nn.Conv2d(4, 6, 3)
    apply(model, 0.0, base=base, generator=torch.Generator().manual_seed(3))
    getattr(nn.init, f"{base}_")(twin.weight, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model[0].weight, twin.weight)


@pytest.mark.parametrize("base", BASES)
def test_equal_generators_give_equal_draws_and_leave_the_global_one_alone(base: str) -> None:
    first, second = stack(3), stack(3)
    state = torch.get_rng_state()
    for model in (first, second):
        apply(model, 0.5, base=base, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("groups", [1, 4, 64])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_fans_are_those_of_the_layer(kind: type[nn.Module], groups: int) -> None:
    layer = kind(64, 128, 5, groups=groups)
    per_group = (64 // groups, 128 // groups)
    for base, fan in (("kaiming_normal", per_group[0] * 25), ("xavier_normal", sum(per_group) * 25)):
        apply(nn.Sequential(layer), 0.0, base=base)
        assert float(layer.weight.detach().square().mean()) == pytest.approx(2 / fan, rel=0.1)


def test_orthogonal_is_orthogonal_in_every_group() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    apply(nn.Sequential(layer), 0.0, base="orthogonal")
    for group in layer.weight.detach().flatten(1).chunk(2):
        assert torch.allclose(group @ group.T, torch.eye(4), atol=1e-12)


def test_base_draws_layers_that_cannot_be_widened_too() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3))
    apply(model, 0.5, base=nn.init.ones_)
    assert torch.equal(model[0].weight, torch.ones(8, 8, 1, 1))
    assert torch.allclose(shares(model[1].weight), soft_corners((3, 3), 0.5))


def test_a_base_that_fails_midway_leaves_the_model_as_it_was() -> None:
    model, calls = stack(4), []

    def base(weight: Tensor) -> None:
        weight.fill_(1.0)
        calls.append(1)
        if len(calls) == 3:
            raise OverflowError("no more")

    before = fingerprint(model)
    with pytest.raises(OverflowError, match="no more"):
        apply(model, 0.5, base=base)
    assert [entry for entry in fingerprint(model) if "_widerf" not in str(entry[1])] == before
