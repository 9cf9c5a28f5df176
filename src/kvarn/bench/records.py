"""A folder of results: what was run, and one JSON line for each measurement, written as it is made.

``run.json`` says what was asked for, with which versions, on which hardware. ``records.jsonl`` has one object a line.
Every object has ``kind``, ``subject`` (``system``, ``name``, ``budget``, ``label``), ``case`` (the key of what was
measured, the same for all subjects) and ``length`` (tokens). The rest depends on the kind:

``fidelity``    ``kl``, ``top1``, ``rank``, ``nll_change``: lists, one number a position of the full cache's
                continuation; ``held``
``perplexity``  ``nll``: a list, one number a token; ``held``
``task``        ``task``, ``group``, ``setting``, ``number``; ``score`` (0 to 1, mean over turns); ``turns``: a list of
                ``question``, ``answer``, ``references``, ``metric``, ``score``, ``tokens``; ``held``
``speed``       ``batch``; ``first_token``, ``first_token_full``: lists of seconds, pair by pair; ``per_token``,
                ``per_token_full``: the same for decoding steps; ``process_peak_bytes`` and ``device_peak_bytes`` (null
                where not known); ``held``
``refused``     ``reason``: why the subject could not be measured in this case, for instance a budget below its least

``held`` is ``subjects.Held`` after the prompt: ``bytes``, ``dense_bytes``, ``peak_bytes``, ``entries``.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import KvarnError

Record = dict[str, Any]


class Results:
    """The records of one folder; those that are there stay, and new ones are added behind them."""

    def __init__(self, folder: Path):
        self.folder, self._lines = folder, folder / "records.jsonl"

    @classmethod
    def create(cls, folder: Path, run: Record) -> "Results":
        """A new folder; raises KvarnError where one with results is in the way."""
        if (folder / "run.json").exists():
            raise KvarnError(f"{folder} has results already: go on with --resume {folder}, or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return cls(folder)

    @property
    def run(self) -> Record:
        """What was asked for; raises KvarnError where the folder has no results."""
        try:
            return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise KvarnError(f"{self.folder} is no folder of results: run.json is missing or damaged") from error

    def __iter__(self) -> Iterator[Record]:
        """The records in the order in which they were written; one that was cut off at the end is left out."""
        if not self._lines.exists():
            return
        with self._lines.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):
                    yield _parsed(line, f"{self._lines}, line {number}")

    def done(self) -> set[tuple[str, str]]:
        """The (case, subject's label) pairs that need not be measured again."""
        return {(record["case"], record["subject"]["label"]) for record in self}

    def mend(self) -> None:
        """Removes the end of a line whose writing was cut off."""
        if not self._lines.exists():
            return
        with self._lines.open("rb+") as lines:
            written = lines.read()
            lines.truncate(written.rfind(b"\n") + 1)

    def add(self, record: Record) -> None:
        """Writes a record to the disk before it returns."""
        with self._lines.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())


def _parsed(line: bytes, where: str) -> Record:
    try:
        return json.loads(line)
    except ValueError as error:
        raise KvarnError(f"{where}: damaged; remove this line and resume") from error
