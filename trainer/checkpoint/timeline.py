"""Which states of a run count: a rollback gives up a future, and what was kept of it must not come back.

Every launch and every rollback begins a *timeline* at the step that it loaded. A state of step s of timeline t
counts only if no later timeline began before s. The list stands in ``timeline.json`` in the run directory and is
written by rank 0 alone, before anything of the new timeline is kept. Torch-free.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from parallel.errors import ConfigError
from trainer.checkpoint.files import storage_error, write_durably

FILE = "timeline.json"


@dataclass
class Timelines:
    """The timelines of one run, oldest first.

    Attributes:
        run: a random name of the run: what a deleted run of the same directory left in memory has another.
        starts: the step at which each began; its place in the list is its number.
    """

    run: str = field(default_factory=lambda: secrets.token_hex(8))
    starts: list[int] = field(default_factory=list)

    @property
    def current(self) -> int:
        """Number of the newest; -1 before the first, and for checkpoints older than this file."""
        return len(self.starts) - 1

    def counts(self, step: int, timeline: int) -> bool:
        """Whether a state is of the run's past, not of a future that was given up."""
        return timeline < len(self.starts) and all(step <= start for start in self.starts[timeline + 1 :])

    def begin(self, step: int) -> None:
        """Go on from ``step``."""
        self.starts.append(step)

    @classmethod
    def read(cls, run_dir: Path) -> Timelines:
        """Those of a run directory; none yet where it has no such file.

        Raises:
            ConfigError: the file is damaged.
        """
        path = run_dir / FILE
        try:
            body = json.loads(path.read_bytes())
            run, starts = body["run"], body["starts"]
            if not isinstance(run, str) or not all(type(step) is int for step in starts):
                raise ValueError("a field is of another type")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "RUN_DIR",
                path,
                f"which states count cannot be read: {error}",
                "remove the file: every checkpoint then counts, also one that a rollback had given up",
            ) from error
        return cls(run, starts)

    def write(self, run_dir: Path) -> None:
        """Make it durable. Raises StorageError."""
        content = json.dumps({"run": self.run, "starts": self.starts}).encode()
        try:
            write_durably(run_dir / FILE, content)
        except OSError as error:
            raise storage_error(error, run_dir / FILE, len(content), field="run.root") from error
