"""What does it cost to protect every step? The quickstart with a snapshot in memory after each step, and without.

    make bench-every-step [ARGS="--rounds 20"]

Two ranks train side by side as `muster train experiment=quickstart` does. One callback turns snapshots of the
running trainer on for a block of steps, off for another, so that both see the same load of the machine; every other
round begins with the one without. The checksum of a block's last snapshot, which is made behind the next step, is
waited for within the block. Writes
bench/results/every_step.md: median step of each, and the median over rounds of (on / off - 1) with the 95 %
interval of that median (bootstrap); of the time on the clock, and of the processor time of a rank, which a shared
machine disturbs less. Two ranks on two cores leave no core idle: what costs processor time costs throughput.
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
from bench.paired import interval
from parallel.engines.base import Replayable
from trainer.callbacks import Callback

if TYPE_CHECKING:
    from trainer.data.batch import Batch
    from trainer.loop import Trainer

BLOCK = 8
"""Steps: two snapshots of everything, each with the three updates after it (``checkpoint.memory_log``)."""
WARM_UP = 2
"""Blocks."""


class Blocks(Callback):
    """Blocks of steps with a snapshot each and blocks without; rank 0 writes the seconds of each block."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.blocks: list[tuple[bool, float, float]] = []

    def on_start(self, trainer: Trainer) -> None:
        self._turn(trainer)

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if trainer.state.step and trainer.state.step % BLOCK == 0:
            self._end(trainer)
            self._turn(trainer)

    def _turn(self, trainer: Trainer) -> None:
        on = int(len(self.blocks) % 4 in (0, 3))
        trainer.cadence.every = on
        assert isinstance(trainer.engine, Replayable)
        trainer.engine.keep_updates = bool(on)
        self.began = time.perf_counter(), time.process_time()

    def _end(self, trainer: Trainer) -> None:
        assert trainer.memory is not None
        trainer.memory.wait()
        clock, processor = self.began
        self.blocks.append(
            (bool(trainer.cadence.every), time.perf_counter() - clock, time.process_time() - processor)
        )

    def on_finish(self, trainer: Trainer) -> None:
        if trainer.rank == 0:
            self.file.write_text(json.dumps(self.blocks[WARM_UP:]))


def measure(rounds: int) -> tuple[list[str], dict[str, list[list[float]]]]:
    """The command's overrides, and by clock the (seconds a step with, without) of each round."""
    overrides = [f"train.steps={BLOCK * (2 * rounds + WARM_UP) + 1}", "checkpoint.memory_every=1"]
    blocks = quickstart.run("bench.every_step:Blocks", *overrides)
    by_clock: dict[str, list[list[float]]] = {"wall": [], "processor": []}
    for pair in zip(blocks[::2], blocks[1::2], strict=True):
        without, with_ = sorted(pair)
        assert not without[0] and with_[0]
        for name, at in (("wall", 1), ("processor", 2)):
            by_clock[name].append([with_[at] / BLOCK, without[at] / BLOCK])
    assert len(by_clock["wall"]) == rounds
    return [*quickstart.QUIET, *overrides], by_clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    head = measured(f'make bench-every-step ARGS="--rounds {rounds}"')
    asked, by_clock = measure(rounds)
    lines = [
        "# A snapshot after every step\n",
        head,
        f"It ran `muster train {' '.join(asked)}`.\n",
        "| time | step without | step with | cost, median of rounds | 95 % interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, pairs in by_clock.items():
        costs = [with_ / without - 1 for with_, without in pairs]
        low, high = interval(costs)
        without, with_ = (median(pair[index] for pair in pairs) for index in (1, 0))
        cost = f"{100 * median(costs):+.2f} % | {100 * low:+.2f} to {100 * high:+.2f} %"
        lines.append(f"| {name} | {without:.4f} s | {with_:.4f} s | {cost} |")
    lines += ["\nSeconds a step by round, with and without: wall, processor\n", "```text"]
    for wall, processor in zip(*by_clock.values(), strict=True):
        lines.append(" ".join(f"{value:.4f}" for value in (*wall, *processor)))
    lines.append("```")
    (RESULTS / "every_step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
