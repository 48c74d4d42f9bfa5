"""The command line; ``widerf --help``."""

from widerf.cli.commands import main

__all__ = ["main"]
