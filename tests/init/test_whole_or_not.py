"""apply changes all or nothing: whatever goes wrong on the way, the model is as it was, marks included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widerf
from tests.interrupts import interrupted
from tests.reference import fingerprint
from widerf.init import apply


def network() -> nn.Sequential:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), normed, nn.ConvTranspose2d(6, 4, 4, stride=2)
    )


def state(model: nn.Module) -> list[Any]:
    return [
        *((name, tensor.clone()) for name, tensor in model.state_dict().items()),
        *((name, dict(vars(module).get("_widerf_profile") or {})) for name, module in model.named_modules()),
    ]


def same(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a[1], b[1]) if isinstance(a[1], Tensor) else a[1] == b[1] for a, b in pairs)


CALLS = {
    "strength": lambda model: apply(model, 0.5),
    "base": lambda model: apply(model, 0.5, base="kaiming_normal", generator=torch.Generator().manual_seed(1)),
    "input_size": lambda model: apply(model, 0.5, input_size=(2, 12, 12)),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line_leaves_all_or_nothing(name: str) -> None:
    before = state(network())
    whole = network()
    CALLS[name](whole)
    after, stride, at, ends = state(whole), 7 if name == "strength" else 97, 1, set()
    while True:
        model = network()
        if not interrupted(lambda: CALLS[name](model), at).place:  # noqa: B023
            break
        found = state(model)
        assert same(found, before) or same(found, after), f"half changed by an interrupt at line {at}"
        ends.add(same(found, before))
        at += stride
    assert True in ends and at > 20 * stride


@pytest.mark.parametrize("call", [widerf.predict, widerf.receptive_field, widerf.measure])
def test_an_interrupt_of_the_ruler_leaves_every_bit(call: Any) -> None:
    model = network().train()
    before, at = fingerprint(model), 1
    while interrupted(lambda: call(model, (2, 12, 12)), at).place:
        assert fingerprint(model) == before, f"changed by an interrupt at line {at}"
        assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks
        at += 211
    assert at > 10 * 211


def test_a_base_that_fails_leaves_no_mark() -> None:
    model, calls = network(), 0

    def base(weight: Tensor) -> None:
        nonlocal calls
        calls += 1
        weight.normal_()
        if calls == 2:
            raise KeyError("no more")

    before = state(model)
    with pytest.raises(KeyError):
        apply(model, 0.5, base=base)
    assert same(state(model), before)


def test_weights_that_share_memory_within_are_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = nn.Parameter(torch.randn(1, 4, 3, 3).expand(4, 4, 3, 3))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="1 .*share memory"):
        apply(model, 0.5)
    assert torch.equal(model[0].weight, before)


def test_half_precision_that_would_overflow_is_left_alone_and_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3).half(), nn.Conv2d(4, 4, 3).half())
    model[0].weight.data.fill_(6e4)
    report = apply(model, 0.5)
    assert [row.verdict.code for row in report] == ["overflow", "widened"]
    assert bool((model[0].weight == 6e4).all()) and any("half precision" in warning for warning in report.warnings)


def test_a_trained_network_is_told_from_a_fresh_one() -> None:
    model = network().train()
    assert not any("trained" in warning for warning in apply(model, 0.1).warnings)
    model(torch.randn(4, 2, 12, 12))
    assert any("has been trained" in warning for warning in apply(model, 0.2).warnings)
