"""What ``summary`` costs, against asking for each of its rows by itself.

``python -m experiments.bench.summary``: resnet50 at 224 with its own initialisation, processor time. The rival is
``predict`` and ``receptive_field`` for one layer after the other; summaries are spread over that loop, so that whatever
else the machine does meanwhile meets both. Maps that differ by a single bit are counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch

import widerf
from experiments.roads.cases import timm_model
from widerf.errors import ClippedWarning

WANTED = 10


def processor_time(function: Callable[[], object]) -> float:
    """Seconds that all threads of this process were busy."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main(argv: Sequence[str] = ()) -> None:
    """Print the ratio with what it is made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore", ClippedWarning)
    build = timm_model(options.model, zero_init_last=False) if "resnet" in options.model else timm_model(options.model)
    model, size = build().eval(), (3, options.size, options.size)
    rows = [row for row in widerf.summary(model, size) if row.erf is not None]
    loop, whole, differing = 0.0, [], 0
    for index, row in enumerate(rows):
        if index % max(len(rows) // options.repeats, 1) == 0:
            whole.append(processor_time(lambda: widerf.summary(model, size)))
        start = time.process_time()
        erf = widerf.predict(model, size, layer=row.name)
        widerf.receptive_field(model, size, layer=row.name)
        loop += time.process_time() - start
        differing += not torch.equal(row.erf.map, erf.map)  # type: ignore[union-attr]
    low, middle, high = (loop / seconds for seconds in (max(whole), statistics.median(whole), min(whole)))
    print(f"{options.model} at {options.size}², eval, {torch.get_num_threads()} thread(s), {len(rows)} layers")
    print(f"summary {statistics.median(whole):.2f} s, layer by layer {loop:.1f} s of processor time")
    print(f"{middle:.1f} × ({low:.1f} to {high:.1f}, n = {len(whole)}); goal {WANTED}; maps that differ: {differing}")


if __name__ == "__main__":
    main(sys.argv[1:])
