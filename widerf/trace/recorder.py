"""One recording of one forward pass.

The recording is taken below autograd, at the level of aten operators, so it holds for any control flow and any Python
code; in-place writes, also through views, are rewritten as operators that return a new tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from widerf.trace.ambient import plain_pass
from widerf.trace.certain import certainly, held
from widerf.trace.hooks import names_of, remove
from widerf.trace.layout import tensors_in
from widerf.trace.recurrent import IN_STEPS
from widerf.trace.site import MapSite
from widerf.trace.tape import Call, Tape, operator_name
from widerf.trace.writes import Write, functional_form, out_arguments, source_of, storage_of, written_tensors

# Operators that read the shape of a tensor and not what it holds.
_SHAPE_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
}


def record(
    model: nn.Module, images: Tensor, site: MapSite, also: Sequence[MapSite] = (), *, freeze: bool = True
) -> Tape:
    """Run ``model`` on ``images`` up to ``site`` and record the operators.

    The caller keeps the model safe (:func:`widerf.trace.sandbox.untouched`): batch statistics move as in any forward
    pass. Attention is unfolded into its matrix products. A random mask (dropout, stochastic depth) is replaced by the
    constant whose square is the mean square of the mask, √keep: second moments, forwards and backwards, are then those
    of the mask. The caller's ``inference_mode``, ``no_grad``, autocast and compilation do not reach the model; what it
    computes under a ``no_grad`` of its own is recorded as detached.

    Args:
        model: any module that takes one tensor.
        images: ``(batch, channels, *spatial)``.
        site: where the map is (:func:`widerf.trace.site.spatial_layer`).
        also: maps of other modules on the way there, which are marked.
        freeze: whether weights have no gradients meanwhile; if they have, what is computed from them hangs on them.

    Raises:
        ValueError: if the map does not depend on the input.
    """
    with plain_pass():
        images = images.clone() if images.is_inference() else images
        recorder = _Recorder(images, {id(module): name for module, name in names_of(model).items()})
        weights = _frozen_weights(model) if freeze else nullcontext()
        with held(weights, _paths(recorder, site, also), _own_functions(recorder), recorder):
            reached = site.reach(model, images)
        target = recorder.value_of(reached)
    if target is None:
        raise ValueError(f"layer must depend on the input, got {site.name!r}")
    recorder.tape.target = recorder.tape.marks[site.name] = target
    return recorder.tape


@contextmanager
def _paths(recorder: _Recorder, site: MapSite, also: Sequence[MapSite]) -> Iterator[None]:
    """Tell the recorder which module runs and mark maps; by global hooks: the model's own hooks stay as they are."""
    wanted = {id(mark.module): mark for mark in also if mark.module is not site.module}
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
        if call == mark.call and (value := recorder.value_of(mark.lay(output))) is not None:
            recorder.tape.marks[mark.name] = value

    handles: list[RemovableHandle] = []
    with certainly(lambda: remove(handles)):
        handles.append(module_hooks.register_module_forward_pre_hook(enter))
        handles.append(module_hooks.register_module_forward_hook(leave))
        yield


