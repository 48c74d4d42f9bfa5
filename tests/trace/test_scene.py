"""A scene: the map is found once, the pass recorded once, and run through again when weights were changed in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.reference import fingerprint
from widerf.trace import scene as scenes
from widerf.trace.scene import Scene, noise


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2),
        nn.Dropout(0.3), nn.Conv2d(4, 2, 3),
    )  # fmt: skip


def test_a_recording_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    record = scenes.record
    monkeypatch.setattr(scenes, "record", lambda *arguments: calls.append(1) or record(*arguments))
    scene = Scene.of(network(), (2, 15, 15))
    assert not calls
    assert scene.tape is scene.tape and len(calls) == 1


@pytest.mark.parametrize("training", [False, True])
def test_a_replay_holds_what_a_new_recording_would(training: bool) -> None:
    model = network().train(training)
    scene = Scene.of(model, (2, 15, 15))
    _ = scene.tape
    with torch.no_grad():
        model[3].weight.mul_(-0.5)
        model[1].weight.fill_(2.0)
    replayed, anew = scene.changed(in_place=True).tape, scene.changed(in_place=False).tape
    first, second = replayed.values[replayed.target], anew.values[anew.target]
    assert torch.equal(first, second)
    assert not torch.equal(first, scene.tape.values[scene.tape.target])


def test_scenes_leave_every_bit_of_the_model() -> None:
    model = network().train()
    before = fingerprint(model)
    scene = Scene.of(model, (2, 15, 15))
    _ = scene.tape, scene.changed(in_place=True).tape, scene.record(noise(model, (2, 15, 15), 3), evaluating=True)
    assert fingerprint(model) == before


def test_shapes_are_those_of_each_modules_first_call() -> None:
    shapes = Scene.of(network(), (2, 15, 15)).tape.shapes
    assert shapes["0"] == ((1, 2, 15, 15), (1, 4, 15, 15)) and shapes["3"] == ((1, 4, 15, 15), (1, 4, 7, 7))
    assert shapes["5"] == ((1, 4, 7, 7), None)  # it makes the map: the recording ends within


def test_the_seed_is_one_at_the_unit_in_every_channel() -> None:
    seed = Scene.of(network(), (2, 15, 15), unit=(0, -1)).seed()
    assert seed.shape == (1, 2, 5, 5) and float(seed.sum()) == 2.0 and bool((seed[..., 0, 4] == 1).all())


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        Scene.of("resnet18", (3, 8, 8))  # type: ignore[arg-type]
