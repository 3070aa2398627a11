"""The worker: ``python -m trainer …``, one process a rank, under any launcher.

    python -m trainer --config RUN_DIR/config.yaml          what `muster` starts
    torchrun --nproc-per-node 2 -m trainer run.id=a OVERRIDES
    torchrun --nproc-per-node 2 -m trainer RUN_DIR/config.yaml

Without `muster`, rank 0 composes the config and chooses the run directory, and every rank uses its choice.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from parallel.errors import ConfigError
from trainer.process import die_with_parent
from trainer.resilience import StopSignal

EXIT_CONFIG = 2
EXIT_STOPPED = 75


def main(argv: list[str]) -> NoReturn:
    """Run one rank, and leave with its exit code."""
    under_agent = os.environ.get("MUSTER_AGENT") == "1"
    if under_agent:
        die_with_parent(int(os.environ["MUSTER_AGENT_PID"]))
    stop = StopSignal()
    stop.listen()
    # Until it is known better, rank 0 speaks: what goes wrong before is its error, told to the others.
    first_to_speak = _is_rank_0
    try:
        from trainer.launched import arrive

        arrival = arrive(argv, under_agent)
        first_to_speak = arrival.first_to_speak
        from trainer.run import run_worker

        finished = run_worker(arrival.config, arrival.run_dir, arrival.place, stop)
    except ConfigError as error:
        _report("config", str(error), EXIT_CONFIG)
        if first_to_speak():
            _say(f"muster: {error}")
        _leave(EXIT_CONFIG)
    except BaseException as error:
        _say("".join(traceback.format_exception(error)).rstrip())
        _report("crash", "".join(traceback.format_exception_only(error)).strip(), 1)
        # No collective, no destructor that waits for a peer: the others are told by our death.
        _leave(1)
    # Another launcher would take any other code for a failure. Everything is closed; without the interpreter's
    # own way out, which gives signals their default back, a late SIGTERM cannot make this look like a death.
    _leave(0 if finished or not under_agent else EXIT_STOPPED)


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _report(kind: str, cause: str, exit_code: int) -> None:
    """Tell the agent why this process ends, before its connections close."""
    path = os.environ.get("MUSTER_ERROR_FILE")
    if path is not None:
        Path(path).write_text(json.dumps({"kind": kind, "cause": cause, "exit_code": exit_code}) + "\n")


def _say(text: str) -> None:
    # The log may be on the very disk that is full.
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
