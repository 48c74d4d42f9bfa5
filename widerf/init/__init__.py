"""Initialisation that widens the effective receptive field; the contract is :func:`apply` and :func:`periphery_`."""

from widerf.init.report import InitReport, LayerChange
from widerf.init.widening import apply, periphery_

__all__ = ["InitReport", "LayerChange", "apply", "periphery_"]
