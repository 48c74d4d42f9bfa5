"""Checkpoints of models with sparse layers: read without running code, loaded all or nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from widerf._checks import require
from widerf.conversion.exchange import exchange
from widerf.conversion.windows import SPARSE
from widerf.report import counted, listed
from widerf.sparse.layer import SparseConv, why_not_plain
from widerf.sparse.offsets import check_pattern

_OFFSETS = "offsets"
# Where training scripts keep the weights in a checkpoint, averages first, as timm does.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile, Lightning


def load_state_dict(model: nn.Module, state: Mapping[str, Any], strict: bool = True) -> Any:
    """Load a state dict, after making those convolutions of ``model`` sparse that are sparse in it.

    ``torch.nn.Module.load_state_dict`` refuses the offsets of sparse layers in a model that has none. Here each
    plain convolution with offsets in ``state`` is replaced, in place, by the sparse layer that they make, which holds
    the very parameters of the old one: an optimiser that has them goes on. Sparse layers whose window does not hold the
    new offsets get a new window. If anything does not fit, ``model`` is as it was before.

    Args:
        model: the model as its builder makes it, converted or not.
        state: its state dict; the prefixes of DDP, ``torch.compile`` and Lightning (``module.``, ``_orig_mod.``,
            ``model.``) are taken off if all keys have them and none of the model's does; a prefix that all of the
            model's keys have and none of the state's is added.
        strict: whether missing and unexpected keys are errors.

    Returns:
        missing and unexpected keys, as torch's own method does.

    Raises:
        TypeError: if ``model`` is not a module or ``state`` not a mapping of names to values.
        ValueError: if ``state`` does not fit: what is missing, unexpected or of another shape is named in one line.

    Example:
        >>> from widerf import convert
        >>> build = lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        >>> net, fresh = build(), build()
        >>> _ = convert(net, extent=7)
        >>> load_state_dict(fresh, net.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(1, 3, 9, 9)
        >>> torch.equal(net(x), fresh(x))
        True
    """
    require(isinstance(model, nn.Module), "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    named = isinstance(state, Mapping) and all(isinstance(key, str) for key in state)
    require(named, "state", "be a state dict: names and tensors", type(state).__name__, TypeError)
    plain = _named_as(model, state)
    pairs = _pairs(model, plain)
    kept = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return exchange(model, pairs, lambda: _loaded(model, plain, kept, strict))


def rebuild_on_load(model: nn.Module) -> Any:
    """Make a model's own ``load_state_dict`` build the sparse layers that a state needs, whoever calls it.

    For loaders that call it themselves: ``from_pretrained`` of a model with ``huggingface_hub``'s
    ``PyTorchModelHubMixin``, which else drops offsets without a word, Lightning's ``load_from_checkpoint``,
    ``timm.models.load_checkpoint``. Say it at the end of the model's ``__init__``. What does not fit raises as torch's
    loading does, which, unlike :func:`load_state_dict`, may by then have changed the model.

    Args:
        model: the model as its builder makes it; it may become part of a larger one.

    Returns:
        a handle; its ``remove()`` ends it.

    Raises:
        TypeError: if ``model`` is not a module.

    Example:
        >>> from widerf import convert
        >>> build = lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        >>> net, fresh = build(), build()
        >>> _ = convert(net, extent=7)
        >>> _ = rebuild_on_load(fresh)
        >>> fresh.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> type(fresh[1]).__name__
        'SparseConv2d'
    """
    require(isinstance(model, nn.Module), "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    return model.register_load_state_dict_pre_hook(_rebuilt)  # type: ignore[no-untyped-call]


def _rebuilt(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    exchange(model, _pairs(model, own), lambda: None)


def _named_as(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state without the prefix that wrappers put before all of its names, or with the model's own.

    A model that is nothing but a wrapper may write its state without its own prefix, and add it when it loads.
    """
    own, found = set(model.state_dict()), dict(state)
    while found and not own & found.keys():
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in found)), None)
        if prefix is None:
            break
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    if len(wrappers := {key.partition(".")[0] for key in own}) == 1 and not own & found.keys():
        inside = {f"{min(wrappers)}.{key}": value for key, value in found.items()}
        found = inside if own & inside.keys() else found
    return found


