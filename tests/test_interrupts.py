"""Not all or nothing: an interrupt at any line of any call leaves the model as it was, or wholly changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.interrupts import interrupted, surroundings
from tests.reference import fingerprint
from widerf import convert, densify, measure, predict, receptive_field
from widerf.init import apply

SIZE = (1, 13)  # one axis: as few lines as may be, so that every seventh can be tried


def net(sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 3, padding=1)).train()
    model.append(model[2])  # one layer in two places
    model[0].register_forward_hook(lambda *_: None)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    if sparse:
        convert(model, extent=5)
    return model


# whether sparse beforehand, whether it changes the model, what is called
CALLS: dict[str, tuple[bool, bool, Callable[[nn.Module], Any]]] = {
    "apply": (False, True, lambda model: apply(model, 0.5)),
    "apply with figures": (False, True, lambda model: apply(model, 0.5, input_size=SIZE)),
    "apply target": (False, True, lambda model: apply(model, target=1.01, input_size=SIZE)),
    "apply base": (
        False,
        True,
        lambda model: apply(model, 0.5, base="kaiming_normal", generator=torch.Generator().manual_seed(1)),
    ),
    "convert": (False, True, lambda model: convert(model, extent=5)),
    "convert with figures": (False, True, lambda model: convert(model, extent=5, input_size=SIZE)),
    "convert target": (False, True, lambda model: convert(model, target=1.05, input_size=SIZE)),
    "convert on trial": (False, False, lambda model: convert(model, extent=5, dry_run=True)),
    "densify": (True, True, densify),
    "measure": (False, False, lambda model: measure(model, SIZE, samples=2)),
    "measure sparse": (True, False, lambda model: measure(model, SIZE, samples=2)),
    "predict": (False, False, lambda model: predict(model, SIZE)),
    "receptive_field": (False, False, lambda model: receptive_field(model, SIZE)),
}


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
@pytest.mark.parametrize("every", ["some", pytest.param("seventh", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_leaves_all_or_nothing(name: str, every: str) -> None:
    sparse, changes, call = CALLS[name]
    whole_model = net(sparse)
    call(whole_model)  # what is cached is cached
    torch.manual_seed(0)
    whole = net(sparse)
    fingerprint(whole), whole.state_dict()  # looked at as the others are
    lines = interrupted(lambda: call(whole), at=0).lines
    after, around = whole.state_dict(), surroundings()
    kinds = [type(module) for module in whole]
    ends = set()
    for at in range(1, lines, 7 if every == "seventh" else max(7, lines // 50)):
        model = net(sparse)
        held, before, state = list(model), fingerprint(model), {k: v.clone() for k, v in model.state_dict().items()}
        rng = before[-4:]
        place = interrupted(lambda model=model: call(model), at).place
        if not place:  # some lines fill caches, which are full by now
            assert at > 0.9 * lines
            break
        found = fingerprint(model)
        assert found[-4:] == rng, f"random state changed by an interrupt at {place}"
        assert surroundings() == around, f"the process was left otherwise by an interrupt at {place}"
        now = model.state_dict()
        changed = [type(m) for m in model] != [type(m) for m in held] or not equal(now, state)
        if changed:
            assert changes, f"changed by an interrupt at {place}"
            assert [type(m) for m in model] == kinds and equal(now, after), f"half changed by an interrupt at {place}"
        elif not sparse:
            assert found == before, f"changed by an interrupt at {place}"
        ends.add(changed)
    assert False in ends


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
