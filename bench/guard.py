"""What do the guards cost? Steps of the quickstart's model in turn with and without them, in one process pair.

    make bench-guard            (ARGS="--rounds 40")

Two ranks train side by side as `muster train experiment=quickstart` does. One callback switches the guard of the
running trainer on for some steps, off for the next, and times each: both see the same load of the machine. Writes
bench/results/guard.md: the median step of each setting, and the median over rounds of (on / off - 1).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench import quickstart
from bench.here import RESULTS, measured
from trainer.callbacks import Callback

if TYPE_CHECKING:
    from trainer.data.batch import Batch
    from trainer.loop import Trainer

WARM_UP = 6


class Alternate(Callback):
    """Steps with the guard and without it in turn; rank 0 writes (on, seconds) of each to a file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.began = 0.0
        self.times: list[tuple[bool, float]] = []

    def on_start(self, trainer: Trainer) -> None:
        self.guard = trainer.guard
        self.began = time.perf_counter()

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        # From one batch to the next, so that all that a step brings is in it, whoever does it.
        now = time.perf_counter()
        self.times.append((trainer.guard is not None, now - self.began))
        on = trainer.state.step % 2 == 0
        trainer.guard = trainer.stepper.gate = self.guard if on else None
        if on and self.guard is not None:
            self.guard.loaded(trainer.state.step)  # as after a guarded step: one digest too many
        self.began = now

    def on_finish(self, trainer: Trainer) -> None:
        if trainer.rank == 0:
            self.file.write_text(json.dumps(self.times[WARM_UP:]))


def measure(setting: list[str], rounds: int) -> list[tuple[bool, float]]:
    """(on, seconds) of each step of a run with the guard set so."""
    overrides = [f"train.steps={2 * rounds + WARM_UP}", "checkpoint.memory_every=0", *setting]
    found = quickstart.run("bench.guard:Alternate", *overrides)
    return [(bool(on), float(seconds)) for on, seconds in found]


SETTINGS = {
    "not finite only": ["guard.digest_every=0", "guard.replica_every=0", "guard.replay_every=0"],
    "default, without replays": ["guard.replay_every=0"],
    "a replay every step": ["guard.digest_every=0", "guard.replica_every=0", "guard.replay_every=1"],
    "every bit before every update": ["guard.digest_every=1", "guard.replay_every=0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    lines = [
        "# What the guards cost\n",
        measured(f'make bench-guard ARGS="--rounds {rounds}"'),
        "| guard | step without | step with | cost, median of pairs |",
        "| --- | --- | --- | --- |",
    ]
    for name, setting in SETTINGS.items():
        steps = measure(setting, rounds)
        off, on = ([seconds for is_on, seconds in steps if is_on is wanted] for wanted in (False, True))
        pairs = [b / a - 1 for a, b in zip(off, on, strict=False)]
        cost = f"{100 * median(pairs):+.2f} %"
        lines.append(f"| {name} | {median(off):.4f} s | {median(on):.4f} s | {cost} |")
        print(lines[-1], flush=True)
    (RESULTS / "guard.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
