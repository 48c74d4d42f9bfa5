"""One small model for each module under ``timm.models``: the list that the sweeps share.

``python -m experiments.timm.models`` counts parameters of every model without allocating them (meta device, about ten
minutes) and writes the list next to this file; :func:`small_models` reads it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("models.json")


@dataclass(frozen=True)
class SmallModel:
    """The model with the fewest parameters in a module of timm.

    Attributes:
        module: module under ``timm.models``.
        name: name for ``timm.create_model``.
        input_size: ``(channels, height, width)`` that its configuration asks for.
        parameters: how many it has.
    """

    module: str
    name: str
    input_size: tuple[int, ...]
    parameters: int


def read(path: Path = LIST) -> list[SmallModel]:
    """Read the list, one entry per module, in the order of the modules' names."""
    rows = json.loads(path.read_text())["models"]
    return [SmallModel(**{**row, "input_size": tuple(row["input_size"])}) for row in rows]


def small_models() -> dict[str, str]:
    """Return module under ``timm.models`` → name of its smallest model.

    Example:
        >>> small_models()["resnet"], len(small_models()) > 90
        ('test_resnet', True)
    """
    return {model.module: model.name for model in read()}


def input_sizes() -> dict[str, tuple[int, ...]]:
    """Return model name → ``(channels, height, width)``."""
    return {model.name: model.input_size for model in read()}


def _count(name: str) -> int:
    import timm
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def _configured_input(name: str) -> tuple[int, ...]:
    import timm

    config: Any = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    size = config.input_size if config is not None else (3, 224, 224)
    return tuple(size)


def _smallest(names: list[str], tell: Any) -> Iterator[tuple[int, str]]:
    for name in names:
        try:
            yield _count(name), name
        except Exception as error:  # a model that cannot be counted is passed over, and said
            tell(f"{name}: not counted: {type(error).__name__}: {error}")


def make_list(tell: Any = print) -> list[SmallModel]:
    """Count the parameters of every registered model and keep the smallest of each module."""
    import timm

    found = []
    modules = sorted({timm.models.model_entrypoint(n).__module__.rsplit(".", 1)[-1] for n in timm.list_models()})
    for module in modules:
        counted = sorted(_smallest(timm.list_models(module=module), tell))
        if not counted:
            tell(f"{module}: no model could be counted")
            continue
        parameters, name = counted[0]
        found.append(SmallModel(module, name, _configured_input(name), parameters))
        tell(f"{module}: {name}, {parameters / 1e6:.2f} M")
    return found


def main() -> None:
    """Write the list."""
    import timm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LIST)
    arguments = parser.parse_args()
    models = [asdict(model) for model in make_list()]
    arguments.out.write_text(json.dumps({"timm": timm.__version__, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
