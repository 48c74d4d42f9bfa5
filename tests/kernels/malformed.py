"""Calls of the raw operators, lawful ones spoilt in up to three places, and what they would have to answer.

``python -m tests.kernels.malformed LIBRARY COUNT SEED`` makes COUNT of them through one library of kernels: so the
sanitizers see them, who have to be in the process from its start.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

ERRORS = (ValueError, TypeError, RuntimeError, MemoryError)
NUMBERS = (0, -1, -3, 1, 2, 7, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**70, 1.0, 0.5, None, "3", True, [], [1])
TEXTS = ("", "[]", "{}", "null", "[[], 1, [1], [0], [0], 1]", "[1, 2", "NaN", "[" * 5000, "\x00", "1e999", "α")
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8)
OPERATORS = {"forward": "sparse_conv", "grad_input": "sparse_conv_grad_input", "grad_weight": "sparse_conv_grad_weight"}


class Call(NamedTuple):
    """One call of an operator."""

    name: str
    first: Tensor
    second: Tensor
    plan: Any
    shape: list[Any]
    spoilt: tuple[str, ...]

    def run(self) -> Tensor:
        operator = getattr(torch.ops.widerf, OPERATORS[self.name])
        result: Tensor = operator(self.first, self.second, self.plan, self.shape)
        return result


def lawful(draw: random.Random) -> Call:
    """Draw a call that must be answered."""
    rank = draw.choice([1, 2, 2, 2, 3])
    groups = draw.choice([1, 1, 2, 3, 5])
    depthwise = draw.random() < 0.3
    per_in, per_out = (1, 1) if depthwise else (draw.choice([1, 2, 3, 7]), draw.choice([1, 2, 6, 17]))
    last = draw.random() < 0.4  # channels_last, where long runs of channels that share their taps have kernels
    if last:
        rank = 2
        groups, per_in = (draw.choice([32, 40, 75]), 1) if depthwise else (1, draw.choice([16, 35, 48]))
    channels = groups * per_in
    period = channels if last else draw.choice([d for d in range(1, channels + 1) if channels % d == 0])
    taps, stride = draw.choice([1, 2, 4, 9]), [draw.choice([1, 1, 2, 3, 40]) for _ in range(rank)]
    reach = draw.choice([0, 2, 9])
    cuts = sorted({0, period, *(draw.randint(0, period) for _ in range(draw.choice([0, 0, 1]) if last else 2))})
    runs = [
        [a, b, [[draw.randint(-reach, reach) for _ in range(rank)] for _ in range(taps)]]
        for a, b in itertools.pairwise(cuts)
    ]
    image, size = ([draw.choice([1, 2, 5, 17 if rank < 3 else 3]) for _ in range(rank)] for _ in range(2))
    border = [reach + s * m + n for s, m, n in zip(stride, size, image, strict=True)]
    parts = [runs, channels // period, stride, border, border, groups]
    batch = draw.choice([0, 1, 1, 2, 3])
    x, w, y = (batch, channels, *image), (groups * per_out, per_in, *(1,) * (rank - 1), taps), ()
    y = (batch, groups * per_out, *size)
    first, second, shape = {"forward": (x, w, size), "grad_input": (y, w, [*x]), "grad_weight": (x, y, [*w])}[
        name := draw.choice(list(OPERATORS))
    ]
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    tensors = [torch.randn(*s, generator=generator) for s in (first, second)]
    if last:
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    dtype = draw.choice([torch.float32] * 6 + list(DTYPES[:3]))
    return Call(name, tensors[0].to(dtype), tensors[1].to(dtype), json.dumps(parts), list(shape), ())


def _shape(call: Call, draw: random.Random) -> Call:
    which = draw.choice(["first", "second"])
    t: Tensor = getattr(call, which)
    sizes = list(t.shape)
    kind = draw.choice(["more", "other", "fewer", "axis", "swap"])
    if kind == "axis" or not sizes:
        sizes.insert(draw.randint(0, len(sizes)), draw.choice([1, 2]))
    elif kind == "fewer":
        sizes.pop(draw.randrange(len(sizes)))
    elif kind == "swap":
        draw.shuffle(sizes)
    else:
        i = draw.randrange(len(sizes))
        sizes[i] = sizes[i] + draw.choice([-1, 1, 8]) if kind == "more" else draw.choice([0, 1, 3, 40])
    return call._replace(**{which: torch.ones([max(0, n) for n in sizes]).to(t.dtype)})


def _dtype(call: Call, draw: random.Random) -> Call:
    dtype = draw.choice(DTYPES)
    both = draw.random() < 0.5
    first, second = (t.real if t.is_complex() else t for t in (call.first, call.second))
    return call._replace(first=first.to(dtype) if both else call.first, second=second.to(dtype))


def _plan(call: Call, draw: random.Random) -> Call:
    """Put something else in one place of the plan."""
    if draw.random() < 0.15 or not isinstance(call.plan, str):
        return call._replace(plan=draw.choice(TEXTS))
    try:
        parts = json.loads(call.plan)
    except (ValueError, RecursionError):
        return call
    where, index = parts, draw.randrange(6) if isinstance(parts, list) and len(parts) == 6 else None
    if index is None:
        return call
    while isinstance(where[index], list) and where[index] and draw.random() < 0.85:
        where = where[index]
        index = draw.randrange(len(where))
    if draw.random() < 0.2:
        del where[index]
    elif isinstance(where[index], int) and draw.random() < 0.5:
        where[index] += draw.choice([-1, 1, 1000, -1000])
    else:
        where[index] = draw.choice(NUMBERS)
    return call._replace(plan=json.dumps(parts))


def _groups(call: Call, draw: random.Random) -> Call:
    try:
        parts = json.loads(call.plan)
        parts[5] = draw.choice([0, -3, 1, 2, 3, 4, 2**64 + 1])
    except (ValueError, RecursionError, LookupError, TypeError):
        return call
    return call._replace(plan=json.dumps(parts))


def _size(call: Call, draw: random.Random) -> Call:
    shape = list(call.shape)
    if shape and draw.random() < 0.7:
        i = draw.randrange(len(shape))
        shape[i] = draw.choice([0, -1, 1, 3, 40, 2**14, 2**31, 2**40, shape[i] + 1])
    elif draw.random() < 0.5:
        shape = shape[1:]
    else:
        shape = [*shape, 1]
    return call._replace(shape=shape)


def _views(t: Tensor) -> list[Callable[[], Tensor]]:
    flat = t.reshape(-1)
    return [
        lambda: t.expand(2, *t.shape)[1],
        lambda: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
        lambda: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
        lambda: torch.cat([flat, flat]).view(2, *t.shape)[1],
        lambda: flat[:1].expand(t.numel()).view(t.shape) if t.numel() else t,
        lambda: torch.as_strided(flat, t.shape, (0,) * t.dim()) if t.numel() else t,
        lambda: torch._neg_view(t) if t.is_floating_point() else t,
        lambda: torch.cat([t, t], -1)[..., ::2] if t.dim() else t,
    ]


def _strides(call: Call, draw: random.Random) -> Call:
    which = draw.choice(["first", "second"])
    return call._replace(**{which: draw.choice(_views(getattr(call, which)))()})


def _storage(call: Call, draw: random.Random) -> Call:
    which = draw.choice(["first", "second"])
    t: Tensor = getattr(call, which).clone()
    kind = draw.choice(["freed", "shrunk", "meta", "sparse", "fine"])
    if kind == "freed":
        t.untyped_storage().resize_(0)
    elif kind == "shrunk":
        t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    elif kind == "meta":
        t = t.to("meta")
    elif kind == "sparse":
        t = t.to_sparse()
    return call._replace(**{which: t})


SPOILERS: dict[str, Callable[[Call, random.Random], Call]] = {
    "shapes": _shape, "dtypes": _dtype, "plans": _plan, "groups": _groups, "sizes": _size, "strides": _strides,
    "storages": _storage,
}  # fmt: skip


def malformed(seed: int) -> Call:
    """Draw a call and spoil it in none to three places; a tensor whose memory is gone is spoilt no more."""
    draw = random.Random(seed)
    call = lawful(draw)
    chosen = [draw.choice(list(SPOILERS)) for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))]
    for kind in sorted(chosen, key=lambda kind: kind == "storages"):
        if kind == "storages" and "storages" in call.spoilt:
            continue
        call = SPOILERS[kind](call, draw)._replace(spoilt=(*call.spoilt, kind))
    return call


def _all_shifts(call: Call) -> tuple[list[Any], list[int], int]:
    runs, repeats, stride, before, after, groups = json.loads(call.plan)
    numbers = [*itertools.chain(*(s for run in runs for s in run[2])), *stride, *before, *after, repeats, groups]
    assert all(type(n) is int for n in numbers)
    assert min(*stride, repeats, groups) >= 1
    assert repeats <= 1000
    return [run[2] for run in runs for _ in range(run[0], run[1])] * repeats, stride, groups


def answer(call: Call) -> Tensor | None:
    """Return what the call has to answer, by a loop over taps in float64; None if it has no meaning."""
    try:
        return _answer(call)
    except (AssertionError, ValueError, TypeError, LookupError, RuntimeError, RecursionError):
        return None


def _answer(call: Call) -> Tensor:
    shifts, stride, groups = _all_shifts(call)
    shape = [int(n) for n in call.shape]
    assert min(shape, default=0) >= 0
    assert math.prod(shape) <= 2**26
    a, b = call.first.double(), call.second.double()
    x = torch.zeros(shape).double() if call.name == "grad_input" else a
    w = torch.zeros(shape).double() if call.name == "grad_weight" else b
    y = {"forward": lambda: torch.zeros(x.shape[0], w.shape[0], *shape).double()}.get(
        call.name, lambda: a if call.name == "grad_input" else b
    )()
    assert len({x.dim(), w.dim(), y.dim(), len(stride) + 2}) == 1
    assert x.shape[0] == y.shape[0]
    assert y.shape[1] == w.shape[0]
    assert x.shape[1] == len(shifts) == w.shape[1] * groups
    assert w.shape[0] % groups == 0
    result = {"forward": y, "grad_input": x, "grad_weight": w}[call.name]
    flat = w.flatten(2) if w.numel() else w.reshape(*w.shape[:2], len(shifts[0]))
    assert all(len(taps) == flat.shape[2] for taps in shifts)
    outs = w.shape[0] // groups
    for c, taps in enumerate(shifts):
        group = slice(c // w.shape[1] * outs, (c // w.shape[1] + 1) * outs)
        for t, shift in enumerate(taps):
            read, to = _overlap(shift, stride, x.shape[2:], y.shape[2:])
            image, out, factor = (
                x[(slice(None), c, *read)],
                y[(slice(None), group, *to)],
                flat[group, c % w.shape[1], t],
            )
            if call.name == "forward":
                out += image.unsqueeze(1) * factor.view(-1, *(1,) * len(stride))
            elif call.name == "grad_input":
                image += torch.tensordot(factor, out, ([0], [1]))
            else:
                factor += (image.unsqueeze(1) * out).sum((0, *range(2, out.dim())))
    return result


def _overlap(shift: Any, stride: Any, image: Any, size: Any) -> tuple[list[slice], list[slice]]:
    read, to = [], []
    assert len(shift) == len(stride)
    for d, s, n, m in zip(shift, stride, image, size, strict=True):
        units = [u for u in range(m) if 0 <= s * u + d < n]
        first, count = (units[0], len(units)) if units else (0, 0)
        read.append(slice(s * first + d, s * (first + count - 1) + d + 1, s) if count else slice(0, 0))
        to.append(slice(first, first + count))
    return read, to


def verdict(call: Call) -> str:
    """Make the call.

    Returns:
        "right" or "refused".

    Raises:
        AssertionError: if it answers what it should not.
    """
    try:
        found = call.run()
    except ERRORS as error:
        assert call.spoilt, f"a lawful call was refused: {error}"
        assert str(error)
        return "refused"
    if found.is_meta:
        return "right"
    wanted = answer(call)
    assert wanted is not None, f"a call that has no meaning was answered: {call}"
    assert found.shape == wanted.shape
    error = {torch.float32: 1e-4, torch.float64: 1e-10}.get(found.dtype, 3e-2)
    assert bool((found.double() - wanted).abs().max() <= error * (1 + wanted.abs().max())) if found.numel() else True
    return "right"


def survey(seeds: range) -> dict[str, int]:
    """Make the calls, uninitialised memory filled with NaN; return how many of each verdict, all right or refused."""
    counts = {"right": 0, "refused": 0}
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for seed in seeds:
            try:
                counts[verdict(malformed(seed))] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {malformed(seed).spoilt}") from error
    finally:
        torch.use_deterministic_algorithms(before)
    return counts


def main() -> None:
    import widerf.sparse.layer  # noqa: F401  (registers the operators)
    from widerf import kernels
    from widerf.kernels import cpu

    library = cpu.load(sys.argv[1])
    cpu.library = lambda: library
    kernels.path.cache_clear()
    start = int(sys.argv[3])
    print(json.dumps(survey(range(start, start + int(sys.argv[2])))))


if __name__ == "__main__":
    main()
