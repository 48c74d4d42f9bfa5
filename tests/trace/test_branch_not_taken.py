"""Fault kind: a branch not taken. What depends on the image is the union; the model's own no_grad is part of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from widerf import measure, predict, receptive_field


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.kind = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def shifted(x: Tensor) -> Tensor:
    return x.roll(3, -1)


def written(x: Tensor) -> Tensor:
    y = x.clone()
    mask = x > 0
    y[mask] = shifted(x)[mask]
    return y


def masked_by_parts(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[..., 1:] = x[..., 1:] > 0
    return torch.where(mask, x, shifted(x))


CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x > 0, x, shifted(x)),
    "where, by another map": lambda x: torch.where(x.abs() > x.abs().mean(), shifted(x), x),
    "where, through integers": lambda x: torch.where((x > 0).long().float() > 0.5, x, shifted(x)),
    "where, a mask written in place": masked_by_parts,
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0) + shifted(x).masked_fill(x <= 0, 0.0),
    "products with masks": lambda x: x * (x > 0) + shifted(x) * (x <= 0),
    "gather": lambda x: torch.stack([x, shifted(x)], 2).gather(2, (x > 0).long().unsqueeze(2)).squeeze(2),
    "take_along_dim": lambda x: torch.stack([x, shifted(x)], 2).take_along_dim((x > 0).long().unsqueeze(2), 2)[:, :, 0],
    "maximum": lambda x: torch.maximum(x, shifted(x)),
    "largest of two": lambda x: torch.stack([x, shifted(x)], 0).max(0).values,
    "sorted": lambda x: torch.stack([x, shifted(x)], 0).sort(0).values[0],
    "assignment by a mask": written,
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_depends_on_the_image_may_go_either_way(name: str) -> None:
    model = Apply(CHOICES[name])
    seen = torch.zeros(13, 13, dtype=torch.bool)
    for seed in range(12):
        x = torch.randn(
            1, 1, 13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        ).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x)[0, 0, 6, 6], x)
        seen |= gradient[0, 0] != 0
    assert seen.nonzero().tolist() == [[6, 3], [6, 6]]
    first, last = receptive_field(model, (1, 13, 13), layer="").interval((6, 6))
    assert first <= (6, 3) and last >= (6, 6)
    if "assignment" not in name and "gather" not in name and "take" not in name:
        assert (first, last) == ((6, 3), (6, 6))


def test_a_constant_mask_chooses() -> None:
    left = torch.arange(13) < 9
    model = Apply(lambda x: torch.where(left, x, shifted(x)))
    field = receptive_field(model, (1, 13, 13), layer="")
    assert field.interval((6, 6)) == ((6, 6), (6, 6)) and field.interval((6, 10)) == ((6, 7), (6, 7))


def under_no_grad(conv: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return conv(x)


def under_inference_mode(conv: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = conv(x)
    return y.clone()


@torch.no_grad()
def decorated(conv: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(conv(x) * 2.0)


def switched(conv: nn.Module, x: Tensor) -> Tensor:
    kept = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = conv(x).mul_(0.5)
    torch.set_grad_enabled(kept)
    return y


DETACHED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "detach": lambda conv, x: conv(x).detach(),
    "detach first": lambda conv, x: conv(x.detach()),
    "data": lambda conv, x: conv(x).data,
    "no_grad": under_no_grad,
    "inference_mode": under_inference_mode,
    "decorator": decorated,
    "set_grad_enabled": switched,
}


class Beside(nn.Module):
    """A narrow branch that is differentiated and a wide one that is not."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(2, 8, 9, padding=4)
        self.last, self.how = nn.Conv2d(8, 8, 3, padding=1), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(x)
        return self.last(torch.tanh(y if self.how is None else y + self.how(self.wide, x)))


@pytest.mark.parametrize("name", DETACHED)
def test_what_the_model_does_not_differentiate_the_prediction_does_not(name: str) -> None:
    maps = []
    for how in (
        DETACHED[name],
        DETACHED["detach"] if name not in ("decorator", "set_grad_enabled") else DETACHED[name],
    ):
        torch.manual_seed(0)
        maps.append(predict(Beside(how).double(), (2, 21, 21)))
    if name not in ("decorator", "set_grad_enabled"):
        torch.testing.assert_close(maps[0].map, maps[1].map, rtol=1e-9, atol=1e-15)
    torch.manual_seed(0)
    measured = measure(Beside(DETACHED[name]).double(), (2, 21, 21), samples=16)
    reached = maps[0].map.nonzero()
    assert reached.amin(0).tolist() == [8, 8] and reached.amax(0).tolist() == [12, 12]
    assert measured.map.nonzero().amin(0).tolist() == [8, 8]
    assert maps[0].std == pytest.approx(measured.std, rel=0.15)


def test_a_write_that_autograd_does_not_see_is_passed_by() -> None:
    def clamped(x: Tensor) -> Tensor:
        y = x * 2.0
        with torch.no_grad():
            y.mul_(0.0)
        return y

    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Apply(clamped), nn.Conv2d(2, 2, 3, padding=1)).double()
    assert int((predict(model, (1, 9, 9)).map > 0).sum()) == int((measure(model, (1, 9, 9)).map > 0).sum()) == 25
