"""Run every benchmark, one after the other: ``python -m experiments.bench`` (``make bench``).

Each has a ``main()`` that times widerf against a named rival in the same run and prints a table. Leave the
machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import os

# Name on the command line → module: ``import`` cannot name a module.
BENCHMARKS = {"import": "imports"} | {name: name for name in ("init", "measure", "predict", "sparse", "summary")}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks that the command line names, or all."""
    parser = argparse.ArgumentParser("experiments.bench", description="Time widerf against its rivals.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHMARKS)}")
    chosen = parser.parse_args(arguments).names or list(BENCHMARKS)
    unknown = set(chosen) - set(BENCHMARKS)
    if unknown:
        parser.error(f"NAME must be among {', '.join(BENCHMARKS)}, got {', '.join(sorted(unknown))}")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(
            f"note: the load of this machine is {os.getloadavg()[0]:.1f}; ratios will spread more than on a quiet one"
        )
    for name in chosen:
        print(f"\n── {name} " + "─" * 60)
        importlib.import_module(f"experiments.bench.{BENCHMARKS[name]}").main()


if __name__ == "__main__":
    main()
