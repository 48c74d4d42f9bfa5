"""convert and densify change a model wholly or not at all, wherever they are interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.interrupts import interrupted
from tests.reference import fingerprint
from widerf import convert, densify
from widerf.conversion.exchange import exchange
from widerf.sparse.layer import SparseConv

# not convolutions, which goes over all objects of the process: 10⁶ lines, and changes none
ROOMS = tuple(f"/widerf/{room}/" for room in ("conversion", "patterns", "sparse"))


def net(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    model.append(model[1])  # one layer in two places
    if sparse:
        convert(model, extent=5)
    return model


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# sparse beforehand, what is called, at how many lines
CALLS: dict[str, tuple[bool, Callable[[nn.Module], Any], int]] = {
    "convert": (False, lambda model: convert(model, extent=5), 15),
    "convert with figures": (False, lambda model: convert(model, input_size=(3, 12, 12)), 4),
    "dry run": (False, lambda model: convert(model, extent=5, dry_run=True), 15),
    "target": (False, lambda model: convert(model, target=1.2, input_size=(3, 12, 12)), 3),
    "densify": (True, densify, 15),
}


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("convert with figures", "target") else n for n in CALLS]
)
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was_or_wholly_changed(name: str) -> None:
    sparse, call, points = CALLS[name]
    whole_model = net(sparse)
    whole = interrupted(lambda: call(whole_model), 0, ROOMS).lines
    tail = range(max(1, whole - 4 * points), whole + 1)  # where the modules are swapped, and back
    struck = 0
    for at in [*range(1, whole, max(1, whole // points)), *tail]:
        model = net(sparse)
        state, modules = fingerprint(model), list(model)
        rng = torch.get_rng_state()
        interrupted(lambda model=model: call(model), at, ROOMS)  # type: ignore[misc]
        changed = [new is not old for new, old in zip(model, modules, strict=True)]
        if any(changed):
            assert name != "dry run"
            assert changed == ([False, True, True, True] if not sparse else changed)
            assert all(isinstance(m, SparseConv) != sparse for m in list(model)[1:])
            assert model[1] is model[3]
        else:
            # a sparse layer also remembers when it last read its offsets, which is no part of the model
            assert fingerprint(model) == state if not sparse else equal(model.state_dict(), net(sparse).state_dict())
            struck += 1
        assert torch.equal(torch.get_rng_state(), rng)
    assert struck > points // 2


def test_whatever_is_raised_while_the_new_modules_are_in_place_puts_the_old_ones_back() -> None:
    model = net()
    old = list(model)
    pairs: dict[nn.Module, nn.Module] = {old[1]: nn.Identity(), old[2]: nn.ReLU()}

    def fail(error: BaseException) -> None:
        assert model[1] is model[3] is pairs[old[1]]
        raise error

    for error in (ValueError("no"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
        with pytest.raises(type(error)):
            exchange(model, pairs, lambda error=error: fail(error))  # type: ignore[misc]
        assert list(model) == old
    assert exchange(model, pairs, lambda: 7, stay=False) == 7
    assert list(model) == old
    exchange(model, pairs, lambda: None)
    assert [model[1], model[2]] == list(pairs.values())


def test_the_marks_of_an_earlier_widening_are_back_with_the_modules() -> None:
    from widerf import init

    model = net()
    init.apply(model, 0.5)
    state = fingerprint(model)
    with pytest.raises(ValueError, match="target must be at most"):
        convert(model, target=30.0, input_size=(3, 12, 12))
    assert fingerprint(model) == state
