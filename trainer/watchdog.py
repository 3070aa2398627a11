"""Without an agent, a worker watches itself and its peers: it leaves, so that its launcher starts all again.

Two things end it: its own phase has passed its deadline, or a peer has told in the rendezvous store that it failed.
The second matters where connections are not broken by a death: a rank that is no neighbour of the dead one would
wait out the whole timeout of its collective.

    failed    what the first rank that failed said; there is one such key a launch
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from trainer.liveness import PHASES, Vitals

if TYPE_CHECKING:
    import torch.distributed as dist

_KEY = "failed"
_LOOK_SECONDS = 1.0
_STORE_SECONDS = 5.0
_EXIT = 1


class Watchdog:
    """Looks after one rank, from the thread that beats.

    Args:
        store: of all ranks, with a prefix of its own for this launch.
        rank: of this process.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        # A connection of its own: the training's may be waiting inside it.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._rank, self._looked = rank, time.monotonic()

    def look(self, vitals: Vitals) -> None:
        """End this process if it is stuck, or if a peer has failed."""
        if vitals.deadline and time.monotonic_ns() > vitals.deadline:
            cause = (
                f"rank {self._rank} on {socket.gethostname()} does not get on: over its deadline at {vitals}"
            )
            self.tell(cause)
            faulthandler.dump_traceback(all_threads=True)
            _leave(cause)
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        try:
            if self._store.check([_KEY]):
                told = json.loads(self._store.get(_KEY))
                _leave("" if told["is_said"] else f"rank {self._rank} leaves: {told['cause']}")
        except RuntimeError:
            # Its host has gone: at the end of a run it may be the first to leave; before, that is a failure.
            if PHASES[vitals.phase] != "finish":
                _leave(f"rank {self._rank} leaves: the process that hosts the store has ended")

    def tell(self, cause: str, is_said: bool = False) -> None:
        """Have the others leave, too. Never raises: the store's host may be gone.

        Args:
            is_said: on the terminal, once for all; the others leave without a word.
        """
        with suppress(RuntimeError):
            self._store.compare_set(_KEY, "", json.dumps({"cause": cause, "is_said": is_said}))


def _leave(cause: str) -> NoReturn:
    if cause:
        with suppress(OSError):
            print(f"muster: {cause}", file=sys.stderr, flush=True)
    os._exit(_EXIT)
