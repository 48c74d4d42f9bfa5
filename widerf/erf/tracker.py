"""The ERF during training: measured every so many steps, written to TensorBoard or to JSON lines."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widerf._checks import require
from widerf.erf.map import ERF
from widerf.erf.measurement import measure
from widerf.errors import ClippedWarning
from widerf.trace.sandbox import untouched

_CELLS = 32  # per axis, of the maps in JSON lines


class ERFTracker:
    """Measures a model's ERF every ``every`` steps of its training and keeps or writes what it finds.

    Call :meth:`step` once in each training step, let :meth:`attach` do so after each step of an optimizer, or give
    :meth:`lightning` to a Lightning ``Trainer``. Training goes on as if nothing had happened: the model is measured in
    eval mode and comes back bit-identical, as does the random state.

    Args:
        model: the model in training.
        every: steps between two measurements; the first step is measured.
        input_size: ``(channels, *spatial)``.
        layers: modules or names to look at; None is the last spatial map before global pooling.
        inputs: images for :func:`widerf.measure`, the same each time; by default N(0, 1).
        samples: draws per measurement.
        log: where to write: a path that ends in ``.jsonl``; any other path is a folder for TensorBoard (extra
            ``widerf[tensorboard]``); an object with ``add_scalar`` and ``add_figure``, such as a ``SummaryWriter``; or
            None.

    Attributes:
        history: one dict per measurement and layer: ``step``, ``layer``, ``std``, ``standard_error``, ``size``,
            ``excess_kurtosis``, ``clipped`` and ``centroid``.
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
        self._log = _open(log)

    def step(self) -> None:
        """Count one training step; measure if it is due."""
        if self.steps % self.every == 0:
            self.measure()
        self.steps += 1

    def measure(self) -> dict[str, ERF]:
        """Measure now, write it down, and return layer → ERF."""
        names = {module: name for name, module in self.model.named_modules()}
        for layer in self.layers:
            name = "" if layer is None else layer if isinstance(layer, str) else names.get(layer, "?")
            with untouched(self.model), warnings.catch_warnings():
                # The share goes into each row; a warning at every step would drown it.
                warnings.simplefilter("ignore", ClippedWarning)
                self.model.eval()
                erf = measure(self.model, self.input_size, layer=layer, inputs=self.inputs, samples=self.samples)
            row = {"step": self.steps, "layer": name, **_scalars(erf)}
            self.history.append(row)
            self.latest[name] = erf
            if self._log is not None:
                self._log.write(row, erf)
        return dict(self.latest)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call :meth:`step` after each step of ``optimizer``; ``remove()`` on what is returned ends it."""
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def lightning(self) -> Any:
        """Return a Lightning callback that calls :meth:`step` at the end of each training batch.

        Raises:
            ModuleNotFoundError: without Lightning (extra ``widerf[lightning]``).
        """
        from lightning.pytorch.callbacks import Callback

        tracker = self

        class ERFCallback(Callback):  # type: ignore[misc]
            def on_train_batch_end(self, *_: Any, **__: Any) -> None:
                tracker.step()

        return ERFCallback()


def _scalars(erf: ERF) -> dict[str, Any]:
    several = erf.blocks is not None and len(erf.blocks) > 1
    return {
        "std": erf.std,
        "standard_error": erf.standard_error() if several else None,
        "size": erf.size(),
        "excess_kurtosis": erf.excess_kurtosis,
        "clipped": erf.clipped,
        "centroid": list(erf.centroid),
    }


def _open(log: Any) -> _JSONLines | _TensorBoard | None:
    if log is None:
        return None
    if isinstance(log, str | Path):
        return _JSONLines(Path(log)) if Path(log).suffix == ".jsonl" else _TensorBoard(_summary_writer(Path(log)))
    able = hasattr(log, "add_scalar") and hasattr(log, "add_figure")
    require(able, "log", "be a path, a SummaryWriter or None", log, TypeError)
    return _TensorBoard(log)


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


class _JSONLines:
    """One line per measurement: the scalars, and the map summed over cells so that a line stays short."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, row: dict[str, Any], erf: ERF) -> None:
        cells = coarse(erf.map)
        line = {**row, "map": [float(f"{share:.4g}") for share in cells.flatten()], "map_shape": list(cells.shape)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, row: dict[str, Any], erf: ERF) -> None:
        from widerf.erf import plot

        tag = f"erf/{row['layer']}".rstrip("/")
        for name in ("std", "size", "excess_kurtosis", "clipped"):
            self.writer.add_scalar(f"{tag}/{name}", row[name], row["step"])
        self.writer.add_figure(f"{tag}/map", plot.figure(erf), row["step"])
        self.writer.flush()


def coarse(share: Tensor, cells: int = _CELLS) -> Tensor:
    """Sum a map over cells of equal extent, at most ``cells`` per axis; the total stays.

    Example:
        >>> coarse(torch.ones(5), 2).tolist()
        [3.0, 2.0]
    """
    for axis, n in enumerate(share.shape):
        side = -(-n // cells)
        index = torch.arange(n) // side
        shape = [*share.shape[:axis], int(index[-1]) + 1, *share.shape[axis + 1 :]]
        share = torch.zeros(shape, dtype=share.dtype).index_add_(axis, index, share)
    return share