def _pairs(model: nn.Module, state: Mapping[str, Any]) -> dict[nn.Module, nn.Module]:
    """Build the sparse layers that ``state`` needs and ``model`` lacks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs: dict[nn.Module, nn.Module] = {}
    for key, offsets in state.items():
        name, _, last = key.rpartition(".")
        module = modules.get(name)
        if last != _OFFSETS or module is None or not hasattr(module, "kernel_size"):
            continue  # no layer of that name: an unexpected key, which loading tells
        if isinstance(module, SparseConv) and _fits(module, offsets):
            continue
        plain = "parametrizations" not in module._modules
        require(plain, "model", "have plain weights in layers that get other taps", f"{name}: parametrised")
        kind = type(module) if isinstance(module, SparseConv) else _kind(name, module)
        require(module is not model, "model", "hold the layer that has offsets, not be it", type(model).__name__)
        try:
            pairs[module] = kind._in_place_of(module, None, offsets)
        except (TypeError, ValueError) as error:
            raise ValueError(f"state must fit the model, got {key}: {error}") from error
    return pairs


def _fits(layer: SparseConv, offsets: Any) -> bool:
    try:
        check_pattern(offsets, layer.kernel_size, layer.extent, layer.in_channels)
    except (TypeError, ValueError):
        return False
    return True


def _kind(name: str, module: nn.Module) -> type[SparseConv]:
    dense = next((kind for kind in SPARSE if isinstance(module, kind)), nn.Conv2d)
    problem = why_not_plain(module, dense)  # type: ignore[arg-type]
    rule = "have a plain convolution or a sparse layer wherever the state has offsets"
    require(problem is None, "model", rule, f"{name}: {problem}")
    return SPARSE[dense]


def _loaded(model: nn.Module, state: dict[str, Any], kept: Mapping[str, Tensor], strict: bool) -> Any:
    """Load; put all values back if anything does not fit."""
    try:
        try:
            result = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            lines = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
            raise ValueError(f"state must fit the model, got {listed(lines, 2) or error}") from error
        if strict and (result.missing_keys or result.unexpected_keys):
            faults = {"missing": result.missing_keys, "unexpected": result.unexpected_keys}
            told = "; ".join(
                f"{counted(len(keys), kind + ' key')} ({listed(keys, 3)})" for kind, keys in faults.items() if keys
            )
            raise ValueError(f"state must fit the model, got {told}")
    except BaseException:
        model.load_state_dict(dict(kept), strict=False)
        raise
    return result


def read_state(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read the weights in a file; no code in it is run.

    Args:
        path: ``.safetensors``, or what ``torch.save`` writes: a state dict, or a dictionary that holds one as
            ``state_dict`` or ``model``, or an average of the weights as ``state_dict_ema`` or ``model_ema``, which
            comes first.

    Returns:
        the state dict, and where in the file it was.

    Raises:
        OSError: if the file cannot be read.
        ImportError: for ``.safetensors`` without that package.
        ValueError: if the file is damaged, or holds more than tensors and plain containers.
    """
    path = Path(path)
    require(path.is_file(), "path", "be a file that exists", str(path))
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path)), ""
        except SafetensorError as error:
            raise ValueError(f"path must be a whole safetensors file, got {str(path)!r}: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and torch each have errors of their own
        called = re.search(r"GLOBAL (\S+)", str(error))  # torch goes on to tell how to run it all the same
        said = str(error.__context__ or error).strip().splitlines() or [type(error).__name__]
        why = f"it holds more than tensors and calls {called[1]}, which was not run" if called else said[0]
        raise ValueError(f"path must hold tensors only, and whole, got {str(path)!r}: {why}") from error
    return _unwrapped(found, path)


def _unwrapped(found: Any, path: Path) -> tuple[dict[str, Any], str]:
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            return dict(found[key]), key
    tensors = isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values())
    require(tensors, "path", "hold a state dict", f"{str(path)!r} with {type(found).__name__}")
    return dict(found), ""


def check_ending(path: str | Path) -> Path:
    """Return the path of a file that :func:`write_state` can write."""
    path = Path(path)
    require(path.suffix in (".safetensors", ".pth", ".pt"), "path", "end in .safetensors, .pth or .pt", str(path))
    return path


def write_state(model: nn.Module, path: str | Path) -> None:
    """Write the state dict of a model: ``.safetensors``, or ``.pth`` and ``.pt`` by ``torch.save``.

    Written beside the file first, and then put in its place: a crash leaves no half a file.
    """
    path = check_ending(path)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    part = path.with_name(f"{path.name}.part")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            # Tensors that several names share are written for each of them.
            save_file({name: value.clone() for name, value in state.items()}, part)
        else:
            torch.save(state, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
