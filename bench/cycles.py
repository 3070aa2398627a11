"""Does a run that is killed again and again ever end with another bit? Random kills of a small run, cycle by cycle.

    make bench-cycles [ARGS="--cycles 1000 --folder runs/cycles"]

One run on two ranks goes on in chunks of steps. While a chunk runs, processes are killed (SIGKILL) at random
moments:

    rank     a random rank, between or in steps
    all      both ranks at once
    save     a random rank while a checkpoint is being written
    start    a random process under the agent (a worker or the standby) while the group is starting again
    agent    the agent; `muster resume` goes on

After each chunk a second run, which nobody disturbs, goes to the same step, and both must have the same loss at
every step, each logged once, and the same digest of the weights. A cycle is one kill and what it takes to be
training again.
Resumable: what was done stands in the folder; the same command goes on. Writes bench/results/cycles.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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
MODEL = [
    *("device=cpu", "model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.ffn_dim=48"),
    *("layout=mixtral", "data=stdlib", "data.tokenizer.vocab_size=512", "train.seq_len=32"),
    *("train.global_batch=8", "train.num_threads=1", "optim.schedule=constant", "optim.warmup_steps=0"),
    *("launcher.nproc_per_node=2", "parallel.ep=2", "eval.every=0", "eval.sample_tokens=0"),
    *("checkpoint.every=10", "resilience.max_restarts=1000000"),
    *("logger.terminal=off", "logger.wandb.mode=disabled", "run.name=cycles"),
]
KINDS = {"rank": 8, "all": 4, "save": 4, "start": 3, "agent": 1}
"""How often each is drawn."""
CHUNK_STEPS = 300
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

    def __init__(self, folder: Path, name: str, callbacks: str) -> None:
        self.folder, self.name, self.callbacks = folder, name, callbacks
        self.run_dir = folder / "runs" / "cycles" / name
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, steps: int) -> None:
        """Train up to a step, from wherever the run is."""
        muster, more = str(Path(sys.executable).parent / "muster"), [f"train.steps={steps}", self.callbacks]
        begun = (self.run_dir / "config.yaml").exists()
        command = [muster, "resume", str(self.run_dir), *more] if begun else [
            muster, "train", *MODEL, *more, f"run.root={self.folder / 'runs'}", f"run.id={self.name}",
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

    def __init__(self, run: Run, notes: Path, dice: random.Random, steps: int) -> None:
        self.run, self.notes, self.dice, self.steps = run, notes, dice, steps
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
            self.run.start(self.steps)
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


def chunk(folder: Path, number: int, most: int) -> dict[str, Any]:
    """Kill up to ``most`` times on the way to the next chunk's end; what was done and whether all bits agree."""
    notes, steps, began = folder / f"notes-{number}", CHUNK_STEPS * (number + 1), time.monotonic()
    notes.mkdir(exist_ok=True)
    for file in notes.iterdir():
        file.unlink()
    hook = f"callbacks=[{{target: 'bench.cycles:Where', kwargs: {{folder: '{notes}'}}}}]"
    run, calm = Run(folder, "killed", hook), Run(folder, "calm", "callbacks=[]")
    # The dice of a chunk that was cut short need not fall again as they did.
    killer = Killer(run, notes, random.Random(f"{number} {time.time_ns()}"), steps)
    run.start(steps)
    going = killer._until(lambda: all(where(notes, rank)[0] for rank in (0, 1)))
    while going and killer.kills.total() < most:
        going = killer.cycle()
    run.wait()
    calm.start(steps)
    calm.wait()
    (losses, digest, once), (calm_losses, calm_digest, _) = run.result(), calm.result()
    same = once and losses == calm_losses and digest == calm_digest and len(losses) == steps
    return {"steps": steps, "kills": dict(killer.kills), "same": same, "seconds": time.monotonic() - began}


def page(folder: Path, done: list[dict[str, Any]]) -> str:
    """bench/results/cycles.md."""
    kills: Counter[str] = Counter()
    for one in done:
        kills.update(one["kills"])
    recovered = [e for e in Run(folder, "killed", "").lines("events.jsonl") if e["event"] == "recovered"]
    seconds = [event["seconds"] for event in recovered] or [0.0]
    return "\n".join([
        "# Kill and resume, again and again",
        "",
        f"{time.strftime('%Y-%m-%d')}, {cpu_model()}, {os.cpu_count()} shared cores (other work ran beside it), "
        f"torch {torch.__version__}, two ranks, CPU, gloo, {sum(one['seconds'] for one in done):.0f} s:",
        "",
        f'```bash\nmake bench-cycles ARGS="--cycles {kills.total()}"\n```',
        "",
        f"**{kills.total()} kills over {done[-1]['steps']} steps; {sum(not one['same'] for one in done)} of "
        f"{len(done)} comparisons with the undisturbed run found a difference** (loss of every step, each logged",
        "once, and digest of the weights; all steps so far are compared every time).",
        "",
        "| killed | times |",
        "| --- | --- |",
        *(f"| {kind} | {kills[kind]} |" for kind in KINDS),
        "",
        f"Recoveries, from the fault until the step before it was done again: {len(recovered)}, median "
        f"{np.median(seconds):.1f} s, 99th percentile {np.quantile(seconds, 0.99, method='higher'):.1f} s. A kill",
        "in a restart makes the same recovery longer; after an agent's death `muster resume` starts from nothing.",
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cycles", type=int, default=20, help="kills in all, those of earlier calls included"
    )
    parser.add_argument("--folder", type=Path, default=REPO / "runs" / "cycles")
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / "cycles.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    while (so_far := sum(sum(one["kills"].values()) for one in done)) < given.cycles:
        done.append(chunk(folder, len(done), given.cycles - so_far))
        with ledger.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(done[-1], flush=True)
        if not done[-1]["same"]:
            sys.exit(f"the bits differ: compare {folder}/runs/cycles/killed with calm")
    RESULTS.write_text(page(folder, done))
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
