"""Models by what a user types: a timm name, ``module:callable``, or a checkpoint with its timm name."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from widerf._checks import require, require_known


def load_model(spec: str, *, name: str | None = None, arguments: dict[str, Any] | None = None) -> nn.Module:
    """Build the model that ``spec`` stands for.

    Args:
        spec: a timm name (``resnet50``), ``module:callable`` (``mypackage.nets:make``), or the path of a checkpoint.
        name: timm name of the model that a checkpoint belongs to.
        arguments: keyword arguments for timm or the callable.

    Raises:
        ValueError: if nothing of that name is found, or the callable returns no module.

    Example:
        >>> type(load_model("torch.nn:Identity")).__name__
        'Identity'
    """
    arguments = arguments or {}
    if Path(spec).is_file():
        require(name is not None, "--timm", "name the timm model that the checkpoint belongs to", name)
        return _from_timm(str(name), checkpoint_path=spec, **arguments)
    if ":" in spec:
        return _from_callable(spec, arguments)
    return _from_timm(spec, **arguments)


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the (channels, height, width) that the model's configuration asks for, else (3, 224, 224)."""
    configuration = getattr(model, "pretrained_cfg", None) or {}
    return tuple(configuration.get("input_size", (3, 224, 224)))


def _from_timm(name: str, **arguments: Any) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]):
        looks = "/" in name or name.endswith((".pt", ".pth", ".safetensors", ".bin"))
        require(not looks, "MODEL", "be a file that exists", name)
        require_known(name, timm.list_models(), "MODEL")
    model: nn.Module = timm.create_model(name, **arguments)
    return model


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
    model = found if isinstance(found, nn.Module) else found(**arguments)
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
