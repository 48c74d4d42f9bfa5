"""``python -m experiments.compare``."""

from experiments.compare.command import main
from experiments.harness.inputs import main_guard

if __name__ == "__main__":
    main_guard(main)
