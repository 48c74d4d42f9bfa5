"""The evidence that needs a card, in parts that fit the minutes given.

    python -m experiments.gpu evidence --minutes 8 --part 1
    python -m experiments.gpu evidence --minutes 8 --part 2 --data-dir DIR

Does what is missing of a part, most decisive first, and writes each line at once to
``docs/results/evidence-DEVICE-PART.jsonl``; the same command goes on from there. How long a run takes is learnt from
the runs before it: none begins that would not end in time. ``--small`` does a tiny version on any device.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from experiments.gpu.evidence_parts import PARTS, Size
from experiments.gpu.evidence_study import Run
from experiments.harness import data
from experiments.harness.device import machine, pick_device
from experiments.harness.inputs import InputError, main_guard
from experiments.harness.ledger import RESULTS, Ledger

SPARE = 1.25  # a run may take this much longer than the longest so far


class Allowance:
    """Minutes that shrink, and how long runs have taken.

    Example:
        >>> times = iter([0.0, 0.0, 10.0, 10.0, 55.0])
        >>> allowance = Allowance(60, now=lambda: next(times))
        >>> with allowance:
        ...     pass
        >>> allowance.longest, allowance.enough(), allowance.enough()
        (10.0, True, False)
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self.longest = now, 0.0
        self._end = now() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - self._now()

    def enough(self) -> bool:
        """Whether another run would end in time; before the first one nothing is known but the time left."""
        return self.left() > SPARE * self.longest

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *_: object) -> None:
        self.longest = max(self.longest, self._now() - self._started)


def do_part(runs: Iterable[Run], rows: Ledger, allowance: Allowance, device: torch.device) -> tuple[int, int]:
    """Do the runs that are missing while there is time.

    A run that raises is a record with its error, and the rest goes on; it is tried again by the next call.

    Returns:
        How many runs were done, and how many are left.
    """
    held = Counter((row["run"], row["first_seed"], row["of"]) for row in rows.rows() if "failed" not in row)
    there = {(name, seed) for (name, seed, of), count in held.items() if count == of}
    missing = [run for run in runs if (run.arm, run.seed) not in there]
    for done, run in enumerate(missing):
        if not allowance.enough():
            return done, len(missing) - done
        with allowance:
            try:
                records = run.do()
            except InputError:
                raise  # what the user gave is wrong: every run would say so
            except Exception as error:
                records = [{"seed": run.seed, "failed": f"{type(error).__name__}: {error}"[:300]}]
        for record in records:
            about = {"arm": run.arm, "run": run.arm, "first_seed": run.seed, "of": len(records)}
            rows.append({**about, **record, **machine(device)})
        print(f"{run.arm}, from seed {run.seed}: {len(records)} rows, {allowance.left():.0f} s left", flush=True)
    return len(missing), 0


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and do one part."""
    names = list(PARTS)
    line = argparse.ArgumentParser("experiments.gpu evidence", description=__doc__.split("\n")[0])
    told = ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    line.add_argument("--part", type=int, required=True, help=told)
    line.add_argument("--minutes", type=float, default=8.0, help="for all of it, reading the images too")
    line.add_argument("--device", default="auto", help="auto, cuda, cpu or mps")
    line.add_argument("--data-dir", type=Path, default=data.default_dir(), help="folder that holds the images")
    line.add_argument("--small", action="store_true", help="tiny runs: does the command work, on any device?")
    line.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = line.parse_args(arguments)
    if not 1 <= options.part <= len(names):
        raise InputError(f"--part must be from 1 to {len(names)}, got {options.part}")
    if options.minutes <= 0:
        raise InputError(f"--minutes must be positive, got {options.minutes}")
    allowance, device = Allowance(60 * options.minutes), pick_device(options.device)
    torch.backends.cudnn.benchmark = True
    part = names[options.part - 1]
    if device.type != "cuda" and not options.small and not part.endswith("-narrow"):
        raise InputError(f"--device must be a CUDA device without --small in part {part}, got {str(device)!r}")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "small" if options.small else "cpu"
    stem = re.sub(r"\W+", "-", card.lower()).strip("-")
    rows = Ledger(options.out / f"evidence-{stem}-{part}.jsonl", ("run", "arm", "seed"))
    runs = PARTS[part](device, Size(options.small), options.data_dir, rows.rows)
    done, left = do_part(runs, rows, allowance, device)
    print(f"{part}: {done} runs done, {left} left; the same command goes on from here. Rows: {rows.path}")


if __name__ == "__main__":
    main_guard(main)
