"""Does a run that is killed again and again ever end with another bit? Random kills of a small run, cycle by cycle.

    make bench-cycles [ARGS="--cycles 1000"]

Run after run on two ranks, each from a seed of its own. While it trains, processes are killed (SIGKILL) at
random moments:

    rank     a random rank, between or in steps
    all      both ranks at once
    save     a random rank while a checkpoint is being written
    start    a random process under the agent (a worker or the standby) while the group is starting again
    agent    the agent; `muster resume` goes on

Then the same seed trains without a kill, and both must have the same loss at every step, each logged once, and
the same digest of the weights. A cycle is one kill and what it takes to be training again.
Every pair of runs is a line of bench/results/cycles.jsonl; the same command goes on from there, on any machine.
Writes bench/results/cycles.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from trainer.callbacks import Callback
from trainer.environment import cpu_model

if TYPE_CHECKING:
    from trainer.loop import Trainer

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "bench" / "results" / "cycles.md"
LEDGER = RESULTS.with_suffix(".jsonl")
STEPS = 600
MODEL = [
    *("device=cpu", "model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.ffn_dim=48"),
    *("layout=mixtral", "data=stdlib", "data.tokenizer.vocab_size=512", "train.seq_len=32"),
    *("train.global_batch=8", "train.num_threads=1", "optim.schedule=constant", "optim.warmup_steps=0"),
    *("launcher.nproc_per_node=2", "parallel.ep=2", "eval.every=0", "eval.sample_tokens=0"),
    *(f"train.steps={STEPS}", "checkpoint.every=10", "resilience.max_restarts=1000000"),
    *("logger.terminal=off", "logger.wandb.mode=disabled", "run.name=cycles"),
]
KINDS = {"rank": 8, "all": 4, "save": 4, "start": 3, "agent": 1}
"""How often each is drawn."""
MOST_STEPS = 25
"""Before a kill, counted from the first step after the one before."""
PATIENCE_SECONDS = 300.0


class Where(Callback):
    """Keeps a file a rank: its process and the steps that it has done."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        aside = self.folder / f".rank-{trainer.rank}.{os.getpid()}"
        aside.write_text(f"{os.getpid()} {trainer.state.step}")
        aside.replace(self.folder / f"rank-{trainer.rank}")


def where(folder: Path, rank: int) -> tuple[int, int]:
    """(process, steps done) of a rank; (0, 0) before its first step."""
    path = folder / f"rank-{rank}"
    pid, step = path.read_text().split() if path.exists() else ("0", "0")
    return int(pid), int(step)


class Run:
    """The run ``name`` under ``folder``, one command at a time."""

    def __init__(self, folder: Path, name: str, more: list[str]) -> None:
        self.folder, self.name, self.more = folder, name, more
        self.run_dir = folder / "runs" / "cycles" / name
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Train from wherever the run is."""
        muster, begun = str(Path(sys.executable).parent / "muster"), (self.run_dir / "config.yaml").exists()
        command = [muster, "resume", str(self.run_dir)] if begun else [
            muster, "train", *MODEL, *self.more, f"run.root={self.folder / 'runs'}", f"run.id={self.name}",
        ]  # fmt: skip
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(REPO), "MUSTER_CACHE": str(self.folder / "cache")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Until it is done; anything but success ends the bench."""
        assert self.process is not None
        if code := self.process.wait():
            sys.exit(f"{self.name}: exit code {code}, see {self.folder / self.name}.log")

    def lines(self, file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / file).read_text().splitlines()]

    def result(self) -> tuple[dict[int, float], str, bool]:
        """Losses by step, digest at the end, whether each step is logged once."""
        records = self.lines("metrics.jsonl")
        losses = {record["step"]: record["loss/train"] for record in records}
        digest = [
            event["weights_digest"] for event in self.lines("events.jsonl") if event["event"] == "finish"
        ][-1]
        return losses, digest, len(losses) == len(records)


