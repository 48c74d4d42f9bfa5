"""What the evidence on a card consists of: parts, each a list of runs with a name, most decisive first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import widerf
from experiments.compare import arms, tasks
from experiments.compare.curve import Curve
from experiments.compare.far_pair import Stack, far_pair
from experiments.compare.protocol import Cell, protocol
from experiments.gpu import evidence_nets as nets
from experiments.gpu.evidence_training import Pictures, Stepper, train
from experiments.harness import camvid, data
from experiments.harness.runs import Record
from widerf.errors import ClippedWarning, DeadUnitError

INIT = ("he", "widened-0.5", "widened-1", "shuffled-0.5", "inverse-0.5", "xavier", "orthogonal", "torch")
GROWING = (1, 1, 2, 2, 4, 4, 8, 8)  # spacing of each block of the segmenter


@dataclass(frozen=True)
class Size:
    """How large the runs are: as on a card, or tiny, to see on any device that they work."""

    small: bool

    def __call__(self, large: int, tiny: int) -> int:
        """Return the one or the other."""
        return tiny if self.small else large


@dataclass(frozen=True)
class Run:
    """One run: its key in the table, and what does it."""

    arm: str
    seed: int
    do: Callable[[], list[Record]]


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


def far_pair_stack(cell: Cell, arm: str, seeds: range, rate: float, device: torch.device) -> list[Record]:
    """Train networks of one arm at once and return a record each; the batches are the same in every arm."""
    about, task = protocol("far-pair"), far_pair(**cell.options)
    built = [arms.choose([arm], [])[0].build(task.network, seed) for seed in seeds]
    stack, curves = Stack(built).to(device), [Curve(about.target) for _ in seeds]
    card = device.type == "cuda"
    step = Stepper(stack, torch.optim.Adam(stack.parameters(), rate, capturable=card, foreach=card), _stack_loss)
    generator = torch.Generator(device).manual_seed(1000 + seeds[0])
    images, labels = (part.to(device) for part in task.validation)
    for number in range(1, cell.steps + 1):
        loss = step(*device_batch(64, len(seeds), cell.options["radius"], generator))
        if number % task.every == 0 or number == cell.steps:
            with torch.no_grad():
                guess = stack(images.expand(-1, len(seeds), -1, -1)).argmax(2)
            right = (guess == labels[:, None]).double().mean(0).tolist()
            for curve, accuracy in zip(curves, right, strict=True):
                curve.look(number, accuracy, float(loss) / len(seeds))
    where = {**cell.options, "lr": rate, "budget": cell.steps, "protocol": about.hash}
    return [
        {**where, "seed": seed, **curve.record(), "curve": {"every": task.every, "accuracy": curve.accuracy}}
        for seed, curve in zip(seeds, curves, strict=True)
    ]


def far_pair_runs(device: torch.device, size: Size, _: Path | None) -> Iterator[Run]:
    """Yield the cells of the protocol, every arm that is a plain stack; the rate is the protocol's middle one."""
    about, count = protocol("far-pair"), size(64, 2)
    names = [arm.name for arm in arms.choose(about.arms, []) if arm.taps != "sparse"]
    for cell in about.cells[: size(len(about.cells), 1)]:
        short = Cell(size(cell.steps, 20), cell.task, cell.options)
        for name in names[: size(len(names), 2)]:
            seeds = range(100, 100 + count)
            do = partial(far_pair_stack, short, name, seeds, about.rates[1], device)
            yield Run(f"{cell}: {name}", seeds[0], do)


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def cifar10_pictures(data_dir: Path | None, device: torch.device) -> Pictures:
    """Return CIFAR-10 on the device."""
    images = data.cifar10(data_dir)
    return Pictures((images.train, images.train_labels), (images.test, images.test_labels), shift=4).to(device)


