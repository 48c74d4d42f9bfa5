"""Layers of several tiles, chunks, images and blocks of channels, with a remainder in each: what small layers hide.

Tiles of the gathering kernels are 64 pixels (32 where a stride divides, 512 or 32 in depthwise layers) by 16 to 64
channels; chunks of a weight gradient are 256 pixels or more. The kernels of boxes take the sizes that a case names,
and cut a weight gradient into 40 programs.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from tests.kernels.interpreted import Case

# 2 images of 9 × 23 = 414 pixels: 6 tiles of 64 and 30 pixels; 2 chunks of 224, of which the last has 190.
MAP: dict[str, Any] = {"batch": 2, "size": (9, 23)}
WIDE: dict[str, Any] = {"batch": 2, "size": (19, 31)}  # 1178 pixels: 3 chunks of 512, of which the last has 154

KINDS = {
    "one pattern": Case(rows=(0,) * 32, outs=67, kernel=(1, 2), **MAP),
    "blocks of 64": Case(rows=(0,) * 64 + (1,) * 64, outs=19, kernel=(1, 2), **MAP),
    "each channel its own": Case(rows=tuple(range(5)), outs=67, kernel=(2, 2), **MAP),
    "wide and narrow runs": Case(rows=(0,) * 17 + (1, 2, 2), outs=35, kernel=(2, 2), **MAP),
    "wide runs of several blocks": Case(rows=(0,) * 70 + (1,) * 20, outs=5, kernel=(1, 2), **MAP),
    "groups": Case(rows=(0,) * 17 + (1,) * 3 + (2,) * 20, outs=42, groups=2, kernel=(1, 3), **MAP),
    "depthwise": Case(rows=(0, 1, 2), outs=3, groups=3, kernel=(2, 2), **WIDE),
    "depthwise, runs": Case(rows=(0,) * 16 + (1,) * 18, outs=34, groups=34, kernel=(1, 2), **MAP),
}
OLD = (("BOXES", False),)  # also where the layer could be computed by boxes
BOXES = {
    # 3 images of 7 × 9 in tiles of 16 pixels, 3 blocks of 16 inputs, 40 outputs in tiles of 32 and 8.
    "three blocks": Case(
        rows=(0,) * 16 + (1,) * 16 + (2,) * 16, outs=40, kernel=(1, 3), batch=3, size=(7, 9), sizes=(16, 32, 16)
    ),
    "steps of half a block": Case(rows=(0,) * 32 + (1,) * 32, outs=24, kernel=(1, 2), size=(9, 11), sizes=(32, 16, 16)),
    "window wider than the map": Case(
        rows=(0,) * 16 + (1,) * 16, outs=20, kernel=(2, 2), batch=5, size=(5, 3), reach=8, sizes=(16, 16, 16)
    ),
    "depthwise by blocks": Case(
        rows=(0,) * 32 + (1,) * 64, outs=96, groups=96, kernel=(2, 2), batch=3, size=(9, 19), sizes=(32, 1, 32)
    ),
    "depthwise, half a block a program": Case(
        rows=(0,) * 32 + (1,) * 32, outs=64, groups=64, kernel=(1, 5), size=(5, 21), sizes=(16, 1, 16)
    ),
    # Thirteen taps, seven a program: one more than are left in the second group.
    "depthwise, thirteen taps": Case(
        rows=(0,) * 16 + (1,) * 16, outs=32, groups=32, kernel=(1, 13), size=(5, 21), sizes=(32, 1, 16)
    ),
    # A weight gradient of 40 programs, 2 taps and 2 blocks of outputs: 10 parts, of which eight are added up at a time.
    "parts and outputs of several blocks": Case(
        rows=(0,) * 16, outs=80, kernel=(1, 2), batch=3, size=(9, 17), sizes=(16, 64, 16)
    ),
}
FORMS: dict[str, dict[str, Any]] = {
    "sliced": {"layout": "sliced"},
    "channels_last": {"layout": "channels_last"},
    "strided": {"stride": (2, 1), "reach": 2},
    "strided channels_last": {"stride": (1, 2), "layout": "channels_last", "padding": (2, 0)},
}


# The rest is slow. With `mutants.MUTANTS` these show that every kernel is looked at where it can be wrong.
FAST = (
    "one pattern, strided channels_last",
    "blocks of 64, strided",
    "each channel its own, sliced",
    "wide and narrow runs, sliced",
    "wide and narrow runs, strided",
    "wide and narrow runs, 64-bit addresses",
    "wide runs of several blocks, channels_last",
    "groups, sliced",
    "groups, channels_last",
    "depthwise, sliced",
    "depthwise, float16, channels_last",
    "depthwise, runs, channels_last",
    "depthwise, runs, strided channels_last",
    "the weight gradient that was wrong",
    "three blocks, sliced",
    "three blocks, strided",
    "three blocks, strided channels_last",
    "three blocks, bfloat16",
    "steps of half a block, channels_last",
    "window wider than the map, sliced",
    "window wider than the map, strided",
    "depthwise by blocks, channels_last",
    "depthwise by blocks, strided",
    "depthwise, half a block a program, sliced",
    "depthwise, half a block a program, float16, channels_last",
    "depthwise, thirteen taps, sliced",
    "parts and outputs of several blocks, sliced",
)


def several_tiles() -> dict[str, Case]:
    """All kinds of layers in all forms, and the settings that have code of their own."""
    gathered = {kind: replace(case, settings=OLD) for kind, case in KINDS.items()}
    kinds = gathered | {kind: replace(case, boxes=True) for kind, case in BOXES.items()}
    cases = {f"{kind}, {form}": replace(case, **FORMS[form]) for kind, case in kinds.items() for form in FORMS}
    cases["the weight gradient that was wrong"] = Case(rows=(0, 1, 2), outs=3, groups=3, size=(16, 16))
    for kind in ("wide and narrow runs", "depthwise"):
        far = replace(kinds[kind], settings=(("ADDRESSES", 0), *OLD))
        cases[f"{kind}, 64-bit addresses"] = far
        cases[f"{kind}, 64-bit addresses, channels_last"] = replace(far, layout="channels_last", stride=(1, 2))
    for kind in ("wide and narrow runs", "depthwise", "three blocks", "depthwise, half a block a program"):
        cases[f"{kind}, bfloat16"] = replace(kinds[kind], dtype="bfloat16")
        cases[f"{kind}, float16, channels_last"] = replace(kinds[kind], dtype="float16", layout="channels_last")
    # Columns of one image at a time, and as many chunks as there are steps.
    few, small = (("COLUMNS", 9000), *OLD), (("PIXELS", 16), *OLD)
    cases["each channel its own, many chunks"] = replace(kinds["each channel its own"], settings=few)
    cases["one pattern, small chunks"] = replace(kinds["one pattern"], settings=small)
    return cases


def drawn_blocks(seed: int) -> Case:
    """A layer for the kernels of boxes, of realistic sizes, drawn at random; a quarter of them in the table's sizes."""
    of = random.Random(seed)
    block = of.choice((16, 32, 64))
    ins = block * of.choice((1, 2, 3))
    depthwise = of.random() < 0.4
    dtype = of.choice(("float32", "float32", "bfloat16", "float16"))
    sizes = (of.choice((16, 32, 64)), of.choice((16, 32)), of.choice((16, 32)))
    return Case(
        rows=tuple(c // block for c in range(ins)),
        outs=ins if depthwise else of.choice((8, 40, 64, 72)),
        groups=ins if depthwise else 1,
        kernel=of.choice(((3, 3), (2, 2), (1, 3))),
        batch=of.choice((1, 2, 5)),
        size=(of.randint(3, 20), of.randint(3, 20)),
        stride=(of.randint(1, 3), of.randint(1, 2)),
        padding=(of.randint(1, 3), of.randint(1, 3)),
        dilation=(of.randint(1, 2), of.randint(1, 2)),
        reach=of.choice((1, 3, 7)),
        dtype=dtype,
        layout=of.choice(("contiguous", "channels_last", "sliced", "transposed")),
        sizes=of.choice((None, sizes, sizes, sizes)),
        boxes=True,
        seed=seed,
    )
