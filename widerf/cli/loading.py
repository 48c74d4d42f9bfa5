"""Models by what a user types: a timm name, ``module:callable``, or a checkpoint with one of these."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from widerf._checks import require, require_known

_FILES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")


@dataclass(frozen=True)
class Loaded:
    """A model, and where its weights come from.

    Attributes:
        model: the model.
        weights: a sentence.
    """

    model: nn.Module
    weights: str


def load_model(spec: str, *, name: str | None = None, arguments: dict[str, Any] | None = None) -> nn.Module:
    """Build the model that ``spec`` stands for; see :func:`load`.

    Example:
        >>> type(load_model("torch.nn:Identity")).__name__
        'Identity'
    """
    return load(spec, name=name, arguments=arguments).model


def load(
    spec: str,
    *,
    name: str | None = None,
    checkpoint: str | None = None,
    pretrained: bool = False,
    arguments: dict[str, Any] | None = None,
) -> Loaded:
    """Build the model that ``spec`` stands for, and load its weights.

    Args:
        spec: a timm name (``resnet50``), ``module:callable`` (``mypackage.nets:make``), or the path of a checkpoint.
        name: timm name or ``module:callable`` of the model that a checkpoint given as ``spec`` belongs to.
        checkpoint: a file with the weights of ``spec``; converted models come back with their sparse layers.
        pretrained: whether to take the trained weights that timm knows by that name.
        arguments: keyword arguments for timm or the callable.

    Raises:
        ValueError: if nothing of that name is found, the model does not build, or the weights are not its own.
    """
    arguments = arguments or {}
    if Path(spec).is_file():
        require(name is not None, "--timm", "name the timm model that the checkpoint belongs to", name)
        require(checkpoint is None, "--checkpoint", "be left out if MODEL is one", checkpoint)
        spec, checkpoint = str(name), spec
    named = ":" not in spec
    require(named or not pretrained, "--pretrained", "come with a timm name", spec)
    require(checkpoint is None or not pretrained, "--pretrained", "be left out if there is a checkpoint", checkpoint)
    model = _from_timm(spec, pretrained, checkpoint, arguments) if named else _from_callable(spec, arguments)
    if checkpoint is not None:
        return Loaded(model, _fill(model, checkpoint))
    told = f"trained, {spec} of timm" if pretrained else ("drawn at random" if named else f"as {spec} gives them")
    return Loaded(model, told)


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the (channels, height, width) that the model's configuration asks for, else (3, 224, 224)."""
    configuration = getattr(model, "pretrained_cfg", None) or {}
    return tuple(configuration.get("input_size", (3, 224, 224)))


def _fill(model: nn.Module, checkpoint: str) -> str:
    from widerf.conversion.keeping import load_state_dict, read_state

    state, where = read_state(checkpoint)
    load_state_dict(model, state)
    return f"{checkpoint}" + (f", its {where}" if where else "")


def _from_timm(name: str, pretrained: bool, checkpoint: str | None, arguments: dict[str, Any]) -> nn.Module:
    import timm

    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        looks = "/" in name or name.endswith(_FILES)
        require(not looks, "MODEL", "be a file that exists", name)
        require_known(name, timm.list_models(), "MODEL")
    if tag:
        require_known(name, [f"{bare}.{known}" for known in _tags(bare)], "MODEL")
        meant = pretrained or checkpoint is not None
        require(meant, "MODEL", f"go without the tag {tag!r}, which names trained weights, or with --pretrained", name)
    return _built(name, lambda: timm.create_model(name, pretrained=pretrained, **arguments))


def _tags(name: str) -> list[str]:
    import timm

    return [str(found).partition(".")[2] for found in timm.list_pretrained(f"{name}.*")]


def _from_callable(spec: str, arguments: dict[str, Any]) -> nn.Module:
    home, _, path = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(home)
    except ImportError as error:
        raise ValueError(f"MODEL must name a module that can be imported, got {spec!r}: {error}") from error
    for part in path.split("."):
        require(hasattr(found, part), "MODEL", f"name something in {home}", spec)
        found = getattr(found, part)
    require(callable(found), "MODEL", "name a callable that builds a model", spec)
    if isinstance(found, nn.Module):
        return found
    return _built(spec, lambda: found(**arguments))


def _built(spec: str, build: Callable[[], Any]) -> nn.Module:
    """Call a builder; whatever it does instead of building is the user's to know, in one sentence."""
    try:
        model = build()
    except SystemExit as error:
        raise ValueError(f"MODEL must build, got {spec!r}: it ended the process with status {error.code}") from error
    except Exception as error:  # anything can be in a builder
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"MODEL must build, got {spec!r}: {why}") from error
    require(isinstance(model, nn.Module), "MODEL", "build a torch.nn.Module", type(model).__name__)
    assert isinstance(model, nn.Module)
    return model


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs; values are Python literals, else strings.

    Example:
        >>> parse_arguments(["zero_init_last=False", "act_layer=gelu"])
        {'zero_init_last': False, 'act_layer': 'gelu'}
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        require(bool(equals) and key.isidentifier(), "--set", "be KEY=VALUE", pair)
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
