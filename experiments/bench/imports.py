"""What ``import widerf`` and its public names cost beside ``import torch``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import widerf

RUNS = 7


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter that runs ``code``."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Time the imports in turn and print the median ratios with their range."""
    names = "; ".join(f"widerf.{name}" for name in widerf.__all__ if name != "ERFTracker")
    codes = {
        "import widerf": "import torch, widerf",
        "and every public name": f"import torch, widerf; {names}",
    }
    ratios: dict[str, list[float]] = {label: [] for label in codes}
    seconds("import torch")  # warms the file cache
    for _ in range(RUNS):
        base = seconds("import torch")
        for label, code in codes.items():
            ratios[label].append(seconds(code) / base)
    for label, values in ratios.items():
        print(
            f"import torch, {label}: {statistics.median(values):.3f} × import torch alone "
            f"(range {min(values):.3f} to {max(values):.3f}, n = {RUNS})"
        )


if __name__ == "__main__":
    main()
