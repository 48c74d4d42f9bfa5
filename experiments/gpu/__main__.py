"""``python -m experiments.gpu kernels``: are the sparse layers right on this card, and how fast?"""

from __future__ import annotations

from experiments.gpu.command import main
from experiments.harness.inputs import main_guard

if __name__ == "__main__":
    main_guard(main)
