"""Running the real `muster` command on a small model and real text, for end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
MUSTER = str(Path(sys.executable).parent / "muster")
SMALL = [
    "device=cpu",
    "model.dim=32",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.ffn_dim=48",
    "data=text",
    "data.tokenizer.vocab_size=300",
    "train.seq_len=32",
    "train.global_batch=8",
    "train.num_threads=1",
    "eval.max_rows=16",
    "checkpoint.memory_every=0",  # a test that kills knows which checkpoint the run goes on from
    "logger.wandb.mode=disabled",
    "logger.report=false",
    "run.name=e2e",
    "run.id=a",
]
EP2 = ["launcher.nproc_per_node=2", "parallel.ep=2"]
"""Two processes with half of the experts each."""
CALM = [*EP2, "optim.schedule=constant", "train.steps=12"]
"""The run of the ``calm`` fixture; the schedule, so that the steps do not depend on how many there are."""


@dataclass
class Workplace:
    """A folder to run commands in, with a small corpus and a data cache of its own."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        corpus = self.path / "corpus"
        if not corpus.is_dir():
            corpus.mkdir()
            stdlib = Path(sysconfig.get_path("stdlib"))
            for name in (
                "argparse",
                "json/decoder",
                "json/encoder",
                "textwrap",
                "shlex",
                "csv",
                "ast",
                "glob",
            ):
                text = (stdlib / f"{name}.py").read_text()
                (corpus / f"{name.replace('/', '_')}.txt").write_text(text)

    @property
    def run_dir(self) -> Path:
        return self.path / "runs" / "e2e" / "a"

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPO), "MUSTER_CACHE": str(self.path / "cache"), **self.env}

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Begin a command; its output is merged into one pipe."""
        return subprocess.Popen(
            list(args),
            cwd=self.path,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *args: str, expect: int = 0) -> str:
        """Run a command to its end; its whole output. Asserts the exit code."""
        process = self.start(*args)
        output, _ = process.communicate(timeout=1000)
        assert process.returncode == expect, f"exit code {process.returncode}, not {expect}:\n{output}"
        return output

    def train(self, *overrides: str, expect: int = 0) -> str:
        """`muster train` of the small model."""
        return self.run(
            MUSTER, "train", *SMALL, f"data.path={self.path / 'corpus'}", *overrides, expect=expect
        )

    def resume(self, *overrides: str, run_dir: Path | None = None, expect: int = 0) -> str:
        """`muster resume` of that run."""
        return self.run(MUSTER, "resume", str(run_dir or self.run_dir), *overrides, expect=expect)

    def records(self, name: str, run_dir: Path | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl or events.jsonl."""
        text = ((run_dir or self.run_dir) / name).read_text()
        return [json.loads(line) for line in text.splitlines()]

    def events(self, kind: str, run_dir: Path | None = None) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [e for e in self.records("events.jsonl", run_dir) if e["event"] == kind]

    def losses(self, run_dir: Path | None = None) -> dict[int, float]:
        """Training loss by step; asserts that no step is logged twice."""
        records = self.records("metrics.jsonl", run_dir)
        assert len({r["step"] for r in records}) == len(records), "a step is logged twice"
        return {r["step"]: r["loss/train"] for r in records}

    def digest(self, run_dir: Path | None = None) -> str:
        """Of the weights at the end."""
        return self.events("finish", run_dir)[-1]["weights_digest"]