@contextmanager
def _frozen_weights(model: nn.Module) -> Iterator[None]:
    """Without weights that want gradients autograd records nothing of its own."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with certainly(lambda: [parameter.requires_grad_(True) for parameter in wanting]):
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield


@contextmanager
def _own_functions(recorder: _Recorder) -> Iterator[None]:
    """Custom autograd functions, such as checkpoints, switch gradients off inside, and yet they have a derivative."""
    base = torch.autograd.Function
    original = base.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.modes.append(recorder.differentiates())
        try:
            return original.__get__(None, cls)(*args, **kwargs)
        finally:
            recorder.modes.pop()

    def restore() -> None:
        base.apply = original

    with certainly(restore):
        base.apply = classmethod(apply)
        yield


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes the tape. Tensors are known by ``id``; all of them are kept alive so that it stays unique."""

    def __init__(self, images: Tensor, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.names = names
        self.path = [""]
        self.modes: list[bool] = []  # whether gradients were on where each custom function that now runs was called
        self._ids: dict[int, int] = {}
        self._keep: list[Tensor] = []
        self._aliases: dict[int, list[Tensor]] = {}
        self._writes: dict[int, list[Write]] = {}  # per storage, all in-place writes of tracked values
        self._seen: dict[int, int] = {}  # per tensor, how many of its storage's writes its value includes
        self._data: set[int] = set()  # storages of what depends on the image without a derivative: masks, indices
        self._bind(images)

    def differentiates(self) -> bool:
        """Whether the model means what runs now to be differentiated."""
        return self.modes[-1] if self.modes else torch.is_grad_enabled()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # the model's own: operators come here before they are taken apart
            with held(self):
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        leaves, _ = pytree.tree_flatten((args, kwargs))
        tracked = any(self.value_of(leaf) is not None for leaf in leaves)
        if func._schema.name == "aten::bernoulli_" and not tracked:
            share = args[1] if len(args) > 1 else 0.5  # the dispatcher leaves out what equals the default
            if not isinstance(share, Tensor):
                return args[0].fill_(math.sqrt(float(share)))
        if operator_name(func) in _SHAPE_ONLY:
            return func(*args, **kwargs)
        if tracked and operator_name(func) in IN_STEPS:
            with held(self):
                parts = IN_STEPS[operator_name(func)](*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if tracked:
            return self._note(func, args, kwargs)
        result = func(*args, **kwargs)
        if any(self._is_data(leaf) for leaf in leaves):
            self._mark_data([*pytree.tree_flatten(result)[0], *written_tensors(func, args, kwargs)])
        return result

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on tracked values and write it down."""
        written = written_tensors(func, args, kwargs)
        # BN writes its running statistics, which do not depend on the input as far as derivatives go.
        outs = out_arguments(func)
        given = [kwargs[name] for name in outs if name in kwargs]
        inplace = operator_name(func).endswith("_")
        written = [t for t in written if inplace or self.value_of(t) is not None or any(t is o for o in given)]
        leaves, spec = pytree.tree_flatten((args, {k: v for k, v in kwargs.items() if k not in outs}))
        inputs = {i: v for i, leaf in enumerate(leaves) if (v := self.value_of(leaf)) is not None}
        data = frozenset(i for i, leaf in enumerate(leaves) if i not in inputs and self._is_data(leaf))
        frozen = tuple(None if i in inputs else _frozen(leaf, written) for i, leaf in enumerate(leaves))
        moved = written if torch.Tag.inplace_view in func.tags else []
        for tensor in written:
            self._snapshot(tensor)
        overwritten = {id(t): self._ids.get(id(t)) for t in written if inplace and not moved}
        result = func(*args, **kwargs)
        op = functional_form(func) if written else func
        differentiates = self.differentiates()
        made = pytree.tree_flatten(result)[0]
        outputs = tuple(self._bind(t) for t in made)
        call = Call(op, frozen, spec, inputs, outputs, self.path[-1], data, not differentiates)
        if not differentiates and made and (old := overwritten.get(id(made[0]))) is not None:
            # Autograd does not see the write: what the tensor was is differentiated on.
            call = Call(torch.ops.aten.alias.default, *_one(old), outputs, self.path[-1])
        self.tape.calls.append(call)
        self._mark_data([t for t, value in zip(made, outputs, strict=True) if value is None])
        for tensor in written:
            if not moved:
                self._note_write(tensor)
        return result

    def _is_data(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and storage_of(leaf) in self._data

    def _mark_data(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._keep.append(tensor)
                self._data.add(storage_of(tensor))

    def value_of(self, tensor: Any) -> int | None:
        """Identity of the value that a tensor holds now, ``None`` if it does not depend on the input."""
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            return None
        known = self._ids.get(id(tensor))
        writes = self._writes.get(storage_of(tensor), ())
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
        self.tape.values.append(_ordinary(tensor))
        self._keep.append(tensor)
        self._ids[id(tensor)] = len(self.tape.values) - 1
        storage = storage_of(tensor)
        self._aliases.setdefault(storage, []).append(tensor)
        self._seen[id(tensor)] = len(self._writes.get(storage, ()))
        return self._ids[id(tensor)]

    def _snapshot(self, tensor: Tensor) -> None:
        """Before a write: copy what the storage's other values hold."""
        for alias in self._aliases.get(storage_of(tensor), ()):
            value = self._ids[id(alias)]
            if self.tape.values[value] is alias:
                self.tape.values[value] = alias.clone()

    def _note_write(self, tensor: Tensor) -> None:
        writes = self._writes.setdefault(storage_of(tensor), [])
        writes.append(Write(self._ids[id(tensor)], tensor.shape, tensor.stride(), int(tensor.storage_offset())))
        self._seen[id(tensor)] = len(writes)

    def _refresh(self, tensor: Tensor, known: int | None, write: Write) -> int | None:
        """After a write through another view: the tensor's value is made of its old one and of what was written."""
        source = source_of(tensor, write.size, write.stride, write.offset)
        covered = source >= 0
        if not bool(covered.any()):
            return known
        taken = self._emit(
            torch.ops.aten.take.default, [self.tape.values[write.value], source.clamp(min=0)], {0: write.value}
        )
        old = {} if known is None else {2: known}
        constant = tensor.clone()
        value = self._emit(torch.ops.aten.where.self, [covered, self.tape.values[taken], constant], {1: taken, **old})
        self.tape.values[value] = _ordinary(tensor)
        self._ids[id(tensor)] = value
        if known is None:
            self._keep.append(tensor)
            self._aliases.setdefault(storage_of(tensor), []).append(tensor)
        return value

    def _emit(self, op: Any, leaves: list[Any], inputs: dict[int, int]) -> int:
        _, spec = pytree.tree_flatten((tuple(leaves), {}))
        self.tape.values.append(op(*leaves))
        value = len(self.tape.values) - 1
        frozen = tuple(None if i in inputs else leaf for i, leaf in enumerate(leaves))
        self.tape.calls.append(Call(op, frozen, spec, inputs, (value,), self.path[-1]))
        return value


def _one(value: int) -> tuple[tuple[None], Any, dict[int, int]]:
    """Leaves, their structure and the inputs of a call with one tracked argument."""
    _, spec = pytree.tree_flatten(((0,), {}))
    return (None,), spec, {0: value}


def _first_shape(tensors: Any) -> tuple[int, ...] | None:
    return next((tuple(tensor.shape) for tensor in tensors_in(tensors)), None)


def _frozen(leaf: Any, written: list[Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if any(leaf is t for t in written) else _ordinary(leaf)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that may be differentiated, also where the model works under an ``inference_mode`` of its own."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
