"""The worker: ``python -m trainer …``, one process a rank, under any launcher.

    python -m trainer --config RUN_DIR/config.yaml          what `muster` starts
    torchrun --nproc-per-node 2 -m trainer run.id=a OVERRIDES
    torchrun --nproc-per-node 2 -m trainer RUN_DIR/config.yaml
    python -m trainer --config FOLDER/config.yaml --job     what `muster generate` and `evaluate` start

Without `muster`, rank 0 composes the config and chooses the run directory, and every rank uses its choice.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from parallel.errors import ConfigError, FatalError, NamedFailure
from parallel.exchange_check import DesyncError, describe_places_within
from trainer.liveness import Pulse
from trainer.process import die_with_parent, spin_briefly
from trainer.resilience import StopSignal

if TYPE_CHECKING:
    from trainer.launched import Arrival
    from trainer.watchdog import Watchdog

EXIT_CONFIG = 2
EXIT_GAVE_UP = 70
EXIT_STOPPED = 75
_PLACES_SECONDS = 1.0


def main(argv: list[str], parent: int | None = None) -> NoReturn:
    """Run one rank, and leave with its exit code.

    Args:
        parent: pid of the process that this one must not outlive; None: the agent, if there is one.
    """
    spin_briefly()
    under_agent = os.environ.get("MUSTER_AGENT") == "1"
    if under_agent:
        die_with_parent(int(os.environ["MUSTER_AGENT_PID"]) if parent is None else parent)
    gc.disable()  # else it goes through all that is imported again and again; run_worker turns it on
    stop = StopSignal()
    stop.listen()
    pulse = Pulse.of_agent()
    pulse.start()
    # Until it is known better, the first rank of each node speaks: to every terminal, once.
    first_to_speak = _is_first_of_node
    arrival: Arrival | None = None
    watchdog: Watchdog | None = None
    try:
        from trainer.launched import arrive

        arrival = arrive(argv, under_agent)
        first_to_speak = arrival.first_to_speak
        if not under_agent and arrival.place.world_size > 1:
            from trainer.watchdog import Watchdog

            watchdog = Watchdog(arrival.place.store, arrival.place.rank)
            pulse.watchers.append(watchdog.look)
        if "--job" in argv:
            from trainer.inference import run_job

            run_job(arrival.config, arrival.run_dir, arrival.place)
            _leave(0)
        from trainer.run import run_worker

        finished = run_worker(arrival.config, arrival.run_dir, arrival.place, stop, pulse)
    except ConfigError as error:
        # Of storage that failed on another rank, this one may know.
        more = {name: getattr(error, name, None) for name in ("rank", "host")}
        _report(error.kind, str(error), EXIT_CONFIG, **more, evidence=error.relation)
        if first_to_speak():
            _say(f"muster: {error}")
        _tell(watchdog, str(error), is_said=True)
        _leave(EXIT_CONFIG)
    except FatalError as error:
        _report(error.kind, error.cause, EXIT_GAVE_UP, rank=error.rank, host=error.host)
        if first_to_speak():
            _say(f"muster: {error}")
        _tell(watchdog, str(error), is_said=True)
        _leave(EXIT_GAVE_UP)
    except BaseException as error:
        _say("".join(traceback.format_exception(error)).rstrip())
        places = _places(error, arrival)
        if places:
            _say(places)
        cause = f"{''.join(traceback.format_exception_only(error)).strip()} {places}".strip()
        if isinstance(error, NamedFailure):
            more = {name: getattr(error, name) for name in ("rank", "host", "began", "evidence")}
            _report(error.kind, error.cause, 1, **more)
        else:
            _report(error.kind if isinstance(error, DesyncError) else "crash", cause, 1)
        _tell(watchdog, f"rank {os.environ.get('RANK', '0')} failed: {cause}")
        # No collective, no destructor that waits for a peer: the others are told by our death.
        _leave(1)
    # Another launcher would take any other code for a failure. Everything is closed; without the interpreter's
    # own way out, which gives signals their default back, a late SIGTERM cannot make this look like a death.
    _leave(0 if finished or not under_agent else EXIT_STOPPED)


def _is_first_of_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _places(error: BaseException, arrival: Arrival | None) -> str:
    """Where the ranks came to last, for an error that may come of one that is elsewhere."""
    if arrival is None or not isinstance(error, RuntimeError) or isinstance(error, DesyncError):
        return ""
    found = describe_places_within(arrival.place.store, arrival.place.world_size, _PLACES_SECONDS)
    return f"Where the ranks are: {found}" if found else ""


def _report(kind: str, cause: str, exit_code: int, **known: object) -> None:
    """Tell the agent why this process ends, before its connections close.

    Args:
        known: what else is known, None for what is not: ``rank`` and ``host`` to blame, which need not be this
            process; ``began``, ``evidence`` as of :class:`parallel.errors.NamedFailure`.
    """
    path = os.environ.get("MUSTER_ERROR_FILE")
    if path is not None:
        told = {key: value for key, value in known.items() if value is not None}
        report = {"kind": kind, "cause": cause, "exit_code": exit_code, **told}
        Path(path).write_text(json.dumps(report) + "\n")


def _tell(watchdog: Watchdog | None, cause: str, is_said: bool = False) -> None:
    """Without an agent, have the others leave, too: a connection that breaks reaches only neighbours."""
    if watchdog is not None:
        watchdog.tell(cause, is_said)


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
