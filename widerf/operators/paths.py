"""Where paths meet: what makes a path global, and by how much two that are joined are shifted against each other."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from widerf.operators.boxes import Jump, Terms, alone, greatest, is_constant, smallest, thin


def merges_positions(outputs: Sequence[Terms], inputs: Sequence[Terms], spatial: tuple[int, ...], jump: Jump) -> bool:
    """Whether every output sees all that the inputs saw in the same way, which not all inputs did.

    All that the inputs saw need not be the whole image: a stride may leave the last pixels out. "The same way" is tried
    strictly and with some slack: channels may see differently (part of them went through a further layer), and so may
    neighbours, by one jump (attention among every second position). Where no input saw all, it is enough that every
    output does.

    Args:
        outputs: what each output sees, as terms of a union (:func:`widerf.operators.boxes.apart`).
        inputs: what each input saw.
        spatial: shape of the image.
        jump: input pixels between neighbours.
    """
    seen = _all_that_is_seen(inputs, spatial)
    if seen is None:
        return False
    whole = [terms for terms in outputs if _all_see(terms, seen)]
    if not whole:
        return False
    if not any(_one_sees(terms, seen) for terms in inputs):
        return True
    channels = 2 if outputs and outputs[0][0].ndim == len(spatial) + 3 and len(spatial) > 1 else None
    for axis in {None, channels}:
        for slack in (0.0, max(jump)):
            same = [is_constant(terms, axis, slack) for terms in inputs]
            if not all(same) and any(is_constant(terms, axis, slack) for terms in whole):
                return True
    return False


def _all_that_is_seen(inputs: Iterable[Terms], spatial: tuple[int, ...]) -> Tensor | None:
    """The box that the inputs see together, within the image; ``None`` if they see nothing."""
    together = smallest(thin(term).reshape(len(term), -1).amin(1) for terms in inputs for term in terms)
    if not bool(together.isfinite().all()):
        return None
    return torch.maximum(together, together.new_tensor([0.0 for _ in spatial] + [1.0 - n for n in spatial]))


def _all_see(terms: Terms, box: Tensor) -> bool:
    """Whether every element sees a whole box."""
    return bool((greatest(terms, range(1, terms[0].ndim)).flatten() <= box).all())


def _one_sees(terms: Terms, box: Tensor) -> bool:
    """Whether some element sees a whole box.

    Elements of the terms of a union are not paired, but what sides of the box they reach: there are few such patterns.
    """
    found: dict[int, Tensor] = {0: torch.ones((), dtype=torch.bool)}
    for own, term in alone(terms, range(1, terms[0].ndim)):
        sides = functools.reduce(torch.add, ((term[s] <= box[s]) * 2**s for s in range(len(box)))).unsqueeze(0)
        reached = {int(key): (sides == key).any(own, keepdim=True) if own else sides == key for key in sides.unique()}
        joined: dict[int, Tensor] = {}
        for (one, here), (other, there) in itertools.product(found.items(), reached.items()):
            key = one | other
            joined[key] = joined[key] | (here & there) if key in joined else here & there
        found = joined
    every = 2 ** len(box) - 1
    return every in found and bool(found[every].any())


def misalignment(reaches: Sequence[Tensor]) -> tuple[float, ...] | None:
    """Offset between the centres of two tensors that are joined, where it is the same everywhere and not zero.

    Sizes that neither agree nor can be broadcast are those of the axis along which the tensors are put one behind the
    other: the caller (``Rule.joins``) vouches that boxes are equal along it.
    """
    axes = max(reach.ndim for reach in reaches) - 1
    ones = [[1] * (axes + 1 - reach.ndim) for reach in reaches]
    every = [
        thin(reach.reshape(len(reach), *lacking, *reach.shape[1:]))
        for reach, lacking in zip(reaches, ones, strict=True)
    ]
    for dim in range(1, axes + 1):
        if len({reach.shape[dim] for reach in every} - {1}) > 1:
            every = [reach.narrow(dim, 0, 1) for reach in every]
    rank = len(every[0]) // 2
    first, *others = ((reach[:rank] - reach[rank:]) / 2 for reach in every)
    for other in others:
        shift = (other - first).flatten(1) if axes else (other - first)[:, None]
        shift = shift[:, shift.isfinite().all(0)]
        if shift.numel() and bool((shift - shift[:, :1]).abs().max() < 1e-3) and bool(shift.abs().max() > 1e-2):
            return tuple(round(float(s), 4) for s in shift[:, 0])
    return None
