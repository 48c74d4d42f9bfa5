"""What the evidence on a card consists of: parts, each a list of runs with a name, most decisive first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.compare import arms, tasks
from experiments.compare.curve import Curve
from experiments.compare.far_pair import Stack, far_pair
from experiments.compare.protocol import Cell, protocol
from experiments.gpu import evidence_nets as nets
from experiments.gpu.evidence_study import Build, Rows, Run, Study
from experiments.gpu.evidence_training import Pictures, Plan, Stepper
from experiments.harness import camvid, data
from experiments.harness.runs import Record
from experiments.patterns import settings

INIT = ("he", "widened-0.5", "widened-1", "shuffled-0.5", "inverse-0.5", "xavier", "lasting-0.5", "lasting_only-0.5")
LASTING = ("lasting-0.5", "lasting_only-0.5")


@dataclass(frozen=True)
class Size:
    """How large the runs are: as on a card, or tiny, to see on any device that they work."""

    small: bool

    def __call__(self, large: int, tiny: int) -> int:
        """Return the one or the other."""
        return tiny if self.small else large


Part = Callable[[torch.device, Size, Path | None, Rows], Iterator[Run]]

# ── far-pair ──────────────────────────────────────────────────────────────────────────────────────────────────────


def device_batch(n: int, stack: int, radius: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n images of far-pair for each of ``stack`` networks on the generator's device.

    Returns:
        Images (n, stack, side, side) and labels (n, stack), as ``far_pair_batch`` draws them for one network.
    """
    where, side = generator.device, 2 * radius + 3
    images = torch.randn(n, stack, side * side, device=where, generator=generator) * 0.5
    axis = torch.arange(-radius, radius + 1, device=where)
    square = torch.cartesian_prod(axis, axis)
    ring = square[square.abs().amax(1) == radius]
    p = ring[torch.randint(len(ring), (n, stack), device=where, generator=generator)]
    signs = torch.randint(2, (n, stack, 2), device=where, generator=generator) * 2 - 1
    for k, towards in enumerate((1, -1)):
        at = side // 2 + towards * p
        images.scatter_(2, (at[..., :1] * side + at[..., 1:]), 3.0 * signs[..., k : k + 1])
    return images.view(n, stack, side, side), (signs[..., 0] == signs[..., 1]).long()


def _stack_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the networks of their mean losses: no network's parameters are in another one's."""
    return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").mean(0).sum()


def far_pair_stacks(cell: Cell, names: Sequence[str], seeds: range, rate: float, device: torch.device) -> list[Record]:
    """Train the networks of all arms and seeds at once, a stack an arm; the batches are the same in every arm."""
    about, task = protocol("far-pair"), far_pair(**cell.options)
    built = {name: [arms.choose([name], [])[0].build(task.network, seed) for seed in seeds] for name in names}
    stacks = [Stack(networks).to(device) for networks in built.values()]
    card = device.type == "cuda"
    optimizers = [torch.optim.Adam(stack.parameters(), rate, capturable=card, foreach=card) for stack in stacks]
    step = Stepper(stacks, optimizers, _stack_loss)
    curves = [[Curve(about.target) for _ in seeds] for _ in names]
    generator = torch.Generator(device).manual_seed(1000 + seeds[0])
    images, labels = (part.to(device) for part in task.validation)
    for number in range(1, cell.steps + 1):
        losses = step(*device_batch(64, len(seeds), cell.options["radius"], generator))
        if number % task.every == 0 or number == cell.steps:
            for stack, mine, loss in zip(stacks, curves, losses.tolist(), strict=True):
                with torch.no_grad():
                    guess = stack(images.expand(-1, len(seeds), -1, -1)).argmax(2)
                right = (guess == labels[:, None]).double().mean(0).tolist()
                for curve, accuracy in zip(mine, right, strict=True):
                    curve.look(number, accuracy, loss / len(seeds))
    where = {**cell.options, "lr": rate, "budget": cell.steps, "protocol": about.hash}
    return [
        {
            "arm": f"{cell}: {name}",
            **where,
            "seed": seed,
            **curve.record(),
            "curve": {"every": task.every, "accuracy": curve.accuracy},
        }
        for name, mine in zip(names, curves, strict=True)
        for seed, curve in zip(seeds, mine, strict=True)
    ]


def far_pair_runs(device: torch.device, size: Size, data_dir: Path | None, rows: Rows) -> Iterator[Run]:
    """Yield the cells of the protocol, every arm that is a plain stack; the rate is the protocol's middle one."""
    about, count = protocol("far-pair"), size(24, 2)
    names = [*(arm.name for arm in arms.choose(about.arms, []) if arm.taps != "sparse"), *LASTING]
    for cell in about.cells[: size(len(about.cells), 1)]:
        short = Cell(size(cell.steps, 20), cell.task, cell.options)
        seeds = range(100, 100 + count)
        do = partial(far_pair_stacks, short, names[: size(len(names), 2)], seeds, about.rates[1], device)
        yield Run(str(cell), seeds[0], do)


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def cifar10_pictures(data_dir: Path | None, device: torch.device) -> Pictures:
    """Return CIFAR-10 on the device; every tenth training image is held out."""
    images = data.cifar10(data_dir)
    held = torch.arange(len(images.train)) % 10 == 0
    train, held_out = ((images.train[part], images.train_labels[part]) for part in (~held, held))
    return Pictures(train, held_out, (images.test, images.test_labels), shift=4).to(device)


