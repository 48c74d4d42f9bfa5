"""``python -m experiments.patterns``."""

from experiments.harness.inputs import main_guard
from experiments.patterns.command import main

if __name__ == "__main__":
    main_guard(main)
