"""Experiments that hold widerf against its rivals; one file per claim, ``python -m experiments.NAME --help``."""
