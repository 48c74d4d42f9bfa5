"""The initialiser on whole models: what it leaves alone and refuses, again and again, and what it says."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import widerf
from tests.reference import fingerprint, shares, stack
from widerf.erf import receptive
from widerf.init import apply, periphery_
from widerf.profile import soft_corners
from widerf.trace import scene

pytestmark = pytest.mark.usefixtures("double_precision")


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


def test_a_target_finds_the_map_once_and_records_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"site": 0, "record": 0, "boxes": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(scene, "spatial_layer", counted("site", scene.spatial_layer))
    monkeypatch.setattr(scene, "record", counted("record", scene.record))
    monkeypatch.setattr(receptive, "read", counted("boxes", receptive.read))
    torch.manual_seed(0)
    model = timm.create_model("resnet18", zero_init_last=False).eval()
    report = apply(model, target=1.02, input_size=(3, 128, 128))
    assert counts == {"site": 1, "record": 1, "boxes": 1}
    assert report.gain == pytest.approx(1.02, rel=2e-3)


def test_what_a_replay_predicts_is_what_a_new_look_predicts() -> None:
    torch.manual_seed(0)
    for model in (normed_by_batches().train(), normed_by_batches().eval(), normed_by_weights()):
        report = apply(model, 0.7, input_size=(3, 40, 40))
        assert report.erf_std is not None
        assert report.erf_std[1] == widerf.predict(model, (3, 40, 40)).std


def test_a_missing_rule_costs_the_figure_and_not_the_call() -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).real

    report = apply(nn.Sequential(nn.Conv2d(3, 8, 3), Sorts(), nn.Conv2d(8, 8, 3)), 0.5, input_size=(3, 16, 16))
    assert [row.widened for row in report] == [True, True] and report.gain is None
    assert any("cannot be predicted" in warning and "fft" in warning for warning in report.warnings)


def normed_by_batches() -> nn.Module:
    channels = (3, 8, 8, 8)
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in itertools.pairwise(channels)]
    return nn.Sequential(*itertools.chain.from_iterable(layers))


def normed_by_weights() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), normed, nn.ReLU(), nn.Conv2d(8, 8, 3))