class Killer:
    """Kills processes of a run until it is finished."""

    def __init__(self, run: Run, notes: Path, dice: random.Random) -> None:
        self.run, self.notes, self.dice = run, notes, dice
        self.kills: Counter[str] = Counter()

    def _until(self, condition: Any) -> bool:
        """Wait for a condition; False when the run ended first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        process = self.run.process
        assert process is not None
        while not condition():
            if process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                sys.exit(f"the run does not go on, see {self.run.folder / self.run.name}.log")
            time.sleep(0.002)
        return True

    def _kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def cycle(self) -> bool:
        """One kill, and until the run trains again; False when the run is finished."""
        process = self.run.process
        assert process is not None
        kind = self.dice.choices(list(KINDS), list(KINDS.values()))[0]
        pids = {rank: where(self.notes, rank)[0] for rank in (0, 1)}
        if kind == "save":
            saves = self.run.run_dir / "checkpoints"
            if not self._until(lambda: any(saves.glob(".step-*.tmp"))):
                return False
            time.sleep(self.dice.uniform(0.0, 0.01))
        else:  # a few steps on, so that the run comes forward
            due = where(self.notes, 0)[1] + self.dice.randrange(MOST_STEPS)
            if not self._until(lambda: where(self.notes, 0)[1] >= due):
                return False
            time.sleep(self.dice.uniform(0.0, 0.05))
        if process.poll() is not None:
            return False
        self.kills[kind] += 1
        if kind == "agent":
            process.kill()
            process.wait()
            self.run.start()
        else:
            for pid in pids.values() if kind == "all" else [self.dice.choice(list(pids.values()))]:
                self._kill(pid)
        if kind == "start":
            time.sleep(self.dice.uniform(0.0, 1.0))
            with suppress(psutil.NoSuchProcess):
                below = psutil.Process(process.pid).children(recursive=True)
                if below:
                    self._kill(self.dice.choice(below).pid)
        return self._until(lambda: all(where(self.notes, rank)[0] not in (0, pids[rank]) for rank in pids))


def pair(folder: Path, seed: int, most: int) -> dict[str, Any]:
    """Train ``STEPS`` steps with up to ``most`` kills and without one; what was done and whether all bits agree."""
    shutil.rmtree(folder, ignore_errors=True)
    notes, began = folder / "notes", time.monotonic()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, text=True).strip()
    notes.mkdir(parents=True)
    hook = f"callbacks=[{{target: 'bench.cycles:Where', kwargs: {{folder: '{notes}'}}}}]"
    run = Run(folder, "killed", [f"train.seed={seed}", hook])
    calm = Run(folder, "calm", [f"train.seed={seed}"])
    killer = Killer(run, notes, random.Random(seed))
    run.start()
    going = killer._until(lambda: all(where(notes, rank)[0] for rank in (0, 1)))
    while going and killer.kills.total() < most:
        going = killer.cycle()
    run.wait()
    calm.start()
    calm.wait()
    (losses, digest, once), (calm_losses, calm_digest, _) = run.result(), calm.result()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "seed": seed,
        "steps": STEPS,
        "kills": dict(killer.kills),
        "same": once and losses == calm_losses and digest == calm_digest and len(losses) == STEPS,
        "digest": digest,
        "recoveries": [
            round(e["seconds"], 2) for e in run.lines("events.jsonl") if e["event"] == "recovered"
        ],
        "seconds": round(time.monotonic() - began, 1),
    }


def page(done: list[dict[str, Any]]) -> str:
    """bench/results/cycles.md."""
    kills: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    for one in done:
        kills.update(one["kills"])
        versions[one["commit"]] += sum(one["kills"].values())
    dates = " and ".join(dict.fromkeys(one["date"] for one in done))
    seconds = [second for one in done for second in one["recoveries"]] or [0.0]
    return "\n".join([
        "# Kill and resume, again and again",
        "",
        f"{dates}, {cpu_model()}, {os.cpu_count()} shared cores (other work ran beside it),",
        f"torch {torch.__version__}, two ranks, CPU, gloo, "
        f"{sum(one['seconds'] for one in done):.0f} s:",
        "",
        f'```bash\nmake bench-cycles ARGS="--cycles {kills.total()}"\n```',
        "",
        f"**{kills.total()} kills in {len(done)} runs of {STEPS} steps; {sum(not one['same'] for one in done)} of "
        f"{len(done)} comparisons with the undisturbed run of the same seed found a difference** (the loss of",
        "every step, each logged once, and the digest of the weights). Each pair of runs is a line of",
        "[cycles.jsonl](cycles.jsonl). Versions: "
        + ", ".join(f"{commit} ({count} kills)" for commit, count in versions.items())
        + ".",
        "",
        "| killed | times |",
        "| --- | --- |",
        *(f"| {kind} | {kills[kind]} |" for kind in KINDS),
        "",
        f"Recoveries, from the fault until the step before it was done again: {len(seconds)}, median "
        f"{np.median(seconds):.1f} s, 99th percentile {np.quantile(seconds, 0.99, method='higher'):.1f} s. A kill",
        "in a restart makes the same recovery longer; after an agent's death `muster resume` starts from nothing.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=20, help="kills in all, those of the ledger included")
    parser.add_argument(
        "--folder", type=Path, default=REPO / "runs" / "cycles", help="of the pair that runs; emptied"
    )
    given = parser.parse_args()
    done = [json.loads(line) for line in LEDGER.read_text().splitlines()] if LEDGER.exists() else []
    while (so_far := sum(sum(one["kills"].values()) for one in done)) < given.cycles:
        done.append(pair(given.folder.resolve(), len(done) + 1, given.cycles - so_far))
        with LEDGER.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(done[-1], flush=True)
        RESULTS.write_text(page(done))
        if not done[-1]["same"]:
            sys.exit(f"the bits differ: compare {given.folder}/runs/cycles/killed with calm")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
