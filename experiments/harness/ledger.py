"""Tables that grow row by row: do what is missing, append a row, read it all back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from experiments.harness.runs import Record

Key = tuple[Any, ...]
Job = TypeVar("Job")
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass(frozen=True)
class Ledger:
    """Rows in a file, each under a key; a later row of the same key takes the place of the earlier one.

    The file is only ever appended to, a whole line at a time. What a kill left of a line is not read, and cut off
    before the next one.

    Attributes:
        path: ends in ``.jsonl``, one JSON object a line, or in ``.csv``, whose values read back as text.
        key: names of the values that make a row's key.
        columns: of a CSV; what a row lacks is empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ledger = Ledger(Path(folder) / "squares.jsonl", ("n",))
        ...     first = ledger.fill({(n,): n for n in (1, 2)}, lambda n: {"square": n * n})
        ...     ledger.fill({(n,): n for n in (2, 3)}, lambda n: {"square": n * n})
        [{'n': 1, 'square': 1}, {'n': 2, 'square': 4}, {'n': 3, 'square': 9}]
    """

    path: Path
    key: tuple[str, ...]
    columns: tuple[str, ...] = ()

    def rows(self) -> list[Record]:
        """Return the latest row of every key, in the order in which the keys came first."""
        whole = self._whole().decode()
        if self.path.suffix == ".csv":
            found: list[Record] = list(csv.DictReader(io.StringIO(whole, newline="")))
        else:
            found = [json.loads(line) for line in whole.splitlines()]
        return list({self._key(row): row for row in found}.values())

    def append(self, row: Record) -> None:
        """Write one row at the end, at once.

        Raises:
            ValueError: the row has a value that is no column.
        """
        whole = self._whole()
        if self.path.suffix == ".csv":
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
            if not whole:
                writer.writeheader()
            writer.writerow(row)
            line = text.getvalue()
        else:
            line = json.dumps(row) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(len(whole))
            file.write(line.encode())

    def fill(
        self,
        jobs: Mapping[Key, Job],
        work: Callable[[Job], Record],
        *,
        again: bool = False,
        after: Callable[[Record], object] | None = None,
    ) -> list[Record]:
        """Do the jobs whose key has no row yet, one after the other, and return all rows.

        Args:
            jobs: from the key, values in the order of ``self.key``, to what ``work`` takes.
            work: makes the rest of the row.
            again: also do the jobs that have a row.
            after: called with every new row once it is written.
        """
        there = {self._key(row) for row in self.rows()}
        named = [(dict(zip(self.key, key, strict=True)), job) for key, job in jobs.items()]
        todo = [(name, job) for name, job in named if again or self._key(name) not in there]
        for name, job in tqdm(todo, unit="row", disable=None):
            row = name | work(job)
            self.append(row)
            if after is not None:
                after(row)
        return self.rows()

    def _key(self, row: Record) -> Key:
        values = (row[name] for name in self.key)
        return tuple(map(str, values)) if self.path.suffix == ".csv" else tuple(values)

    def _whole(self) -> bytes:
        """Return what is there up to the last whole line."""
        there = self.path.read_bytes() if self.path.exists() else b""
        return there[: there.rfind(b"\n") + 1]
