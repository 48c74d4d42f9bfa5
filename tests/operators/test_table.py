"""Every operator that the table names, against its Jacobian: energies, boxes, jump."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.operators.calls import CASES, CUDA_ONLY, STAND_INS, Case, call_of, overloads, tracked
from widerf.erf.energy import backpropagate
from widerf.errors import UntreatedOperatorError
from widerf.operators import TABLE, rule_of
from widerf.operators.boxes import pixels, scaled
from widerf.operators.rule import Rule, joined, named
from widerf.trace.tape import Call, Tape

SMALL, LARGE = 4, 24


def test_no_operator_has_two_rules() -> None:
    rule = Rule("dropout", TABLE["native_dropout"].boxes, None)
    with pytest.raises(ValueError, match="one rule each, got two for mm"):
        joined([TABLE, named(rule, "mm")])
    with pytest.raises(ValueError, match="one rule each, got two for a"):
        named(rule, "a b a")


def test_every_overload_of_every_listed_operator_has_a_generated_call() -> None:
    listed = set(overloads())
    assert listed - set(CASES) - CUDA_ONLY == set(), "operators that no test calls"
    assert set(CASES) - listed == set(), "calls of operators that no rule lists"


EACH = [pytest.param(name, case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)]


def outputs(name: str, call: Call, tensor: Tensor) -> tuple[Tensor, ...]:
    stand_in = STAND_INS.get(name)
    if stand_in is None:
        return call.run({next(iter(call.inputs)): tensor})
    leaves = [tensor if leaf is None and i in call.inputs else leaf for i, leaf in enumerate(call.leaves)]
    return tuple(stand_in(*leaves))


def jacobians(name: str, call: Call, tensor: Tensor) -> list[Tensor | None]:
    """Per output ``(*output, *input)``, row by row; ``None`` for an output without a derivative."""
    x = _same_layout(tensor).requires_grad_()
    found: list[Tensor | None] = []
    for out in outputs(name, call, x):
        if not out.is_floating_point():
            found.append(None)
        elif not out.requires_grad:
            found.append(out.new_zeros(*out.shape, *x.shape))
        else:
            rows = [torch.autograd.grad(y, x, retain_graph=True, allow_unused=True)[0] for y in out.flatten()]
            rows = [torch.zeros_like(x) if row is None else row for row in rows]
            found.append(torch.stack(rows).view(*out.shape, *x.shape))
    return found


def _same_layout(tensor: Tensor) -> Tensor:
    """A leaf that lies in a storage of the same length, in the same way."""
    base = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
    laid = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    laid.copy_(tensor)
    return laid.detach()


def shapes_of(made: tuple[Tensor, ...]) -> list[tuple[int, ...] | None]:
    return [tuple(out.shape) if out.is_floating_point() else None for out in made]


def leaves_of(name: str, case: Case, size: int) -> Iterator[tuple[int, Call, Tensor]]:
    arguments = case(size)
    for position in tracked(name, arguments):
        call, tensor = call_of(name, case(size), position)
        yield position, call, tensor


@pytest.mark.parametrize(("name", "case"), EACH)
def test_the_energy_rule_is_the_squared_jacobian(name: str, case: Case) -> None:
    for position, call, tensor in leaves_of(name, case, SMALL):
        rule = rule_of(call.op)
        assert rule is not None
        made = outputs(name, call, tensor)
        tape = Tape([call], [tensor, *made])
        for index, jacobian in enumerate(jacobians(name, call, tensor)):
            if jacobian is None or (rule.kind == "normalisation" and index > 0):
                continue  # indices; statistics, which no model reads
            energy = torch.rand(made[index].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            expected = torch.tensordot(energy, jacobian.square(), energy.ndim)
            cotangents = [energy if i == index else None for i in range(len(made))]
            values = {0: tensor}
            if position > 0 and rule.kind == "normalisation":
                with pytest.raises(UntreatedOperatorError):
                    dict(rule.energy(call, call.arguments(values), {position: tensor}, cotangents))
                continue
            if rule.energy is None:
                tape.target = index + 1
                found = backpropagate(tape, energy)
            else:
                parts = dict(rule.energy(call, call.arguments(values), {position: tensor}, cotangents))
                found = parts.get(position, torch.zeros_like(tensor))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def own_places(tensor: Tensor) -> Tensor:
    """Each element sees its own index, along all axes."""
    axes = [torch.arange(n, dtype=torch.float32) for n in tensor.shape]
    first = torch.stack(torch.meshgrid(*axes, indexing="ij")) if axes else torch.zeros(1)
    return torch.cat([first, -first])


def over_space(name: str, rule: Rule, call: Call, tensor: Tensor) -> bool:
    """Whether statistics spread the gradient besides the boxes: a global path, or a batch norm that trains."""
    if rule.over_space is None:
        return False
    arguments = call.arguments({0: tensor})
    return rule.over_space(call, arguments) or ("batch_norm" in name and arguments.get("training", "no_" not in name))


@pytest.mark.parametrize(("name", "case"), EACH)
def test_the_support_of_the_jacobian_lies_in_the_box(name: str, case: Case) -> None:
    for position, call, tensor in leaves_of(name, case, SMALL):
        rule = rule_of(call.op)
        assert rule is not None
        shapes = shapes_of(outputs(name, call, tensor))
        arguments = call.arguments({0: tensor})
        reach = own_places(tensor)
        if position > 0 and rule.kind in ("convolution", "normalisation"):
            with pytest.raises(UntreatedOperatorError):
                rule.boxes(call, arguments, {position: reach}, shapes, (1.0,) * tensor.ndim)
            continue
        boxes = rule.boxes(call, arguments, {position: reach}, shapes, (1.0,) * tensor.ndim)
        for jacobian, box in zip(jacobians(name, call, tensor), boxes, strict=False):
            if jacobian is None or box is None or over_space(name, rule, call, tensor):
                continue
            assert (*box.shape[1:], *tensor.shape) == jacobian.shape
            seen = jacobian.abs().view(-1, *tensor.shape) > 1e-12
            low, high = (part.reshape(len(part), -1) for part in box.chunk(2))
            one = tuple(1 for _ in tensor.shape)
            for axis in range(tensor.ndim):
                place = reach[axis].expand(seen.shape)
                outside = (place < low[axis].view(-1, *one)) | (place > -high[axis].view(-1, *one))
                assert not bool((seen & outside).any()), f"leaf {position}, axis {axis}"


@pytest.mark.parametrize(("name", "case"), EACH)
def test_the_jump_of_the_rule_is_that_of_the_boxes(name: str, case: Case) -> None:
    for position, call, tensor in leaves_of(name, case, LARGE):
        rule = rule_of(call.op)
        assert rule is not None
        shapes = shapes_of(outputs(name, call, tensor))
        on_maps = tensor.ndim > 2 and shapes[0] is not None and len(shapes[0]) == tensor.ndim
        if not on_maps or (position > 0 and rule.kind in ("convolution", "normalisation")):
            continue
        arguments = call.arguments({0: tensor})
        told = rule.jump(call, arguments, tuple(tensor.shape), shapes[0])
        rank = tensor.ndim - 2
        if told is None:  # nothing is claimed
            assert rule.kind not in ("convolution", "pooling", "resampling") and name != "constant_pad_nd"
            continue
        box = rule.boxes(call, arguments, {position: pixels(tensor)}, shapes, (1.0,) * rank)[0]
        assert box is not None
        for axis, jump in enumerate(scaled((1.0,) * rank, told)):
            line = box[axis].amin((0, 1)).movedim(axis, 0).reshape(len(box[axis].movedim(2 + axis, 0)), -1)[:, -1]
            seeing = line.isfinite().nonzero().flatten()  # what holds a constant sees nothing
            if len(seeing) == 0:
                continue
            start, stop = seeing[len(seeing) // 4], seeing[3 * len(seeing) // 4]
            assert abs(float(line[stop] - line[start]) - jump * (stop - start)) <= 1, f"axis {axis}"
