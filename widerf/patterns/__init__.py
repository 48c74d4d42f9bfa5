"""Tap patterns: where the connections of a sparse kernel lie, one set of taps per group of input channels.

A pattern is an int64 tensor ``(groups, taps, D)``. Element ``[g, t]`` is the offset, in taps, from the kernel's
centre at which the input channels of group g are read by the t-th weight of the kernel (taps in C order, as in
``weight.flatten(2)``). The centre is tap ``(k − 1)//2`` on each axis, so that the dense kernel has the offsets
``0 … k − 1`` less that number, whether k is odd or even.

The taps lie in a window of ``extent`` cells per axis, centred on the kernel (`window`). Within a group the taps are
ordered so that each lies as near as can be to the dense tap whose weight it takes (`match_dense`): this is how the
weights of a plain convolution carry over.
"""

from widerf.patterns.covering import Coverage, coverage
from widerf.patterns.defaults import default_pattern
from widerf.patterns.designed import multiscale, rings, stratified
from widerf.patterns.drawn import centered, dense, gaussian, grid, halfgrid, mixed, partition, random
from widerf.patterns.fovea import foveal
from widerf.patterns.named import HALVES, NAMED, Mixture, check_named, describe, draw, kinds, natural_groups
from widerf.patterns.taps import dense_taps, match_dense, window

__all__ = [
    "HALVES",
    "NAMED",
    "Coverage",
    "Mixture",
    "centered",
    "check_named",
    "coverage",
    "default_pattern",
    "dense",
    "dense_taps",
    "describe",
    "draw",
    "foveal",
    "gaussian",
    "grid",
    "halfgrid",
    "kinds",
    "match_dense",
    "mixed",
    "multiscale",
    "natural_groups",
    "partition",
    "random",
    "rings",
    "stratified",
    "window",
]
