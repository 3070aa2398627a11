"""Looking at commands from outside: what they left running, and waiting for what they do."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.command import Workplace

PATIENCE_SECONDS = 600.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll a condition until it holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)


def processes_of(workplace: Workplace) -> list[psutil.Process]:
    """Every process that was started in a workplace, by a command or by what it started.

    A process has no environment while it is being replaced by exec or is a zombie; it is then looked at again.
    """
    mark = str(workplace.path / "cache")
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MUSTER_CACHE") == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def assert_nothing_left(workplace: Workplace) -> None:
    """No process outlives the command that started it by more than a moment."""
    wait_until(lambda: not processes_of(workplace), f"the end of {processes_of(workplace)}")


def assert_one_error(output: str, *parts: str) -> None:
    """The output holds one line with all of the parts, and no traceback."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, f"{parts} once in one line, not {len(lines)} times:\n{output}"


def checkpoints_of(run_dir: Path) -> list[str]:
    """Names of the committed checkpoints, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def digest_of_checkpoint(run_dir: Path, step: int) -> str:
    """``weights_digest`` as the manifest has it."""
    manifest = run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    return str(json.loads(manifest.read_text())["weights_digest"])


def path_with_muster() -> str:
    """PATH with the folder of the installed scripts first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
