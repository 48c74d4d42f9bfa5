"""widerf measures, predicts and widens the effective receptive field of convolutional networks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widerf import functional, init, kernels, patterns, profile
    from widerf.conversion.keeping import load_state_dict, rebuild_on_load
    from widerf.conversion.report import ConversionReport
    from widerf.conversion.swap import convert, densify
    from widerf.erf.map import ERF
    from widerf.erf.measurement import measure
    from widerf.erf.prediction import erf_penalty, predict
    from widerf.erf.receptive import ReceptiveField, receptive_field
    from widerf.erf.tracker import ERFTracker
    from widerf.errors import ClippedWarning, DeadUnitError, UntreatedOperatorError
    from widerf.init.report import InitReport, LayerChange
    from widerf.patterns import Coverage
    from widerf.sparse.ranks import SparseConv1d, SparseConv2d, SparseConv3d
    from widerf.survey.advice import Advice, advise
    from widerf.survey.summary import Summary, summary

# Public name -> the module that holds it, loaded when first asked for: `import widerf` costs what `import torch` does.
# No module bears the name of a function: importing it would hide the function.
_HOME = {
    "Advice": "survey.advice",
    "ClippedWarning": "errors",
    "ConversionReport": "conversion.report",
    "Coverage": "patterns",
    "DeadUnitError": "errors",
    "ERF": "erf.map",
    "ERFTracker": "erf.tracker",
    "InitReport": "init",
    "LayerChange": "init",
    "ReceptiveField": "erf.receptive",
    "SparseConv1d": "sparse.ranks",
    "SparseConv2d": "sparse.ranks",
    "SparseConv3d": "sparse.ranks",
    "Summary": "survey.summary",
    "UntreatedOperatorError": "errors",
    "advise": "survey.advice",
    "convert": "conversion.swap",
    "densify": "conversion.swap",
    "erf_penalty": "erf.prediction",
    "load_state_dict": "conversion.keeping",
    "measure": "erf.measurement",
    "predict": "erf.prediction",
    "rebuild_on_load": "conversion.keeping",
    "receptive_field": "erf.receptive",
    "summary": "survey.summary",
}
_MODULES = ("functional", "init", "kernels", "patterns", "profile")

__all__ = [
    "ERF",
    "Advice",
    "ClippedWarning",
    "ConversionReport",
    "Coverage",
    "DeadUnitError",
    "ERFTracker",
    "InitReport",
    "LayerChange",
    "ReceptiveField",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "Summary",
    "UntreatedOperatorError",
    "advise",
    "convert",
    "densify",
    "erf_penalty",
    "functional",
    "init",
    "kernels",
    "load_state_dict",
    "measure",
    "patterns",
    "predict",
    "profile",
    "rebuild_on_load",
    "receptive_field",
    "summary",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"widerf.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"widerf.{_HOME[name]}"), name)
    raise AttributeError(f"module 'widerf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
