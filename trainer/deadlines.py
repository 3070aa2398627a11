"""What a run knows of the lengths of its phases, kept for the process after a restart.

A process has deadlines of its own only once it has timed a phase often enough (:mod:`trainer.liveness`). Until
then a restarted one goes by the longest that its predecessor took in *its* first steps, which warmed up, too:

    deadlines.json    in the run directory: {"of": what the lengths depend on, "seconds": {phase: longest}}

Written by rank 0, once for each phase and process. What was learned of another layout, model or batch is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.liveness import Pulse
from trainer.metrics.jsonl import decode

FILE = "deadlines.json"
_SECTIONS = ("device", "engine", "layout", "model", "parallel", "train")


def depends_on(values: Mapping[str, Any], world_size: int) -> str:
    """A digest of those parts of a config (as plain values) that make a step longer or shorter."""
    parts = {name: values[name] for name in _SECTIONS}
    return hashlib.sha256(json.dumps([parts, world_size], sort_keys=True).encode()).hexdigest()


class Deadlines:
    """Carries lengths of phases from process to process.

    Args:
        run_dir: of the run.
        of: from :func:`depends_on`.
        pulse: that has timed phases, or will.
        writes: whether this rank keeps what it learns.
    """

    def __init__(self, run_dir: Path, of: str, pulse: Pulse, writes: bool) -> None:
        self._path, self._of, self._pulse, self._writes = run_dir / FILE, of, pulse, writes
        self._kept: dict[str, float] = {}

    def recall(self) -> None:
        """Tell the pulse what is known of the run."""
        with suppress(OSError):  # there is none yet
            found = decode(self._path.read_bytes())
            if found is not None and found.get("of") == self._of:
                self._pulse.recall(found["seconds"])

    def stepped(self) -> None:
        """After a step: write down what is new. A full disk costs deadlines and nothing else: it is tried again."""
        learned = self._pulse.learned()
        if not self._writes or learned.keys() <= self._kept.keys():
            return
        part = self._path.with_suffix(".part")
        with suppress(OSError):
            part.write_text(json.dumps({"of": self._of, "seconds": learned}) + "\n")
            part.replace(self._path)
            self._kept = learned
