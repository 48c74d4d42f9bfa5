"""The ERF during training: measured every so many steps, written to TensorBoard, to JSON lines, or to any logger."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widerf._checks import require
from widerf.erf.logs import FIGURES, open_log
from widerf.erf.map import ERF
from widerf.erf.measurement import measure
from widerf.errors import ClippedWarning
from widerf.trace.arguments import is_finite
from widerf.trace.certain import held
from widerf.trace.sandbox import untouched
from widerf.trace.scene import Scene


class ERFTracker:
    """Measures a model's ERF every ``every`` steps of its training and keeps or writes what it finds.

    Call :meth:`step` once in each training step, let :meth:`attach` do so after each step of an optimizer, or give
    :meth:`lightning` to a Lightning ``Trainer``. Training goes on as if nothing had happened: the model is measured in
    eval mode and comes back bit-identical, as does the random state. What cannot be measured (a dead unit, weights that
    are not finite) is a row of NaN with an ``error``, and one warning; a log that fails is a warning. Under
    ``torch.distributed`` only rank 0 measures and writes.

    Args:
        model: the model in training.
        every: steps between two measurements; the first step is measured.
        input_size: ``(channels, *spatial)``.
        layers: modules or names to look at; None is the last spatial map before global pooling.
        inputs: images for :func:`widerf.measure`, the same each time; by default N(0, 1).
        samples: draws per measurement.
        log: where to write: a path that ends in ``.jsonl``; any other path is a folder for TensorBoard (extra
            ``widerf[tensorboard]``); an object with ``add_scalar`` and ``add_figure``, such as a ``SummaryWriter``; a
            callable that takes one row, a dict; or None.

    Attributes:
        history: one dict per measurement and layer: ``step``, ``layer``, ``std``, ``standard_error``, ``size``,
            ``excess_kurtosis``, ``clipped``, ``centroid`` and ``error``.
        latest: layer → the last ERF.

    Raises:
        TypeError: if ``log`` is none of these.
        ValueError: if ``every`` is not positive, or a layer is not one of the model's (at the first measurement).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
        >>> tracker = ERFTracker(model, every=10, input_size=(1, 9, 9))
        >>> for _ in range(25):
        ...     tracker.step()
        >>> [row["step"] for row in tracker.history]
        [0, 10, 20]
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        input_size: Sequence[int] = (3, 224, 224),
        layers: Sequence[str | nn.Module | None] = (None,),
        inputs: Tensor | Iterable[Any] | None = None,
        samples: int = 8,
        log: str | Path | Any | None = None,
    ) -> None:
        require(isinstance(every, int) and every > 0, "every", "be a positive integer", every)
        require(not isinstance(layers, str), "layers", "be a sequence of modules or names", layers, TypeError)
        self.model, self.every, self.input_size = model, every, tuple(input_size)
        self.layers, self.samples = list(layers), samples
        # An iterator would be used up by the first measurement.
        self.inputs = inputs if inputs is None or isinstance(inputs, Tensor) else list(inputs)
        self.steps = 0
        self.history: list[dict[str, Any]] = []
        self.latest: dict[str, ERF] = {}
        self._log = open_log(log)
        self._known = False  # whether the layers were found once

    def step(self) -> None:
        """Count one training step; measure if it is due."""
        if self.steps % self.every == 0:
            self.measure()
        self.steps += 1

    def measure(self) -> dict[str, ERF]:
        """Measure now, write it down, and return layer → ERF of those that could be measured.

        Raises:
            ValueError: at the first measurement, if a layer is not one of the model's or ``input_size`` is refused.
        """
        if not _is_first_rank():
            return {}
        model = _unwrapped(self.model)
        if not self._known and is_finite(model):
            for layer in self.layers:
                Scene.of(model, self.input_size, layer)
            self._known = True
        names = {module: name for name, module in model.named_modules()}
        for layer in self.layers:
            name = "" if layer is None else layer if isinstance(layer, str) else names.get(layer, "?")
            erf, error = self._look(model, layer)
            row = {"step": self.steps, "layer": name, **_scalars(erf), "error": error}
            self.history.append(row)
            if erf is None:
                self.latest.pop(name, None)
                warnings.warn(f"the ERF of layer {name!r} cannot be measured: {error}", stacklevel=3)
            else:
                self.latest[name] = erf
            if self._log is not None:
                with _going_on(row):
                    self._log.write(row, erf)
        return dict(self.latest)

    def _look(self, model: nn.Module, layer: str | nn.Module | None) -> tuple[ERF | None, str | None]:
        try:
            with held(untouched(model), warnings.catch_warnings()):
                # The share goes into each row; a warning at every step would drown it.
                warnings.simplefilter("ignore", ClippedWarning)
                model.eval()
                return measure(model, self.input_size, layer=layer, inputs=self.inputs, samples=self.samples), None
        except Exception as error:  # whatever it is: the training goes on
            return None, _line(error)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on where this one was: the steps and the history."""
        return {"steps": self.steps, "history": [dict(row) for row in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.steps, self.history = int(state["steps"]), [dict(row) for row in state["history"]]

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call :meth:`step` after each step of ``optimizer``; ``remove()`` on what is returned ends it."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def lightning(self) -> Any:
        """Return a Lightning callback that calls :meth:`step` at the end of each training batch.

        Its state travels with Lightning's checkpoints. What is measured goes to the trainer's own loggers, too, as
        ``erf/LAYER/std`` and so on.

        Raises:
            ModuleNotFoundError: without Lightning (extra ``widerf[lightning]``).
        """
        from lightning.pytorch.callbacks import Callback

        tracker = self

        class ERFCallback(Callback):  # type: ignore[misc]
            def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
                known = len(tracker.history)
                tracker.step()
                for row in tracker.history[known:]:
                    for logger in trainer.loggers:
                        with _going_on(row):
                            logger.log_metrics(_metrics(row), step=row["step"])

            def state_dict(self) -> dict[str, Any]:
                return tracker.state_dict()

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                tracker.load_state_dict(state_dict)

        return ERFCallback()


@contextmanager
def _going_on(row: dict[str, Any]) -> Iterator[None]:
    """A full disk or a service that is away is told, and the training goes on."""
    try:
        yield
    except Exception as error:  # whatever a log may raise
        warnings.warn(f"the ERF of layer {row['layer']!r} cannot be logged: {_line(error)}", stacklevel=4)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error).strip() else type(error).__name__


def _is_first_rank() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within DistributedDataParallel, whose forward pass waits for the other ranks."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    tag = f"erf/{row['layer']}".rstrip("/")
    return {f"{tag}/{name}": row[name] for name in FIGURES}


def _scalars(erf: ERF | None) -> dict[str, Any]:
    if erf is None:
        return {**dict.fromkeys(FIGURES, math.nan), "standard_error": None, "centroid": None}
    several = erf.blocks is not None and len(erf.blocks) > 1
    return {
        "std": erf.std,
        "standard_error": erf.standard_error() if several else None,
        "size": erf.size(),
        "excess_kurtosis": erf.excess_kurtosis,
        "clipped": erf.clipped,
        "centroid": list(erf.centroid),
    }
