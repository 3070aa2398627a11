"""What the launch tests share: the head of a small worker script, and waiting for files."""

from __future__ import annotations

import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]

PRELUDE = """\
import json, os, pathlib, signal, sys, threading, time
sys.path.insert(0, {repo!r})
from trainer.process import die_with_parent
die_with_parent(int(os.environ["MUSTER_AGENT_PID"]))
rank, generation = int(os.environ["RANK"]), int(os.environ["MUSTER_GENERATION"])
run_dir = pathlib.Path(os.environ["MUSTER_RUN_DIR"])

def wait_for(name):
    while not (run_dir / name).exists():
        time.sleep(0.01)

def mark(name):
    (run_dir / f"{{name}}.part").write_text(str(os.getpid()))
    (run_dir / f"{{name}}.part").rename(run_dir / name)

def die(cause, exit_code=1, kind="crash"):
    report = {{"kind": kind, "cause": cause, "exit_code": exit_code}}
    pathlib.Path(os.environ["MUSTER_ERROR_FILE"]).write_text(json.dumps(report) + "\\n")
    os._exit(exit_code)

def checkpoint(step):
    folder = run_dir / "checkpoints" / f"step-{{step:08d}}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("{{}}")

def sleep_forever():
    while True:
        time.sleep(60)
"""


def wait_for(path: Path) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)
