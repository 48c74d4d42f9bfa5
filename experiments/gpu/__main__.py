"""``python -m experiments.gpu kernels``: are the layers right, how fast are they? ``evidence``: what trains faster?"""

from __future__ import annotations

import sys

from experiments.gpu import command, evidence
from experiments.harness.inputs import main_guard


def main() -> None:
    """Hand the command line to the command that it names."""
    if sys.argv[1:2] == ["evidence"]:
        evidence.main(sys.argv[2:])
    else:
        command.main()


if __name__ == "__main__":
    main_guard(main)
