"""What a task of the main job is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

Conv = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]
# Validation batches are drawn or held out once, the same for every run.
VALIDATION_SEED = 20161


@dataclass(frozen=True)
class Task:
    """One task. ``tasks.make(name, …)`` gives it ready for use.

    Attributes:
        name: as on the command line.
        network: from a convolution class to a network with the parts ``features`` (its output is the map whose ERF is
            measured) and ``head``.
        batches: from a seed to an endless stream of ``(images, labels)``.
        validation: held-out images and labels; the steps to the target are counted on them.
        test: images and labels that are looked at once, after training; None where data are generated without end.
        erf_size: (channels, height, width) of the input on which the ERF is measured, large enough for the dense TRF.
        erf_inputs: real images for the ERF, or None for N(0, 1).
        target: validation accuracy that counts as learnt.
        steps: longest training, in steps.
        every: steps between two looks at the validation accuracy.
        stop_at_target: end the run when the target is reached.
        lr: learning rate of Adam, the same in every arm.
        penalty: factor of ``widerf.erf_penalty`` of the last map, at ``erf_size``, in the loss.
        faster: from the network to a module that shares its parameters and answers alike in less time; what trains.
    """

    name: str
    network: Callable[[Conv], nn.Sequential]
    batches: Callable[[int], Iterator[Batch]]
    validation: Batch
    test: Batch | None
    erf_size: tuple[int, int, int]
    erf_inputs: Tensor | None
    target: float
    steps: int
    every: int
    stop_at_target: bool
    lr: float
    penalty: float = 0.0
    faster: Callable[[nn.Sequential], nn.Module] | None = None


class Centre(nn.Module):
    """Read out the centre unit of a map: (batch, channels, height, width) to (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the centre unit."""
        return x[:, :, x.shape[2] // 2, x.shape[3] // 2]


def named(features: nn.Module, head: nn.Module) -> nn.Sequential:
    """Return the two parts as one network whose parts bear these names."""
    net = nn.Sequential()
    net.add_module("features", features)
    net.add_module("head", head)
    return net
