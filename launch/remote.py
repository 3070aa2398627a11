"""An agent that another host's ``muster`` started over ssh (launch/ssh.py). Reads its work from standard input."""

from __future__ import annotations

import json
import os
import signal
import threading
from io import FileIO
from typing import Any

from launch.__main__ import report
from launch.outcome import Outcome
from launch.ssh import HERE


def main() -> int:
    """Do what the first line says; the exit code is that of the command."""
    print(HERE, flush=True)
    # Unbuffered: at its end Python would wait for the lock of a buffer that the thread reads.
    leash = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    work = json.loads(leash.readline())
    os.environ.update(work["env"])
    threading.Thread(target=_obey, args=[leash], name="muster-leash", daemon=True).start()
    return report(lambda: _carry_out(work))


def _carry_out(work: dict[str, Any]) -> Outcome:
    if work["command"] == "resume":
        from launch.resume import main as resume

        return resume(work["arguments"])
    from omegaconf import OmegaConf

    from launch.train import train
    from trainer.compose import to_run_config

    return train(to_run_config(OmegaConf.create(work["config"])))


def _obey(leash: FileIO) -> None:
    """Each further line is a signal for this process; the end of the input is SIGTERM."""
    for line in leash:
        os.kill(os.getpid(), signal.Signals[line.decode().strip()])
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main())
