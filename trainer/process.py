"""What a worker's process is: tied to the life of who started it, named, and sparing with the cores."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h
_NAME_BYTES = 15


def die_with_parent(expected_parent_pid: int) -> None:
    """Ask the kernel to SIGKILL this process when its parent dies, however the parent dies.

    Call it first thing in a worker. A parent that died before the call is noticed by its pid, so there is
    no window in which an orphan survives. The signal follows the parent's *thread*: the parent must start
    workers from a thread that lives as long as it does. Outside Linux this only checks the pid.

    Args:
        expected_parent_pid: the pid of the process that must outlive this one.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != expected_parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def name_process(name: str) -> None:
    """What ``ps`` and ``top`` call this process; cut to 15 bytes. Only Linux knows such names."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:_NAME_BYTES], 0, 0, 0)


def spin_briefly() -> None:
    """Let OpenMP's threads go to sleep 0.2 ms after their work, unless the environment says how they wait.

    Call it before torch is imported. Left alone, GNU's go on for some 6 ms, on cores that the threads of experts
    (:mod:`trainer.moe.by_expert`) need by then: a step of the quickstart takes 13 % longer.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