@cache
def camvid_pictures(data_dir: Path | None, device: torch.device, height: int, width: int) -> Pictures:
    """Return CamVid on the device: 307 frames to train on, and the 101 val frames."""
    frames = camvid.load(data_dir, (height, width))
    return Pictures(frames.train, frames.val, shift=max(1, height // 15)).to(device)


def image_run(
    network: Callable[[Callable[..., nn.Module]], nn.Sequential],
    arm: arms.Arm,
    seed: int,
    pictures: Callable[[], Pictures],
    options: dict[str, int | float],
    spacings: tuple[int, ...] = (),
) -> list[Record]:
    """Train one network on pictures and return its record, ERF std before and after predicted."""
    there = pictures()
    net = arm.build(network, seed)
    _space(net, spacings)
    side = tuple(there.test[0].shape[1:])
    before = _predicted(net, side)
    torch.manual_seed(seed)
    outcome = train(net, there, seed=1000 + seed, **options)  # type: ignore[arg-type]
    return [
        {
            "seed": seed,
            "score": outcome.score,
            "curve": outcome.curve,
            "loss": outcome.loss,
            "outcome": "budget" if outcome.loss is not None else "diverged",
            "seconds": {"step": outcome.seconds_a_step},
            "predicted_std": [before, None if outcome.loss is None else _predicted(net.cpu(), side)],
            **{name: options[name] for name in ("steps", "rate", "size")},
        }
    ]


def _predicted(net: nn.Sequential, size: tuple[int, ...]) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        try:
            return round(widerf.predict(net.eval(), size, layer="features").std, 4)
        except DeadUnitError:
            return None


def _space(net: nn.Sequential, spacings: tuple[int, ...]) -> None:
    """Space the taps of the residual branches, a spacing a block; their layers have stride 1."""
    blocks = [module for module in net.modules() if isinstance(module, nets.Residual)]
    for block, spacing in zip(blocks, spacings, strict=False):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size[0] > 1:
                reach = spacing * (conv.kernel_size[0] // 2)
                conv.dilation, conv.padding = (spacing, spacing), (reach, reach)


def cifar10_runs(device: torch.device, size: Size, data_dir: Path | None) -> Iterator[Run]:
    """Yield a net of 90 % and plain-20 without batch norm at k = 3 and 5, seed by seed."""
    plain = {k: tasks.plain20_network(k, width=size(16, 4), stem=size(1, 2)) for k in (3, 5)}
    kinds = {"resnet9": nets.resnet9(size(64, 4)), "plain20": plain[3], "plain20-5x5": plain[5]}
    options = {"steps": size(1500, 4), "size": size(512, 8), "rate": 3e-3, "classes": 10}
    for seed in range(100, 100 + size(20, 1)):
        for kind, network in kinds.items():
            rate = options["rate"] if kind == "resnet9" else 1e-3
            for arm in arms.choose(INIT[: size(len(INIT), 2)], []):
                pictures = partial(cifar10_pictures, data_dir, device)
                do = partial(image_run, network, arm, seed, pictures, {**options, "rate": rate})
                yield Run(f"{kind}: {arm.name}", seed, do)


def paper_runs(device: torch.device, size: Size, data_dir: Path | None) -> Iterator[Run]:
    """Yield the paper's 17 blocks without down-sampling."""
    options = {"steps": size(2000, 4), "size": size(256, 4), "rate": 3e-3, "classes": 10}
    for seed in range(100, 100 + size(3, 1)):
        for arm in arms.choose(INIT[: size(6, 2)], []):
            pictures = partial(cifar10_pictures, data_dir, device)
            do = partial(image_run, nets.paper17(size(32, 4)), arm, seed, pictures, options)
            yield Run(f"paper17: {arm.name}", seed, do)


def camvid_runs(
    network: nn.Module, width: int, device: torch.device, size: Size, data_dir: Path | None
) -> Iterator[Run]:
    """Yield initialisers on dense taps and on the growing grid, at 360×480."""
    options = {"steps": size(950, 4), "size": size(16, 4), "rate": 3e-3, "classes": camvid.CLASSES}
    shape = (size(360, 24), size(480, 32))
    built = network(width=size(width, 6), blocks=size(8, 2))
    for seed in range(100, 100 + size(20, 1)):
        for name, spacings in (("dense", ()), ("growing", GROWING)):
            for arm in arms.choose(INIT[: size(4, 1)], []):
                pictures = partial(camvid_pictures, data_dir, device, *shape)
                do = partial(image_run, built, arm, seed, pictures, options, spacings)
                yield Run(f"{name}: {arm.name}", seed, do)


# ── seconds ───────────────────────────────────────────────────────────────────────────────────────────────────────


def step_cost(build: Callable[[], nn.Sequential], pictures: Callable[[], Pictures], size: int, classes: int) -> Record:
    """Measure the median milliseconds of a training step, in graphs where there are some."""
    there = pictures()
    steps = 13
    outcome = train(build(), there, steps=steps, size=size, rate=1e-3, seed=0, classes=classes, looks=1)
    return {"seed": 0, "seconds": {"step": outcome.seconds_a_step}}


def cost_runs(device: torch.device, size: Size, data_dir: Path | None) -> Iterator[Run]:
    """Yield what a step of each kind of taps costs."""
    network, pictures = nets.resnet9(size(64, 4)), partial(cifar10_pictures, data_dir, device)
    for taps in ("dense", "dilated", "sparse"):
        build = partial(arms.Arm(taps, taps=taps).build, network, 0)
        yield Run(f"resnet9: {taps}", 0, lambda build=build: [step_cost(build, pictures, size(512, 8), 10)])  # type: ignore[misc]


PARTS: dict[str, Callable[[torch.device, Size, Path | None], Iterator[Run]]] = {
    "far-pair": far_pair_runs,
    "cifar10": cifar10_runs,
    "paper17": paper_runs,
    "camvid": partial(camvid_runs, nets.segmenter, 64),  # type: ignore[arg-type]
    "camvid-depthwise": partial(camvid_runs, nets.depthwise, 96),  # type: ignore[arg-type]
    "costs": cost_runs,
}
