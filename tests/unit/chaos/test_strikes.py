"""What a fault does to a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.commands.watch import wait_until
from trainer.liveness import STACKS_SIGNAL

HELD = """
import faulthandler, os, sys
from trainer.faults.strikes import STRIKES
from trainer.liveness import STACKS_SIGNAL
faulthandler.register(STACKS_SIGNAL)
print("ready", file=sys.stderr, flush=True)
STRIKES["gil-held"](None)
os._exit(0)
"""


def test_a_held_interpreter_is_not_freed_by_being_asked_for_its_stacks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", HELD], stderr=output)
    try:
        wait_until(lambda: "ready" in log.read_text(), "the fault")

        def stacks() -> int:
            # One signal is lost while the one before is answered, so as many as it takes.
            process.send_signal(STACKS_SIGNAL)
            return log.read_text().count("most recent call first")

        wait_until(lambda: stacks() >= 4, "its stacks")
        assert process.poll() is None
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
