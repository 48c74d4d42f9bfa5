"""Operators that copy: each output element reads one input element, or a constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from widerf.operators.boxes import EMPTY, Jump, extend, is_constant_along, per_axis, reshaped, smallest, stacked, thin
from widerf.operators.flow import Energies, carried
from widerf.operators.rule import Arguments, Inputs, Parts, Rule, Shape, joined, named, once
from widerf.trace.tape import Call, linearised

Outcome = list[Tensor | None]
Move = Callable[[Call, Arguments, Inputs, list[Any]], tuple[Any, ...]]


def energy(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    """Entries of J are 0 and 1, their own squares."""
    yield from once(arguments, "derivative", lambda: linearised(call, inputs))(energies).items()


# ── boxes: the operator itself moves them, one component of the box at a time ───────────────────────────


def by(move: Move) -> Callable[[Call, Arguments, Inputs, list[Any], Jump], Outcome]:
    """The rule for boxes out of what happens to one of their components."""

    def boxes(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> Outcome:
        parts: list[Outcome] = []
        for component in range(next(iter(reaches.values())).shape[0]):
            leaves = {i: reach[component] for i, reach in reaches.items()}
            moved = move(call, arguments, leaves, shapes)
            parts.append([out if isinstance(out, Tensor) else None for out in moved])
        found: Outcome = []
        for outs in zip(*parts, strict=True):
            whole = [o for o in outs if o is not None]
            found.append(stacked(whole) if len(whole) == len(outs) and whole[0].is_floating_point() else None)
        return found

    return boxes


def _itself(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    return call.run(leaves)


def _filled(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    """Constants that are joined to boxes (a class token, zeros to be filled) see nothing."""
    if call.data:  # what is written may go anywhere
        nothing = torch.full((), EMPTY)
        written = [reach.amin() for position, reach in leaves.items() if position > 0 and reach.numel()]
        return (smallest([leaves.get(0, nothing).expand(shapes[0]), *written]),)
    constants = {
        i: torch.full_like(leaf, EMPTY, dtype=torch.float32)
        for i, leaf in enumerate(call.leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and i not in leaves
    }
    return call.run({**leaves, **constants})


def _viewed(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    """A view of the recorded tensor need not be one of the boxes, which are laid out differently."""
    return (reshaped(next(iter(leaves.values())), shapes[0]),)


def _kept(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    return (next(iter(leaves.values())),)


def _rolled(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    """Axes along which all see the same are not copied."""
    ((position, reach),) = leaves.items()
    turned = [dim % reach.ndim for dim in arguments["dims"]] or range(reach.ndim)
    rolled = call.run({position: thin(reach[None], but=[1 + dim for dim in turned])[0]})
    return tuple(out.expand(shapes[0]) for out in rolled)


def _strided(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    """The boxes are laid as the recorded tensor lies in its storage, of which all else sees nothing."""
    tensor, offset = arguments["self"], arguments["storage_offset"]
    (reach,) = leaves.values()
    storage = reach.new_full((tensor.untyped_storage().nbytes() // tensor.element_size(),), EMPTY)
    storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(reach)
    start = tensor.storage_offset() if offset is None else offset
    return (storage.as_strided(arguments["size"], arguments["stride"], start),)


def _any_of(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    """Any element along the axis may come out."""
    (reach,) = leaves.values()
    return (reach.amin(arguments["dim"], keepdim=True).expand(shapes[0]),)


def _indexed(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    """Where the index depends on the image, any element along the indexed axes may come out."""
    if not call.data:
        return call.run(leaves)
    ((position, reach),) = leaves.items()
    dims = _indexed_dims(arguments, reach.ndim)
    return call.run({position: reach.amin(dims, keepdim=True).expand_as(reach)})


def _indexed_dims(arguments: Arguments, ndim: int) -> tuple[int, ...]:
    if "dim" in arguments:
        return (arguments["dim"] % ndim,)
    dims: list[int] = []
    at = 0
    for index in arguments.get("indices", [None] * ndim):
        wide = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        dims += range(at, at + wide) if index is not None else []
        at += wide
    return tuple(dims) or tuple(range(ndim))  # ``take`` runs over all of them


def _put(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    """Elements that are overwritten see what is written, those that are added to both."""
    if not arguments["accumulate"] or call.data:
        return _filled(call, arguments, leaves, shapes)
    nothing = torch.full((), EMPTY)
    own, written = leaves.get(0, nothing), leaves.get(1 + len(arguments["indices"]), nothing)
    index = tuple(slice(None) if i is None else i for i in arguments["indices"])
    target = torch.arange(math.prod(shapes[0])).view(shapes[0])[index]
    flat = own.expand(shapes[0]).flatten()
    return (flat.scatter_reduce(0, target.flatten(), written.expand(target.shape).flatten(), "amin").view(shapes[0]),)


def _padded(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> Outcome:
    """Boxes go on beyond the border: a receptive field is a property of the network, not of the border."""
    (reach,) = reaches.values()
    pad = list(arguments["pad"] if "pad" in arguments else arguments["padding"])
    for back in range(len(pad) // 2):
        reach = extend(reach, reach.ndim - 1 - back, pad[2 * back], pad[2 * back + 1], jump)
    return [reach]


def _mirrored(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> Outcome:
    """Boxes go on, and the pixels that are copied there are seen as well."""
    (copied,), (beyond,) = (rule(call, arguments, reaches, shapes, jump) for rule in (by(_itself), _padded))
    assert copied is not None and beyond is not None
    return [torch.minimum(copied, beyond)]


def _unfolded(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> Outcome:
    """Patches side by side as columns; boxes go on beyond the border."""
    (reach,) = reaches.values()
    for axis, padding in enumerate(per_axis(arguments["padding"], 2)):
        reach = extend(reach, reach.ndim - 2 + axis, padding, padding, jump)
    window, dilation, stride = (arguments[name] for name in ("kernel_size", "dilation", "stride"))
    columns = [torch.nn.functional.unfold(part, window, dilation, 0, stride) for part in reach]
    return [torch.stack(columns)]


def _along_channels(call: Call, arguments: Arguments, reaches: list[Tensor]) -> bool:
    """Whether parts are joined along an axis on which positions do not move: channels, not parts of one map."""
    stacked = call.name == "stack"
    dim = arguments["dim"] % (reaches[0].ndim - 1 + stacked) + 1
    return dim <= 2 if stacked else all(is_constant_along(reach, dim) for reach in reaches)


# ── jump ────────────────────────────────────────────────────────────────────────────────────────────────


def _resized(call: Call, arguments: Arguments, before: Shape, after: Shape) -> Jump:
    return tuple(n / m for n, m in zip(before[2:], after[2:], strict=True))


def _bordered(call: Call, arguments: Arguments, before: Shape, after: Shape) -> Jump:
    return tuple(1.0 for _ in before[2:])


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────


def _moves(move: Move, distributes: bool = False) -> Rule:
    return Rule("moves", by(move), energy, carried, distributes=distributes)


NAMES = joined(
    [
        named(
            _moves(_itself, True),
            "permute transpose t unsqueeze squeeze expand slice select split split_with_sizes unsafe_split "
            "unsafe_split_with_sizes unbind flip repeat pixel_shuffle "
            "pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal movedim unflatten tril triu rot90 "
            "repeat_interleave narrow chunk",
        ),
        named(Rule("moves", by(_filled), energy, carried, joins=_along_channels), "cat stack"),
        named(_moves(_indexed), "take index index_select gather"),
        named(_moves(_filled), "copy slice_scatter select_scatter scatter.src scatter.value index_copy index_fill"),
        named(_moves(_put), "index_put"),
        named(_moves(_rolled, True), "roll"),
        named(_moves(_viewed, True), "view _unsafe_view reshape _reshape_alias"),
        named(_moves(_kept, True), "clone alias detach _to_copy contiguous lift_fresh"),
        named(_moves(_strided), "as_strided"),
        named(Rule("moves", _padded, energy, carried, _bordered), "constant_pad_nd"),
        named(_moves(_any_of), "topk sort"),
        named(
            Rule("moves", _mirrored, energy, carried, _bordered),
            "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
        ),
        named(Rule("moves", _unfolded, energy, carried), "im2col"),
        named(
            Rule("moves", by(_itself), energy, carried, _resized),
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
            "_upsample_nearest_exact2d _upsample_nearest_exact3d",
        ),
    ]
)
