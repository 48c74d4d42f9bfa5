"""The network's predicted ERF before a change of its weights, ready to be asked again after one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from widerf.convolutions.convolution import Convolution
from widerf.convolutions.places import Place, find_places
from widerf.convolutions.sensitivity import predicted_std
from widerf.erf.frame import Frame
from widerf.erf.receptive import from_tape
from widerf.errors import UntreatedOperatorError
from widerf.init.lasting import profile_of
from widerf.init.plan import Change
from widerf.init.weights import Experts, Held
from widerf.trace.scene import Scene
from widerf.trace.tape import Tape


@dataclass(frozen=True)
class Outlook:
    """What is known of a network at an input size: found once, recorded once.

    Attributes:
        scene: the model and its recording.
        frame: where the unit sees; ``None`` if the model cannot be traced.
        std: predicted std of the ERF, input pixels; ``None`` if it cannot be predicted.
        problem: what is wrong with that, or ``""``.
    """

    scene: Scene
    frame: Frame | None
    std: float | None
    problem: str

    @classmethod
    def of(cls, model: nn.Module, input_size: Sequence[int]) -> Outlook:
        """Look at a model; an operator without a rule costs the figures, not the call."""
        scene = Scene.of(model, input_size)
        try:
            frame = Frame.of(from_tape(scene.tape, scene.site.name), [scene.unit])
        except UntreatedOperatorError as error:
            return cls(scene, None, None, f"the ERF's gain cannot be predicted: {error}")
        return cls(scene, frame, *predicted_std(scene, frame))

    def places(self, kernels: Sequence[Convolution]) -> dict[str, Place]:
        """Return where the convolutions stand; none where the model cannot be recorded."""
        try:
            return find_places(self.scene, kernels)
        except UntreatedOperatorError:
            return {}

    def after(self, changes: Sequence[Change]) -> tuple[float | None, str]:
        """Return std and problem now that ``changes`` were made."""
        if self.std is None:
            return None, self.problem
        return predicted_std(self.scene.changed(in_place=_follows(self.scene.tape, changes)), self.frame)


def _follows(tape: Tape, changes: Sequence[Change]) -> bool:
    """Return whether the recorded operators read the very parameters that are changed.

    They do not where a weight is computed before it is used: by a parametrisation, by autocast, for sparse taps.
    """
    changing = {c.kernel.name: c for c in changes if c.held is not None and (c.shape is not None or c.drawn)}
    held = [c for c in changing.values() if type(c.held) in (Held, Experts) and c.kernel.offsets is None]
    if len(held) < len(changing) or any(profile_of(c.kernel.module) is not None for c in held):
        return False
    for call in tape.calls:
        change = changing.get(call.module)
        if change is None or change.held is None or call.name != "convolution":
            continue
        weight = call.leaves[1]
        if isinstance(weight, Tensor) and weight.data_ptr() != change.held.sources()[0].data_ptr():
            return False
    return True
