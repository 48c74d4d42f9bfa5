"""The recording of a forward pass: order, identities, modules, in-place writes, random masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference import fingerprint, replayed
from widerf.trace.recorder import record
from widerf.trace.sandbox import untouched
from widerf.trace.site import spatial_layer
from widerf.trace.tape import Tape


def taped(model: nn.Module, image: Tensor, layer: str | None = None) -> Tape:
    site = spatial_layer(model, tuple(image.shape[1:]), layer)
    with untouched(model):
        return record(model, image, site)


class Branches(nn.Module):
    """Skips, concatenation, control flow and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.conv(x) if x.shape[-1] > 4 else x
        return self.last(self.norm(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)))


class Writes(nn.Module):
    """In-place writes: to a tensor, to a view of it, and into a buffer that did not depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.mul(2.0)
        y[:, :1] += y[:, 1:]
        y.relu_()
        canvas = torch.zeros_like(y)
        canvas[..., 1:] = y[..., :-1]
        canvas.view(-1)[::2].mul_(3.0)
        return canvas + y


@pytest.mark.parametrize("model", [Branches(), Writes(), nn.Sequential(Writes(), nn.Conv2d(2, 2, 3), nn.ReLU(True))])
def test_replaying_the_tape_gives_the_models_output(model: nn.Module) -> None:
    model = model.double().eval()
    image = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image.clone())
        tape = taped(model, image.clone(), "")
        torch.testing.assert_close(replayed(tape, image), expected, rtol=0, atol=0)


@pytest.mark.parametrize("model", [Branches(), Writes()])
def test_the_recorded_values_are_those_of_the_replay(model: nn.Module) -> None:
    """A later in-place write must not reach into the values recorded before it."""
    model = model.double().eval()
    image = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tape = taped(model, image, "")
        for step in tape.needed():
            outputs = step.run({position: tape.values[value] for position, value in step.inputs.items()})
            for value, out in zip(step.outputs, outputs, strict=True):
                if value is not None:
                    torch.testing.assert_close(tape.values[value], out, rtol=0, atol=0)


def test_steps_bear_their_modules_names() -> None:
    tape = taped(Branches().eval(), torch.randn(1, 2, 8, 8), "last")
    convolutions = [step.module for step in tape.needed() if step.name == "convolution"]
    assert convolutions == ["conv", "conv", "last"]


def test_what_does_not_lead_to_the_map_is_left_out() -> None:
    tape = taped(nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), torch.randn(1, 2, 8, 8), "0")
    assert [step.name for step in tape.needed()] == ["convolution"]


def test_a_random_mask_becomes_the_constant_with_its_mean_square() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Dropout2d(0.75)).train()
    nn.init.ones_(model[0].weight)
    tape = taped(model, torch.ones(1, 1, 4, 4), "1")
    torch.testing.assert_close(tape.values[tape.target], torch.full((1, 1, 4, 4), 0.25**-0.5))


def test_the_model_and_the_world_come_back_as_they_were() -> None:
    model = Branches().train()
    before = fingerprint(model)
    taped(model, torch.ones(1, 2, 8, 8))
    assert fingerprint(model) == before
