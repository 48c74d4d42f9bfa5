"""Time to a standard error of 2 %: ``widerf.measure`` against openerf 0.6.1 on the same model and the same image files.

``python -m experiments.bench measure`` runs on random images, or on frames of CamVid where ``WIDERF_DATA`` names it.
openerf keeps the positive part of the gradient of the summed channels, widerf the energy over all channels. Each tool
is judged by its own standard error (jackknife over images), in two ways:

- the **map**: relative root-mean-square error over pixels of openerf's map and of widerf's amplitude map, which
  estimate the same shape;
- the **std** of openerf's map, of widerf's amplitude map and of widerf's energy map.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import widerf
from experiments.harness.data import default_dir
from widerf.erf.jackknife import jackknife_error
from widerf.trace.site import spatial_layer

TARGET = 0.02
FEW, MANY = 8, 24
REPETITIONS = 3
SIZE = (224, 224)


@dataclass
class Side:
    """One tool: seconds before the first image, seconds per image, and relative error of one image by figure."""

    start: float
    per_image: float
    errors: dict[str, float]

    def images(self, figure: str) -> float:
        """Images until the figure's standard error is the target."""
        return max((self.errors[figure] / TARGET) ** 2, 1.0)

    def seconds(self, figure: str) -> float:
        """Time until then."""
        return self.start + self.per_image * self.images(figure)


def image_files(folder: Path, count: int) -> None:
    """Write ``count`` images: frames of CamVid where there are, else smooth random fields."""
    data_dir = default_dir()
    if data_dir is not None:
        from experiments.roads.real_weights import camvid_frames

        frames = camvid_frames(data_dir, count, size=SIZE) * 128 + 127
    else:
        noise = torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        frames = nn.functional.interpolate(noise, size=SIZE, mode="bicubic") * 60 + 127
    pixels = frames.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:03}.png")


def networks() -> dict[str, nn.Module]:
    """A net with trained weights and one with fresh ones."""
    import timm

    from experiments.roads.real_weights import pretrained

    torch.manual_seed(0)
    fresh = timm.create_model("resnet18", zero_init_last=False)
    return {"efficientnet_lite0, ImageNet weights": pretrained(), "resnet18, fresh weights": fresh.eval()}


def errors(maps: Tensor, figures: dict[str, Callable[[Tensor], Any]]) -> dict[str, float]:
    """Relative standard error of one image: jackknife over the images' maps, times the root of their number."""
    total = maps.sum(0)
    found = {}
    for name, figure in figures.items():
        full = np.asarray(figure(total / total.sum()))
        partial = np.stack([np.asarray(figure((total - m).clamp_min(0) / (total - m).sum())) for m in maps])
        error = jackknife_error(full, partial, [1] * len(maps))
        found[name] = math.sqrt(len(maps) * float((error**2).sum() / (full**2).sum()))
    return found


def std(share: Tensor) -> float:
    """Std of a map."""
    return widerf.ERF.from_energy(share, center=[0.0] * share.ndim, clipped=0.0).std


def amplitude(energy: Tensor) -> Tensor:
    """√ of an energy map, scaled to sum 1."""
    return energy.sqrt() / energy.sqrt().sum()


def time_openerf(model: nn.Module, layer: str, folder: Path) -> Side:
    """Time openerf's own entry point; its per-image maps are overheard for the error."""
    from openerf import erf as openerf

    maps: list[Tensor] = []
    inner = openerf._compute_positive_input_gradients_from_layer

    def overheard(*args: Any, **kwargs: Any) -> Tensor:
        maps.append(inner(*args, **kwargs))
        return maps[-1]

    def once(count: int) -> float:
        maps.clear()
        start = time.perf_counter()
        openerf.compute_erf(model, folder, count, layer, device="cpu", show_progress=False)
        return time.perf_counter() - start

    openerf._compute_positive_input_gradients_from_layer = overheard
    try:
        few, many = once(FEW), once(MANY)
    finally:
        openerf._compute_positive_input_gradients_from_layer = inner
    found = errors(torch.stack(maps).double(), {"map": lambda m: m, "std": std})
    return _side(few, many, {**found, "std of the energy": found["std"]})


def time_widerf(model: nn.Module, layer: str, folder: Path) -> Side:
    """Time ``measure`` on the same files, read by openerf's own dataset and transform."""
    from openerf.data import FlatImageDataset, build_timm_eval_transform

    transform, _ = build_timm_eval_transform(model)
    blocks: list[Tensor] = []

    def once(count: int) -> float:
        start = time.perf_counter()
        data = FlatImageDataset(image_dir=folder, transform=transform, max_images=count)
        loader = DataLoader(data, batch_size=8)
        erf = widerf.measure(model, (3, *SIZE), layer=layer, inputs=loader, samples=count)
        elapsed = time.perf_counter() - start
        assert erf.blocks is not None
        blocks[:] = [erf.blocks.double()]
        return elapsed

    few, many = once(FEW), once(MANY)
    figures = {"map": amplitude, "std": lambda m: std(amplitude(m)), "std of the energy": std}
    return _side(few, many, errors(blocks[0], figures))


def _side(few: float, many: float, found: dict[str, float]) -> Side:
    per_image = (many - few) / (MANY - FEW)
    return Side(max(few - FEW * per_image, 0.0), per_image, found)


def main() -> None:
    """Print the table."""
    import openerf

    version = getattr(openerf, "__version__", "0.6.1")
    print(f"time to a standard error of {TARGET:.0%}; openerf {version}, {torch.get_num_threads()} threads")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image_files(folder, MANY)
        for title, model in networks().items():
            layer = spatial_layer(model, (3, *SIZE)).name
            pairs = [
                (time_openerf(model, layer, folder), time_widerf(model, layer, folder)) for _ in range(REPETITIONS)
            ]
            print(f"{title}, layer {layer}, n = {REPETITIONS} pairs of runs of {MANY} images")
            for figure in pairs[0][1].errors:
                _report(figure, pairs)


def _report(figure: str, pairs: list[tuple[Side, Side]]) -> None:
    ratios = [theirs.seconds(figure) / ours.seconds(figure) for theirs, ours in pairs]
    theirs, ours = pairs[0]
    print(
        f"  {figure:18}: openerf {theirs.images(figure):7.1f} images, {theirs.seconds(figure):8.1f} s;"
        f" widerf {ours.images(figure):7.1f} images, {ours.seconds(figure):8.1f} s;"
        f" openerf / widerf {statistics.mean(ratios):.2f} ± {statistics.stdev(ratios):.2f}"
    )


if __name__ == "__main__":
    main()
