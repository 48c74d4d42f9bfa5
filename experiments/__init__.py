"""Experiments that hold widerf against its rivals: one package a question, ``python -m experiments.NAME --help``."""
