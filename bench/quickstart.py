"""The quickstart, as a bench runs it: nothing saved, nothing printed, and a callback that measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
QUIET = [
    *("experiment=quickstart", "checkpoint.every=0", "eval.every=0", "logger.every=1000"),
    *("logger.terminal=off", "logger.wandb.mode=disabled"),
]


def run(callback: str, *overrides: str) -> Any:
    """Train; what the callback (MODULE:CLASS, given a ``file``) wrote there as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        hook = f'callbacks=[{{target: "{callback}", kwargs: {{file: "{file}"}}}}]'
        muster = str(Path(sys.executable).parent / "muster")
        done = subprocess.run(
            [muster, "train", *QUIET, *overrides, f"run.root={folder}/runs", hook],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return json.loads(file.read_text())
