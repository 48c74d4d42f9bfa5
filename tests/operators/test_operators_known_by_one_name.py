"""Fault kind: an operator was known by one of its names. Every pointwise name of torch, every form that writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.operators.calls import CASES, call_of, image, tracked
from tests.reference import replayed
from widerf import predict, receptive_field
from widerf.erf.energy import backpropagate
from widerf.operators import rule_of
from widerf.trace.recorder import record
from widerf.trace.site import MapSite
from widerf.trace.tape import Tape
from widerf.trace.writes import functional_form


class Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# ── pointwise operators, with tensors and with numbers where both will do ───────────────────────────────


def pointwise() -> Iterator[Any]:
    """Every functional overload that torch tags as element by element and that can take floats."""
    for name in sorted({n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names()}):
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else []:
            op = getattr(packet, overload)
            if torch.Tag.pointwise in op.tags and not op._schema.is_mutable and not name.endswith("backward"):
                yield op


SPECIAL = {"polygamma": 1, "special_polygamma": 1, "mvlgamma": 1}  # an order comes first or is small


def filled(op: Any, n: int = 3) -> list[Any] | None:
    """Arguments for a schema: positive distinct tensors that broadcast, 0.7 for numbers; None if it wants integers."""
    made: list[Any] = []
    for index, argument in enumerate(op._schema.arguments):
        if argument.has_default_value() or argument.kwarg_only:
            break
        kind = str(argument.type)
        if kind == "Tensor":
            shape = (2, 4, n, n) if not any(isinstance(m, Tensor) for m in made) else (1, 4, 1, 1)
            generator = torch.Generator().manual_seed(index)
            made.append(0.3 + 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64))
        elif kind in ("number", "Scalar", "float"):
            made.append(0.7)
        elif kind == "int":
            made.append(1)
        else:
            return None
    return made


def floating(op: Any) -> tuple[list[Any], Any] | None:
    """The arguments and the result where the operator takes floats and has a float result."""
    arguments = filled(op)
    if arguments is None:
        return None
    try:
        result = op(*arguments)
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # integers only, or another device
    first = result[0] if isinstance(result, tuple) else result
    good = isinstance(first, Tensor) and first.is_floating_point() and bool(first.isfinite().all())
    return (arguments, first) if good else None


POINTWISE = {str(op): op for op in pointwise() if floating(op) is not None}


def test_enough_pointwise_operators_are_found() -> None:
    names = {name.split(".")[1] for name in POINTWISE}
    assert len(names) > 120 and {"lerp", "addcmul", "addcdiv", "where", "pow", "clamp", "gelu", "xlogy"} - names <= {
        "where",
        "clamp",
    }


@pytest.mark.parametrize("name", POINTWISE)
def test_a_pointwise_operator_is_differentiated_in_each_of_its_arguments(name: str) -> None:
    op = POINTWISE[name]
    found = floating(op)
    assert found is not None
    arguments, result = found
    for position in [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]:
        call, tensor = call_of(f"{op._schema.name.split('::')[1]}.{op._overloadname}", tuple(arguments), position)
        rule = rule_of(call.op)
        assert rule is not None
        x = tensor.clone().requires_grad_()
        out = call.run({position: x})[0]
        expected = torch.zeros_like(tensor)
        if out.requires_grad:
            try:
                wide = tensor.expand(out.shape).clone().requires_grad_()
                (slope,) = torch.autograd.grad(call.run({position: wide})[0].sum(), wide)
            except (NotImplementedError, RuntimeError):
                continue  # torch knows no derivative in this argument
            expected = slope.square().sum_to_size(tensor.shape)
        energy = torch.ones_like(result)
        if rule.energy is None:
            tape = Tape([call], [tensor, *call.run({position: tensor})], target=1)
            torch.testing.assert_close(backpropagate(tape, energy), expected, rtol=1e-9, atol=1e-12)


# ── in-place and out= forms ─────────────────────────────────────────────────────────────────────────────


def taped(function: Any, x: Tensor) -> Tape:
    model = Apply(function)
    return record(model, x, MapSite("", model, 0, ()))


def has_in_place_form(name: str) -> bool:
    packet, _, overload = name.partition(".")
    full = f"aten::{packet}_" + (f".{overload}" if overload else "")
    return hasattr(torch.ops.aten, f"{packet}_") and torch._C._dispatch_has_kernel(full)


IN_PLACE = [name for name in CASES if has_in_place_form(name)]


def test_in_place_forms_are_found() -> None:
    assert {"index_put", "clamp", "hardtanh", "masked_fill.Scalar", "addmm", "t"} <= set(IN_PLACE)


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_in_place_is_recorded_as_what_is_returned(name: str) -> None:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, f"{packet}_"), overload or "default")
    assert functional_form(op)._schema.name.split("::")[1] == packet
    for case in CASES[name]:
        position = next(iter(tracked(name, case(4))))
        call, tensor = call_of(name, case(4), position)
        if position != 0:
            continue

        def write(x: Tensor, call: Any = call) -> Tensor:
            target = x * 1.0  # not the image itself, which has other aliases
            leaves = [target if i == 0 else leaf for i, leaf in enumerate(call.leaves)]
            args, kwargs = torch.utils._pytree.tree_unflatten(leaves, call.spec)
            op(*args, **kwargs)
            return target * 1.0

        try:
            expected = write(tensor.clone())
        except RuntimeError:
            continue  # the result does not fit in the place
        tape = taped(write, tensor)
        assert torch.equal(tape.values[tape.target], expected)
        assert torch.equal(replayed(tape, tensor), expected)


VIEWS = {
    "transpose_": lambda x: x.transpose_(1, 3), "swapaxes_": lambda x: x.swapaxes_(1, 3), "t_": lambda x: x[0, 0].t_(),
    "swapdims_": lambda x: x.swapdims_(2, 3), "squeeze_": lambda x: x[:, :1].squeeze_(1),
    "unsqueeze_": lambda x: x.unsqueeze_(2),
    "as_strided_": lambda x: x.as_strided_((1, 4, 2, 2), (64, 16, 4, 1), 5),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_in_place_keeps_what_was_known_of_its_tensor(name: str) -> None:
    def turn(x: Tensor) -> Tensor:
        y = x * 2.0
        z = VIEWS[name](y)
        z.mul_(3.0)
        return z * 1.0

    x = image(4)
    tape = taped(turn, x)
    assert torch.equal(tape.values[tape.target], turn(x)) and torch.equal(replayed(tape, x), turn(x))


@pytest.mark.parametrize("function", [torch.add, torch.mul, torch.maximum, torch.sub, torch.div])
def test_out_is_what_is_returned(function: Any) -> None:
    x = image(4)

    def write(y: Tensor) -> Tensor:
        canvas = torch.empty_like(y)
        function(y, 2 * y, out=canvas)
        return canvas * 1.0

    tape = taped(write, x)
    assert torch.equal(tape.values[tape.target], function(x, 2 * x)) and torch.equal(replayed(tape, x), write(x))


# ── the names that norms have ───────────────────────────────────────────────────────────────────────────

NORMS = {
    f"{kind}{rank}d{form}": (rank, make)
    for rank in (1, 2, 3)
    for kind, form, make in [
        ("Instance", "", getattr(nn, f"InstanceNorm{rank}d")(4)),
        ("Instance", " affine", getattr(nn, f"InstanceNorm{rank}d")(4, affine=True)),
        ("Batch", " without running statistics", getattr(nn, f"BatchNorm{rank}d")(4, track_running_stats=False)),
        ("Group", " of one channel", nn.GroupNorm(4, 4)),
        ("Group", " of all channels", nn.GroupNorm(1, 4)),
    ]
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_over_positions_is_a_global_path_whatever_it_is_called(name: str) -> None:
    rank, norm = NORMS[name]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    model = nn.Sequential(conv(1, 4, 3, padding=1), norm, nn.ReLU(), conv(4, 4, 3, padding=1)).eval()
    field = receptive_field(model, (1, *(9,) * rank))
    assert field.global_paths == ("1",) and field.size == (5,) * rank


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_padding_is_predicted_alike_far_from_the_border(mode: str, rank: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    torch.manual_seed(0)
    model = nn.Sequential(conv(1, 4, 3, padding=1, padding_mode=mode), nn.Tanh(), conv(4, 4, 3, padding=1)).double()
    plain = nn.Sequential(conv(1, 4, 3, padding=1), nn.Tanh(), conv(4, 4, 3, padding=1)).double()
    plain.load_state_dict(model.state_dict())
    maps = [predict(m, (1, *(9,) * rank)).map for m in (model, plain)]
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-9, atol=1e-12)