@cache
def camvid_pictures(data_dir: Path | None, device: torch.device, height: int, width: int) -> Pictures:
    """Return CamVid on the device: 307 frames to train on, 60 held out, and the 101 val frames."""
    frames = camvid.load(data_dir, (height, width))
    return Pictures(frames.train, frames.held_out, frames.val, shift=max(1, height // 15)).to(device)


def _initialised(
    network: Callable[[Callable[..., nn.Module]], nn.Sequential], names: Sequence[str]
) -> dict[str, Build]:
    return {arm.name: partial(arm.build, network) for arm in arms.choose(names, [])}


def _seeds(size: Size, confirm: int = 20) -> dict[str, tuple[int, ...]]:
    return {"choose": tuple(range(size(3, 1))), "confirm": tuple(range(100, 100 + size(confirm, 1)))}


def cifar10_studies(device: torch.device, size: Size, data_dir: Path | None) -> Iterator[Study]:
    """Yield plain-20 without batch norm at k = 3, a net of 90 %, and plain-20 at k = 5, each under all initialisers."""
    pictures, names = partial(cifar10_pictures, data_dir, device), INIT[: size(len(INIT), 2)]
    plain = {k: tasks.plain20_network(k, width=size(16, 4), stem=size(1, 2)) for k in (3, 5)}
    short, long = Plan(size(700, 4), size(256, 8), 10), Plan(size(1400, 4), size(512, 8), 10)
    slow, fast = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
    common: dict[str, Any] = {"said": {}, "erf": 20, **_seeds(size)}
    yield Study("plain20", _initialised(plain[3], names), pictures, short, slow[: size(3, 1)], **common)
    yield Study("resnet9", _initialised(nets.resnet9(size(64, 4)), names), pictures, long, fast[: size(3, 1)], **common)
    yield Study("plain20-5x5", _initialised(plain[5], names), pictures, short, slow[: size(3, 1)], **common)


def paper_studies(device: torch.device, size: Size, data_dir: Path | None) -> Iterator[Study]:
    """Yield the paper's 17 blocks without down-sampling, at one rate."""
    pictures, names = partial(cifar10_pictures, data_dir, device), INIT[: size(4, 2)]
    plan = Plan(size(2000, 4), size(256, 4), 10)
    seeds = {"choose": (), "confirm": tuple(range(100, 100 + size(3, 1)))}
    yield Study("paper17", _initialised(nets.paper17(size(32, 4)), names), pictures, plan, (3e-3,), **seeds, said={})


def camvid_studies(
    network: Callable[..., Any], width: int, device: torch.device, size: Size, data_dir: Path | None
) -> Iterator[Study]:
    """Yield initialisers at 360×480."""
    shape = (size(360, 24), size(480, 32))
    built = network(width=size(width, 6), blocks=size(8, 2))
    pictures, names = partial(camvid_pictures, data_dir, device, *shape), INIT[: size(len(INIT), 2)]
    plan = Plan(size(600, 4), size(16, 4), camvid.CLASSES)
    yield Study("camvid", _initialised(built, names), pictures, plan, (3e-3,), **_seeds(size) | {"choose": ()}, said={})


def pattern_studies(
    device: torch.device, size: Size, data_dir: Path | None, names: Sequence[str] = ()
) -> Iterator[Study]:
    """Yield the settings of the pattern study."""
    for name, setting in settings.SETTINGS.items():
        if names and name not in names:
            continue
        shape = setting.size if setting.task == "cifar10" or not size.small else (24, 32)
        pictures = (
            partial(cifar10_pictures, data_dir, device)
            if setting.task == "cifar10"
            else partial(camvid_pictures, data_dir, device, *shape)
        )
        builds = setting.arms()
        chosen = dict(list(builds.items())[:: size(1, len(builds) - 1)])
        plan = Plan(size(setting.steps, 4), size(setting.batch, 4), setting.classes)
        seeds = {"choose": settings.CHOOSE[: size(3, 1)], "confirm": settings.CONFIRM[: size(20, 1)]}
        yield Study(
            name, chosen, pictures, plan, settings.RATES[: size(3, 1)], **seeds, said={"protocol": settings.HASH}
        )


def _runs(studies: Callable[..., Iterator[Study]]) -> Part:
    def runs(device: torch.device, size: Size, data_dir: Path | None, rows: Rows) -> Iterator[Run]:
        for study in studies(device, size, data_dir):
            yield from study.runs(rows)

    return runs


def cost_runs(device: torch.device, size: Size, data_dir: Path | None, rows: Rows) -> Iterator[Run]:
    """Yield what a step of each kind of taps costs, in every setting of the pattern study."""
    for study in pattern_studies(device, size, data_dir):
        yield from study.costs(size(60, 2))


PARTS: dict[str, Part] = {
    "far-pair": far_pair_runs,
    "cifar10": _runs(cifar10_studies),
    "paper17": _runs(paper_studies),
    "camvid": _runs(partial(camvid_studies, nets.segmenter, 64)),
    "camvid-depthwise": _runs(partial(camvid_studies, nets.depthwise, 96)),
    **{f"patterns-{name}": _runs(partial(pattern_studies, names=(name,))) for name in settings.SETTINGS},
    "costs": cost_runs,
}
