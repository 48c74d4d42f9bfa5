"""The initialiser: what it keeps, what it changes, and what it says."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import widerf
from tests.reference import fingerprint
from widerf.init import apply, periphery_
from widerf.profile import soft_corners


@pytest.fixture(autouse=True)
def _double() -> object:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def shares(weight: Tensor, rank: int = 2) -> Tensor:
    energy = weight.detach().double().square().sum(dim=tuple(range(weight.ndim - rank)))
    return energy / energy.sum()


def stack(layers: int, width: int = 8, kernel_size: int = 3, rank: int = 2) -> nn.Sequential:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    convs = [kind(width if i else 3, width, kernel_size, padding=kernel_size // 2, bias=False) for i in range(layers)]
    return nn.Sequential(*itertools.chain.from_iterable((conv, nn.ReLU()) for conv in convs))


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


# ── what is left alone, and refusals
# ────────────────────────────────────────────────────────────────────────────────────


def test_every_layer_has_its_verdict() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 2), nn.Conv2d(8, 8, 4, stride=4),
        nn.ConvTranspose2d(8, 8, 4, stride=2), nn.Linear(8, 8),
    )  # fmt: skip
    verdicts = [row.verdict for row in apply(model, 0.5)]
    assert verdicts == [
        "widened",
        "1×1 kernel: no periphery",
        "2×2 kernel: all taps are corners already",
        "patchify (stride ≥ kernel): neighbouring outputs share no input",
        "2×2 taps per output phase: all taps are corners already",
    ]


def test_dirac_zero_and_broken_weights_are_left_alone_and_told() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    nn.init.dirac_(model[0].weight)
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[2].weight, math.nan)
    before = copy.deepcopy(model.state_dict())
    report = apply(model, 0.5)
    assert [row.verdict.split(":")[1].split("(")[0].strip() for row in report] == [
        "empty periphery", "all its weights are zero", "its weights are not finite",
    ]  # fmt: skip
    assert all(
        torch.equal(a, b) or bool(a.isnan().any())
        for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert any("Dirac" in text for text in report.warnings)


def test_tied_weights_are_changed_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    alone = periphery_(model[0].weight.detach().clone(), 0.5)
    report = apply(model, 0.5)
    assert [row.verdict for row in report] == ["widened", "tied to 0: changed there, once"]
    assert torch.equal(model[1].weight, alone) and model[1].weight is model[0].weight


def test_frozen_layers_are_left_alone_unless_they_are_named() -> None:
    model = stack(2).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    report = apply(model, 0.5)
    assert all(row.verdict.startswith("frozen") for row in report) and "frozen" in report.warnings[0]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(row.widened for row in apply(model, 0.5, only="*"))
    assert not any(p.requires_grad for p in model.parameters())


def test_only_and_skip_pick_by_name_by_parent_and_by_class() -> None:
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "body": stack(2), "one": nn.Conv1d(3, 3, 3)})
    picked = lambda **how: [row.name for row in apply(model, 0.5, dry_run=True, **how) if row.widened]  # noqa: E731
    assert picked(only="body") == ["body.0", "body.2"]
    assert picked(only=["stem", nn.Conv1d]) == ["stem", "one"]
    assert picked(skip="body.*") == ["stem", "one"]
    assert picked(only=nn.Sequential, skip="body.2") == ["body.0"]


def test_refusals_name_argument_rule_and_value() -> None:
    model = stack(2)
    cases = [
        ({"strength": 1.5}, ValueError, r"strength must be in \[0, 1\], got 1.5"),
        ({"strength": math.nan}, ValueError, "strength must be"),
        ({"strength": "much"}, TypeError, "strength must be a number"),
        ({"base": "kaming_normal"}, ValueError, "base must be one of .*did you mean 'kaiming_normal'"),
        ({"base": 3}, TypeError, "base must be a name, a callable or None"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
        ({"only": "layer9"}, ValueError, "only must match a convolution of the model in every entry, got 'layer9'"),
        ({"skip": 3.0}, TypeError, "skip"),
        ({"target": 1.1}, ValueError, "input_size must be given together with target"),
        ({"target": 0.9, "input_size": (3, 32, 32)}, ValueError, "target must be at least 1"),
    ]
    before = fingerprint(model)
    for arguments, error, match in cases:
        with pytest.raises(error, match=match):
            apply(model, **arguments)  # type: ignore[arg-type]
    assert fingerprint(model) == before
    with pytest.raises(ValueError, match="model must hold at least one convolution, got 'Linear'"):
        apply(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        apply("resnet18")  # type: ignore[arg-type]


@pytest.mark.parametrize("hollow", [lambda: nn.LazyConv2d(8, 3), lambda: nn.Conv2d(8, 8, 3, device="meta")])
def test_nothing_is_half_done_when_a_layer_is_refused(hollow: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), hollow())  # type: ignore[operator]
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"hold values in every layer that is to change, got '1 \("):
        apply(model, 0.5)
    assert torch.equal(model[0].weight, before) and not hasattr(model[0], "_widerf_profile")
    assert [row.verdict for row in apply(model, 0.5, skip="1")] == ["widened", "not selected"]
    assert len(apply(model, 0.5, dry_run=True)) == 2


def test_lazy_layers_are_widened_after_their_first_forward() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3))
    model(torch.randn(1, 3, 8, 8))
    assert apply(model, 0.5)[0].verdict == "widened"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_type_and_energy(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(64, 64, 3, dtype=dtype)
    before = layer.weight.detach().clone()
    (row,) = apply(nn.Sequential(layer), 0.5)
    assert row.verdict == "widened" and layer.weight.dtype == dtype
    now = layer.weight.detach().double()
    assert float(now.square().sum() / before.double().square().sum()) == pytest.approx(1, abs=3e-3)
    ratio = shares(layer.weight) / shares(before) / soft_corners((3, 3), 0.5) / 9
    assert torch.allclose(ratio / ratio.mean(), torch.ones(3, 3), atol=5e-3)


def test_memory_format_and_identity_of_parameters_are_kept() -> None:
    model = stack(2).to(memory_format=torch.channels_last)
    parameters = [(p, p.stride(), p.data_ptr()) for p in model.parameters()]
    apply(model, 0.5, base="orthogonal")
    now = list(model.parameters())
    assert all(p is q and s == q.stride() and d == q.data_ptr() for (p, s, d), q in zip(parameters, now, strict=True))


# ── calling it again
# ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_strength_is_a_state_that_the_last_call_sets() -> None:
    model = stack(3)
    once, twice, back = (copy.deepcopy(model) for _ in range(3))
    apply(once, 0.7)
    for strength in (0.3, 0.7, 0.7):
        report = apply(twice, strength)
    assert all(row.verdict == "widened by an earlier call" for row in report)
    for strength in (0.9, 0.0):
        apply(back, strength)
    for mine, other in ((once, twice), (model, back)):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=0)


def test_the_state_survives_a_copy_and_a_save(tmp_path: object) -> None:
    model = stack(2)
    apply(model, 0.5)
    for other in (copy.deepcopy(model), copy.deepcopy(model).float(), copy.deepcopy(model).half().float()):
        assert all(row.verdict == "widened by an earlier call" for row in apply(other, 0.5))


def test_trained_since_is_widened_once_more_and_said() -> None:
    model = stack(2)
    apply(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(0.05 * torch.randn_like(model[0].weight))
    report = apply(model, 0.5)
    assert [row.verdict for row in report] == ["widened", "widened by an earlier call"]
    assert any(text.startswith("0: widened by an earlier call and changed since") for text in report.warnings)


def test_loaded_wide_weights_are_told() -> None:
    source, model = stack(1, width=64), stack(1, width=64)
    apply(source, 0.8)
    model.load_state_dict(source.state_dict())
    assert any("wider than uniform weights before this call" in text for text in apply(model, 0.5).warnings)
    assert not apply(stack(1, width=64), 0.5).warnings


def test_from_strength_one_only_a_draw_leads_back() -> None:
    model = stack(1)
    apply(model, 1.0)
    report = apply(model, 0.5)
    assert report[0].verdict.startswith("left alone: at strength 1 already") and report.warnings
    assert apply(model, 0.5, base="kaiming_normal")[0].verdict == "widened"
    assert bool((model[0].weight != 0).all())


# ── the whole network
# ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_target_is_reached_as_predicted() -> None:
    model = stack(6, width=16)
    before = widerf.predict(model, (3, 48, 48)).std
    report = apply(model, target=1.08, input_size=(3, 48, 48))
    assert report.gain == pytest.approx(1.08, rel=2e-3)
    assert widerf.predict(model, (3, 48, 48)).std / before == pytest.approx(1.08, rel=2e-3)


def test_target_beyond_the_network_names_its_limit_and_changes_nothing() -> None:
    model = stack(5, width=32)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"target must be at most 1\.[12]\d\d, the largest gain that this network"):
        apply(model, target=1.5, input_size=(3, 40, 40))
    assert fingerprint(model) == before


def test_target_prefers_layers_with_a_large_jump() -> None:
    model = stack(4, width=16)
    model[2].stride = (2, 2)
    model[4].stride = (2, 2)
    report = apply(model, target=1.05, input_size=(3, 97, 97))
    strengths = [row.strength or 0.0 for row in report]
    assert strengths[3] > 3 * strengths[0]
    assert [row.jump for row in report] == [(1, 1), (1, 1), (2, 2), (4, 4)]


def test_dry_run_leaves_the_model_and_predicts_the_same_gain() -> None:
    model = stack(4)
    before = fingerprint(model)
    dry = apply(model, 0.5, input_size=(3, 32, 32), dry_run=True)
    assert fingerprint(model) == before
    wet = apply(model, 0.5, input_size=(3, 32, 32))
    assert dry.gain == wet.gain and dry.gain > 1.05
    for a, b in zip(dry, wet, strict=True):
        assert (a.name, a.verdict, a.strength) == (b.name, b.verdict, b.strength)
        assert a.std_after == pytest.approx(b.std_after, rel=1e-9)
    assert "dry run" in str(dry) and "dry run" not in str(wet)


def test_dry_run_with_base_moves_no_generator() -> None:
    model, generator = stack(2), torch.Generator().manual_seed(1)
    state, world, before = generator.get_state(), torch.get_rng_state(), fingerprint(model)
    apply(model, 0.5, base="kaiming_normal", generator=generator, input_size=(3, 32, 32), dry_run=True)
    apply(model, 0.5, base="kaiming_normal", input_size=(3, 32, 32), dry_run=True)
    assert torch.equal(generator.get_state(), state) and torch.equal(torch.get_rng_state(), world)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("layers", "kernel", "strength", "kept"), [(20, 3, 0.5, 0.88), (20, 3, 1, 0.78), (6, 7, 0.5, 0.67), (6, 7, 1, 0.47)]
)
def test_signal_lost_to_zero_padding_is_told(layers: int, kernel: int, strength: float, kept: float) -> None:
    report = apply(stack(layers, kernel_size=kernel), strength, input_size=(3, 16, 16))
    assert report.signal_kept == pytest.approx(kept, abs=0.006)
    assert f"×{report.signal_kept:.2f}" in str(report)


def test_border_loss_of_one_layer_is_what_a_forward_pass_loses() -> None:
    layer = nn.Conv2d(16, 256, 5, padding=2, bias=False)
    nn.init.normal_(layer.weight)
    (row,) = apply(nn.Sequential(layer), 0.8, input_size=(16, 12, 12))
    y = layer(torch.randn(64, 16, 12, 12)).detach().square()
    lost = 1 - float(y.mean() / y[..., 4:-4, 4:-4].mean())
    assert row.border_after == pytest.approx(lost, abs=0.02)
    assert row.border_after > row.border_before > 0


# ── warnings and the report
# ─────────────────────────────────────────────────────────────────────────────────────────────


def test_silent_branches_are_told() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.gamma = nn.Parameter(torch.full((3,), 1e-6))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma.view(-1, 1, 1) * self.norm(self.conv(x))

    model = nn.Sequential(Block(), Block())
    nn.init.zeros_(model[1].norm.weight)
    (warning,) = apply(model, 0.5).warnings
    assert "silent at initialisation: 0.gamma, 1.gamma, 1.norm.weight have scale 1e-06 at most" in warning


def test_strength_above_three_quarters_warns_of_reach_and_aliasing() -> None:
    assert any("strength above 0.75" in text and "alias" in text for text in apply(stack(1), 0.8).warnings)
    assert not apply(stack(1), 0.75).warnings


def test_report_is_a_table_as_text_html_and_json() -> None:
    report = apply(stack(2), 0.5, input_size=(3, 24, 24))
    assert report["0"] is report[0] and len(report) == 2
    text, html, data = str(report), report._repr_html_(), json.loads(report.to_json())
    assert "2 of 2 convolutions widened" in text and f"×{report.gain:.3f}" in text
    assert html.count("<tr>") == 3 and "3×3" in html
    assert data["rows"][0]["verdict"] == "widened" and data["gain"] == report.gain
    with pytest.raises(ValueError, match="name must be one of '0', '2'"):
        report["1"]


def test_html_escapes_what_a_model_may_be_called() -> None:
    model = nn.ModuleDict({"<b>": nn.Conv2d(1, 1, 3)})
    assert "<b>" not in apply(model, 0.5)._repr_html_()


def test_periphery_refuses_what_is_no_kernel() -> None:
    with pytest.raises(ValueError, match="tensor must have 3 to 5 axes"):
        periphery_(torch.ones(3, 3))
    with pytest.raises(TypeError, match="tensor must hold floating-point numbers"):
        periphery_(torch.ones(1, 1, 3, 3, dtype=torch.int64))
