"""The batches that a run stepped over: a file, so that every restart steps over the same ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.files import storage_error, write_durably

LEDGER_FILE = "guard.json"


@dataclass(frozen=True)
class Skip:
    """One batch stepped over.

    Attributes:
        step: that it would have been; the first of a run is 1.
        kind: ``non_finite`` or ``spike``.
        data: fingerprint of the data, and samples a step: under others the step holds another batch.
    """

    step: int
    kind: str
    data: str
    global_batch: int


class Ledger:
    """Skips of one run, the same on every rank.

    Args:
        path: ``<run>/guard.json``; need not exist.
        data, global_batch: of this run, as in :class:`Skip`.
    """

    def __init__(self, path: Path, data: str, global_batch: int) -> None:
        self.path, self.data, self.global_batch = path, data, global_batch
        self.skips: list[Skip] = []

    def read(self) -> list[dict[str, Any]]:
        """What the file holds, for :meth:`load`; one rank reads and tells the others."""
        return list(json.loads(self.path.read_text())["skipped"]) if self.path.exists() else []

    def load(self, entries: list[dict[str, Any]]) -> None:
        """Take over what :meth:`read` found."""
        self.skips = [Skip(**entry) for entry in entries]

    def has(self, step: int) -> bool:
        """Whether the batch of this step is one that was stepped over."""
        return any(
            (skip.step, skip.data, skip.global_batch) == (step, self.data, self.global_batch)
            for skip in self.skips
        )

    def before(self, step: int) -> int:
        """How many batches were stepped over before this step."""
        return sum(skip.step < step for skip in self.skips)

    def in_a_row_before(self, step: int) -> int:
        """How many of the steps right before this one were stepped over."""
        first = step
        while self.has(first - 1):
            first -= 1
        return step - first

    def add(self, step: int, kind: str, write: bool) -> None:
        """Note a skip; the rank with ``write`` makes it durable before it returns.

        Raises:
            StorageError: the disk does not take it.
        """
        self.skips.append(Skip(step, kind, self.data, self.global_batch))
        if not write:
            return
        content = json.dumps({"skipped": [asdict(skip) for skip in self.skips]}, indent=1) + "\n"
        try:
            write_durably(self.path, content.encode())
        except OSError as error:
            raise storage_error(error, self.path, len(content), field="run.root") from error
