"""Layers of several tiles, chunks, images and blocks of channels, with a remainder in each: what small layers hide.

Tiles of the gathering kernels are 64 pixels (32 where a stride divides, 512 or 32 in depthwise layers) by 16 to 64
channels; chunks of a weight gradient are 256 pixels or more.
"""

from __future__ import annotations

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
)


def several_tiles() -> dict[str, Case]:
    """All kinds of layers in all forms, and the settings that have code of their own."""
    cases = {f"{kind}, {form}": replace(case, **FORMS[form]) for kind, case in KINDS.items() for form in FORMS}
    cases["the weight gradient that was wrong"] = Case(rows=(0, 1, 2), outs=3, groups=3, size=(16, 16))
    for kind in ("wide and narrow runs", "depthwise"):
        far = replace(KINDS[kind], settings=(("ADDRESSES", 0),))
        cases[f"{kind}, 64-bit addresses"] = far
        cases[f"{kind}, 64-bit addresses, channels_last"] = replace(far, layout="channels_last", stride=(1, 2))
        cases[f"{kind}, bfloat16"] = replace(KINDS[kind], dtype="bfloat16")
        cases[f"{kind}, float16, channels_last"] = replace(KINDS[kind], dtype="float16", layout="channels_last")
    # Columns of one image at a time, and as many chunks as there are steps.
    cases["each channel its own, many chunks"] = replace(KINDS["each channel its own"], settings=(("COLUMNS", 9000),))
    cases["one pattern, small chunks"] = replace(KINDS["one pattern"], settings=(("PIXELS", 16),))
    return cases
