r"""Fixed averages in a row, as the one linear map that they are.

Each operator's rule squares its own Jacobian: random weights between two operators make the gradient's elements
uncorrelated. Between two averages that no weights of the model part (a blur behind an upsampling, two pools) the
elements come together again with their signs, and :math:`(J_2 J_1)^2`, entry by entry, is not :math:`J_2^2 J_1^2`: of
two means of three pixels the variances 2/3 do not add up to 4/3, their product (1, 2, 3, 2, 1)/9 squared has 16/19.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widerf.operators import rule_of
from widerf.operators.flow import Flow
from widerf.trace.tape import Call, Tape

_TOLERANCE = 1e-4  # of the largest output, between the operators and the product of their axes' matrices


class Row(NamedTuple):
    """Linear operators one after the other, each of one tensor that nothing else reads, two averages among them."""

    calls: tuple[Call, ...]

    @property
    def source(self) -> int:
        """Identity of the value that enters."""
        return next(iter(self.calls[0].inputs.values()))

    @property
    def outcome(self) -> int:
        """Identity of the value that comes out."""
        return _outcome(self.calls[-1])

    def run(self, x: Tensor) -> Tensor:
        """All operators, on another tensor of the same shape."""
        for call in self.calls:
            (x,) = call.run({next(iter(call.inputs)): x})[:1]
        return x


def rows(calls: Sequence[Call], tape: Tape) -> Iterator[Row]:
    """The longest rows among the calls of a pass that map a map of some channels to another of as many."""
    readers = Counter(value for call in calls for value in call.inputs.values())
    readers[tape.target] += 1
    maker = {out: call for call in calls for out in call.outputs if out is not None}
    taken: set[int] = set()
    for last in reversed(calls):
        found: list[Call] = []
        call: Call | None = last
        while call is not None and id(call) not in taken and _is_linear(call):
            found.insert(0, call)
            (value,) = call.inputs.values()
            call = maker.get(value) if readers[value] == 1 else None
        taken.update(map(id, found))
        row = _between_maps(found, tape)
        if row is not None:
            yield row


def _outcome(call: Call) -> int:
    return next(out for out in call.outputs if out is not None)


def _is_linear(call: Call) -> bool:
    rule = rule_of(call.op)
    one = len(call.inputs) == 1 and sum(out is not None for out in call.outputs) == 1
    return (
        one and not call.data and not call.detached and ((rule is not None and rule.kind == "moves") or _averages(call))
    )


def _averages(call: Call) -> bool:
    """Whether each output is a weighted sum of inputs of its channel, by weights that are none of the model's."""
    if call.name == "convolution":
        x, weight = call.leaves[:2]
        alone = x is None and isinstance(weight, Tensor) and weight.shape[:2] == (call.leaves[-1], 1)
        return alone and len(weight) > 1 and not isinstance(weight, nn.Parameter) and bool((weight == weight[:1]).all())
    return call.name.startswith(("avg_pool", "upsample", "_upsample"))


def _between_maps(calls: list[Call], tape: Tape) -> Row | None:
    """The longest part that begins and ends with (batch, channels, *spatial), if two averages lie in it."""
    if sum(map(_averages, calls)) < 2:
        return None
    for end in range(len(calls), 0, -1):
        went = tape.values[_outcome(calls[end - 1])].shape
        for start in range(end):
            came = tape.values[next(iter(calls[start].inputs.values()))].shape
            if sum(map(_averages, calls[start:end])) >= 2 and len(came) == len(went) > 2 and came[:2] == went[:2]:
                return Row(tuple(calls[start:end]))
    return None


def matrices(row: Row, image: Tensor) -> list[Tensor] | None:
    """Per spatial axis a matrix (out, in) whose product is the row; ``None`` if it is not of that kind.

    Indicator images of each index along one axis, one a channel, go through the operators.

    Args:
        row: what is looked at.
        image: what entered it, (1, channels, *spatial).
    """
    with torch.no_grad():
        offset = row.run(torch.zeros_like(image))
        flat = (row.run(torch.ones_like(image)) - offset)[0, 0]
        best = torch.unravel_index(flat.abs().argmax(), flat.shape)
        if float(flat[best]) == 0:
            return None
        found = [_matrix(row, image, offset, axis, list(best)) for axis in range(flat.ndim)]
        # Each probe bears the other axes' sums at one place; together they bear rank − 1 of these too many.
        found = [found[0], *(matrix / flat[best] for matrix in found[1:])]
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=image.dtype)
        x = torch.empty_like(image).copy_(noise)
        wanted = row.run(x) - offset
        return found if bool((_through(x, found) - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()) else None


def _matrix(row: Row, image: Tensor, offset: Tensor, axis: int, place: list[Any]) -> Tensor:
    channels, n = image.shape[1], image.shape[2 + axis]
    columns = []
    for first in range(0, n, channels):
        probes = torch.zeros_like(image)  # laid out as the image was: ``as_strided`` reads by the layout
        which = torch.arange(min(channels, n - first), device=image.device)
        probes.movedim(2 + axis, 2)[0, which, first + which] = 1
        seen: list[Any] = [0, slice(None, len(which)), *place]
        seen[2 + axis] = slice(None)
        columns.append((row.run(probes) - offset)[tuple(seen)])
    return torch.cat(columns).T


def _through(x: Tensor, axes: Sequence[Tensor]) -> Tensor:
    for axis, matrix in enumerate(axes):
        x = torch.tensordot(x, matrix, ([2 + axis], [1])).movedim(-1, 2 + axis)
    return x


def carried_back(flow: Flow, axes: Sequence[Tensor]) -> Flow:
    """The flow before a row of averages: the energy by the squares of its matrices, what is common as it is."""
    common = None if flow.common is None else _through(flow.common, [matrix.T for matrix in axes])
    return Flow(_through(flow.energy, [matrix.square().T for matrix in axes]), common)
