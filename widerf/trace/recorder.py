"""One recording of one forward pass.

The recording is taken below autograd, at the level of aten operators, so it holds for any control flow and any Python
code; in-place writes, also through views, are rewritten as operators that return a new tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from widerf._checks import require
from widerf.errors import UntreatedOperatorError
from widerf.trace.site import MapSite, tensors_in
from widerf.trace.tape import Call, Tape, operator_name

# Operators that read the shape of a tensor and not what it holds.
_SHAPE_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
}


def record(model: nn.Module, images: Tensor, site: MapSite, also: Sequence[MapSite] = ()) -> Tape:
    """Run ``model`` on ``images`` up to ``site`` and record the operators.

    The caller keeps the model safe (:func:`widerf.trace.sandbox.untouched`): batch statistics move as in any forward
    pass. Attention is unfolded into its matrix products. A random mask (dropout, stochastic depth) is replaced by the
    constant whose square is the mean square of the mask, √keep: second moments, forwards and backwards, are then those
    of the mask.

    Args:
        model: any module that takes one tensor.
        images: ``(batch, channels, *spatial)``.
        site: where the map is (:func:`widerf.trace.site.spatial_layer`).
        also: maps of other modules on the way there, which are marked.

    Raises:
        ValueError: if the map does not depend on the input.
    """
    recorder = _Recorder(images, {id(module): name for name, module in model.named_modules()})
    wanted = {id(mark.module): mark for mark in (*also, site)}
    calls: dict[int, int] = {}

    def enter(module: nn.Module, inputs: Any) -> None:
        recorder.path.append(recorder.names.get(id(module), recorder.path[-1]))
        came = _first_shape(inputs)
        if came is not None:
            recorder.tape.shapes.setdefault(recorder.path[-1], (came, None))

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        name = recorder.path.pop()
        came, went = recorder.tape.shapes.get(name, ((), ()))
        if went is None and module is not site.module:
            recorder.tape.shapes[name] = (came, _first_shape(output))
        mark = wanted.get(id(module))
        if mark is None:
            return
        call = calls[id(module)] = calls.get(id(module), -1) + 1
        if call == mark.call and mark is site:
            raise _ReachedError(site.lay(output))
        if call == mark.call and (value := recorder.value_of(mark.lay(output))) is not None:
            recorder.tape.marks[mark.name] = value

    reached = None
    with torch.no_grad(), _plain_operators(), _hooks(enter, leave), recorder:
        try:
            model(images)
        except _ReachedError as stop:
            reached = stop.output
    require(reached is not None, "layer", "be called in the model's forward pass", site.name)
    target = recorder.value_of(reached) if reached is not None else None
    if target is None:
        raise ValueError(f"layer must depend on the input, got {site.name!r}")
    recorder.tape.target = recorder.tape.marks[site.name] = target
    return recorder.tape


class _ReachedError(Exception):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


@contextmanager
def _hooks(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    # Global hooks: those of the model's own modules stay as they are.
    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Keep attention from running as one closed operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        plain: Any = sdpa_kernel(SDPBackend.MATH)
    except ImportError:  # torch 2.2
        plain = nullcontext()
    try:
        with plain:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class _Write:
    """An in-place write: the value written and where it lies in its storage."""

    value: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes the tape. Tensors are known by ``id``; all of them are kept alive so that it stays unique."""

    def __init__(self, images: Tensor, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.names = names
        self.path = [""]
        self._ids: dict[int, int] = {}
        self._keep: list[Tensor] = []
        self._aliases: dict[int, list[Tensor]] = {}
        self._writes: dict[int, list[_Write]] = {}  # per storage, all in-place writes of tracked values
        self._seen: dict[int, int] = {}  # per tensor, how many of its storage's writes its value includes
        self._bind(images)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        inputs = {i: v for i, leaf in enumerate(leaves) if (v := self.value_of(leaf)) is not None}
        written = _written(func, args, kwargs or {}) if func._schema.is_mutable else []
        if not inputs or operator_name(func) in _SHAPE_ONLY:
            if func._schema.name == "aten::bernoulli_":
                share = args[1] if len(args) > 1 else 0.5  # the dispatcher leaves out what equals the default
                if not isinstance(share, Tensor):
                    return args[0].fill_(math.sqrt(float(share)))
            return func(*args, **(kwargs or {}))
        # BN writes its running statistics, which do not depend on the input as far as derivatives go.
        state = [t for t in written if self.value_of(t) is None and not func._schema.name.endswith("_")]
        written = [t for t in written if not any(t is s for s in state)]
        for tensor in written:
            self._snapshot(tensor)
        frozen = tuple(None if i in inputs else _frozen(leaf, written) for i, leaf in enumerate(leaves))
        result = func(*args, **(kwargs or {}))
        op = _functional(func) if written else func
        outputs = tuple(self._bind(t) for t in pytree.tree_flatten(result)[0])
        self.tape.calls.append(Call(op, frozen, spec, inputs, outputs, self.path[-1]))
        for tensor in written:
            self._note_write(tensor)
        return result

    def value_of(self, tensor: Any) -> int | None:
        """Identity of the value that a tensor holds now, ``None`` if it does not depend on the input."""
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            return None
        known = self._ids.get(id(tensor))
        writes = self._writes.get(_storage(tensor), ())
        seen = self._seen.get(id(tensor), 0)
        for write in writes[seen:]:
            known = self._refresh(tensor, known, write)
        if writes:
            self._seen[id(tensor)] = len(writes)
        return known

    def _bind(self, tensor: Any) -> int | None:
        """Give a tensor a new value."""
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            return None
        self.tape.values.append(tensor)
        self._keep.append(tensor)
        self._ids[id(tensor)] = len(self.tape.values) - 1
        storage = _storage(tensor)
        self._aliases.setdefault(storage, []).append(tensor)
        self._seen[id(tensor)] = len(self._writes.get(storage, ()))
        return self._ids[id(tensor)]

    def _snapshot(self, tensor: Tensor) -> None:
        """Before a write: copy what the storage's other values hold."""
        for alias in self._aliases.get(_storage(tensor), ()):
            value = self._ids[id(alias)]
            if self.tape.values[value] is alias:
                self.tape.values[value] = alias.clone()

    def _note_write(self, tensor: Tensor) -> None:
        writes = self._writes.setdefault(_storage(tensor), [])
        writes.append(_Write(self._ids[id(tensor)], tensor.shape, tensor.stride(), int(tensor.storage_offset())))
        self._seen[id(tensor)] = len(writes)

    def _refresh(self, tensor: Tensor, known: int | None, write: _Write) -> int | None:
        """After a write through another view: the tensor's value is made of its old one and of what was written."""
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        places = torch.full((length,), -1, dtype=torch.int64, device=tensor.device)
        count = math.prod(write.size)
        lying = torch.arange(count, device=tensor.device).view(write.size)
        places.as_strided(write.size, write.stride, write.offset).copy_(lying)
        source = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        covered = source >= 0
        if not bool(covered.any()):
            return known
        taken = self._emit(
            torch.ops.aten.take.default, [self.tape.values[write.value], source.clamp(min=0)], {0: write.value}
        )
        old = {} if known is None else {2: known}
        constant = tensor.clone()
        value = self._emit(torch.ops.aten.where.self, [covered, self.tape.values[taken], constant], {1: taken, **old})
        self.tape.values[value] = tensor
        self._ids[id(tensor)] = value
        if known is None:
            self._keep.append(tensor)
            self._aliases.setdefault(_storage(tensor), []).append(tensor)
        return value

    def _emit(self, op: Any, leaves: list[Any], inputs: dict[int, int]) -> int:
        _, spec = pytree.tree_flatten((tuple(leaves), {}))
        result = op(*leaves)
        self.tape.values.append(result)
        value = len(self.tape.values) - 1
        frozen = tuple(None if i in inputs else leaf for i, leaf in enumerate(leaves))
        self.tape.calls.append(Call(op, frozen, spec, inputs, (value,), self.path[-1]))
        return value


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += [t for t in pytree.tree_flatten(value)[0] if isinstance(t, Tensor)]
    return written


def _functional(func: Any) -> Any:
    """The operator that returns what an in-place one writes: ``aten.relu_`` → ``aten.relu``."""
    name = operator_name(func)
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    if packet is None or func._overloadname not in packet.overloads():
        raise UntreatedOperatorError(f"the recording has no form of operator {func} that leaves its input alone")
    return getattr(packet, func._overloadname)


def _first_shape(tensors: Any) -> tuple[int, ...] | None:
    return next((tuple(tensor.shape) for tensor in tensors_in(tensors)), None)


def _frozen(leaf: Any, written: list[Tensor]) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and any(leaf is t for t in written) else leaf


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
