"""Fixed averages in a row: the energy goes back by the square of their product, not by the product of their squares."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.operators.graphs import AVG_POOLS, CONVS, Function, Subset, ZeroInsertion
from widerf import predict
from widerf.erf.energy import backpropagate
from widerf.operators import averages
from widerf.trace.scene import Scene

CHANNELS, SIDES = 4, {1: 17, 2: 9, 3: 5}


def blur(rank: int) -> Function:
    """A fixed depthwise convolution, as of BlurPool: its weights are none of the model's parameters."""
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
    weight = taps
    for _ in range(rank - 1):
        weight = weight.unsqueeze(-1) * taps
    kernel = weight.expand(CHANNELS, 1, *(3,) * rank)
    return Function("blur", lambda x: getattr(F, f"conv{rank}d")(x, kernel, padding=1, groups=CHANNELS))


SPREADS: dict[str, Callable[[int], nn.Module]] = {
    "pool": lambda rank: AVG_POOLS[rank](3, 1, 1),
    "pool with a stride": lambda rank: AVG_POOLS[rank](2),
    "blur": blur,
    "zero insertion": lambda rank: ZeroInsertion() if rank < 3 else AVG_POOLS[rank](3, 1, 1),
    "nearest": lambda rank: nn.Upsample(scale_factor=2),
    "linear": lambda rank: nn.Upsample(scale_factor=2, mode=("linear", "bilinear", "trilinear")[rank - 1]),
}
MOVES: dict[str, Callable[[int], nn.Module]] = {
    "nothing": lambda rank: nn.Identity(),
    "crop": lambda rank: Subset(),
    "roll": lambda rank: Function("roll", lambda x: x.roll(1, -1)),
    "flip": lambda rank: Function("flip", lambda x: x.flip(-1)),
    "pad": lambda rank: Function("pad", lambda x: F.pad(x, (1, 0), value=3.0)),
    "mirror": lambda rank: Function("mirror", lambda x: F.pad(x, (1, 1) * rank, mode="replicate")),
}


def drawn(seed: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    draw = random.Random(seed)
    rank = draw.choice([1, 1, 2, 2, 3])
    names = [draw.choice(list(SPREADS)) for _ in range(2 if rank > 1 else draw.choice([2, 3]))]
    layers = [layer for name in names for layer in (MOVES[draw.choice(list(MOVES))](rank), SPREADS[name](rank))]
    return nn.Sequential(*layers), (CHANNELS, *(SIDES[rank],) * rank)


def squared_jacobian(f: Callable[[Tensor], Tensor], x: Tensor, energy: Tensor) -> Tensor:
    """The oracle: the whole matrix, element by element."""
    jacobian = torch.autograd.functional.jacobian(f, x).reshape(energy.numel(), x.numel())
    return (jacobian.square().T @ energy.flatten()).reshape(x.shape)


def both(model: nn.Module, size: tuple[int, ...], f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    model.register_parameter("kind", nn.Parameter(torch.zeros(1, dtype=torch.float64)))  # images are of its kind
    tape = Scene.of(model, size, "", None).tape
    generator = torch.Generator().manual_seed(1)
    energy = torch.rand(tape.values[tape.target].shape, generator=generator, dtype=torch.float64)
    return backpropagate(tape, energy), squared_jacobian(f, tape.values[0], energy)


@pytest.mark.parametrize("seed", range(40))
def test_fixed_averages_in_a_row_are_one_map(seed: int) -> None:
    model, size = drawn(seed)
    found, wanted = both(model, size, model)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_they_are_in_half_precision_and_every_layout(rank: int, layout: torch.memory_format) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(SPREADS["pool"](rank), Subset(), SPREADS["linear"](rank), SPREADS["pool"](rank))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.contiguous(memory_format=layout) if rank == 2 else x)

    net = nn.Sequential(CONVS[rank](2, CHANNELS, 1), Model())
    size = (2, *(SIDES[rank],) * rank)
    exact = predict(net.double(), size, layer="").std
    assert predict(net.half(), size, layer="").std == pytest.approx(exact, rel=1e-3)


def test_random_weights_between_two_averages_part_them() -> None:
    """A depthwise parameter that is as even as a blur: its signs might be redrawn, the blur's might not."""
    pool, weights = AVG_POOLS[1](3, 1, 1), nn.Conv1d(CHANNELS, CHANNELS, 1, groups=CHANNELS, bias=False)
    nn.init.ones_(weights.weight)
    size = (CHANNELS, 17)
    parted = predict(nn.Sequential(pool, weights, pool).double(), size, layer="").std ** 2
    joined = predict(nn.Sequential(pool, pool).double(), size, layer="").std ** 2
    assert (parted, joined) == (pytest.approx(4 / 3), pytest.approx(16 / 19))


@pytest.mark.parametrize("between", ["maximum", "square", "two readers", "other channels", "no_grad"])
def test_what_is_no_row_of_averages_goes_step_by_step(between: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = AVG_POOLS[1](3, 1, 1), AVG_POOLS[1](3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if between == "maximum":
                y = F.max_pool1d(y, 3, 1, 1)
            elif between == "square":
                y = y * y
            elif between == "other channels":
                y = y[:, :2].repeat(1, 2, 1).flip(1)
            elif between == "no_grad":
                with torch.no_grad():
                    y = y.roll(1, -1)
                y = y + self.a(x)
            z = self.b(y)
            return z + y.sigmoid() if between == "two readers" else z

    scene = Scene.of(Model().double(), (CHANNELS, 17), "", None)
    tape = scene.tape
    found = [averages.matrices(row, tape.values[row.source]) for row in averages.rows(tape.needed(), tape)]
    assert all(matrices is None for matrices in found)
    assert predict(Model().double(), (CHANNELS, 17), layer="").std > 0
