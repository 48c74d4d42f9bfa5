"""What ``predict`` costs: in forward-backward passes of the model, and against ``measure`` over redrawn weights.

``python -m experiments.bench.predict``: resnet50 at 224 with its own initialisation, batch norm in eval mode. With
``measure`` a standard error of 1 % takes (scatter of std per draw / 1 %)² draws; both scatters come from the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

import widerf
from experiments.roads.cases import timm_model
from widerf.errors import ClippedWarning

WANTED = 0.01


def interleaved(rivals: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Durations of rivals that take turns, after a turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(repeats + 1):
        for name, function in rivals.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def forward_backward(model: nn.Module, image: torch.Tensor) -> None:
    """One training pass: gradients of all weights and of the image."""
    model(image.requires_grad_()).sum().backward()
    model.zero_grad(set_to_none=True)


def main(argv: Sequence[str] = ()) -> None:
    """Print the two ratios with what they are made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--draws", type=int, default=24, help="draws that the scatter of measure is taken from")
    parser.add_argument("--weights", type=int, default=8, help="sets of weights for the scatter of predict")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore", ClippedWarning)
    build = timm_model(options.model, zero_init_last=False) if "resnet" in options.model else timm_model(options.model)
    model, size = build().eval(), (3, options.size, options.size)
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))

    def redraw(target: nn.Module, generator: torch.Generator) -> None:
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        target.load_state_dict(build().state_dict())

    rivals: dict[str, Callable[[], object]] = {
        "pass": lambda: forward_backward(model, image), "predict": lambda: widerf.predict(model, size)
    }  # fmt: skip
    times = interleaved(rivals, options.repeats)
    one_pass, one_prediction = (statistics.median(times[name]) for name in rivals)
    ratios = [mine / theirs for mine, theirs in zip(times["predict"], times["pass"], strict=True)]
    start = time.perf_counter()
    erf = widerf.measure(model, size, samples=options.draws, redraw=redraw)
    per_draw = (time.perf_counter() - start) / options.draws
    scatter = erf.standard_error("std") / erf.std * options.draws**0.5
    generator = torch.Generator().manual_seed(5)
    stds = []
    for _ in range(options.weights):
        redraw(model, generator)
        stds.append(widerf.predict(model, size).std)
    own = statistics.stdev(stds) / statistics.mean(stds)
    draws = max(1.0, (scatter / WANTED) ** 2)
    runs = max(1.0, (own / WANTED) ** 2)
    threads = torch.get_num_threads()
    print(f"{options.model} at {options.size}², eval, {threads} thread(s), medians of {options.repeats}")
    print(
        f"forward and backward {one_pass:.2f} s; predict {one_prediction:.2f} s, "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) passes; goal 2"
    )
    print(
        f"measure: {per_draw:.2f} s a draw, std scatters by {scatter:.1%} per draw: {draws:.1f} draws for {WANTED:.0%}"
    )
    print(
        f"predict: std scatters by {own:.1%} over {options.weights} sets of weights: {runs:.1f} runs for {WANTED:.0%}"
    )
    ratio = draws * per_draw / (runs * one_prediction)
    print(
        f"std: measured {erf.std:.2f}, predicted {statistics.mean(stds):.2f}; "
        f"predict is {ratio:.1f} × cheaper; goal 100"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
