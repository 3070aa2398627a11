"""What the kernel says about a death: out of memory, a segmentation fault, a broken device."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

_MESSAGES = "/dev/kmsg"
_TELLING = re.compile(
    r"out of memory|oom-kill|oom_reaper|segfault|general protection|traps:|machine check|hardware error|mce:"
    r"|NVRM: Xid|I/O error|link is down",
    re.IGNORECASE,
)
_MAX_LINES = 8
_MAX_RECORD = 8192


def kernel_messages(since: float) -> str:
    """Messages that may explain a death: at most a few lines, empty where this user may not read them.

    Args:
        since: unix time of the oldest that may matter.
    """
    lines: list[str] = []
    booted = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    try:
        messages = os.open(_MESSAGES, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        while True:
            try:
                record = os.read(messages, _MAX_RECORD)
            except BrokenPipeError:  # overwritten while it was read: the next one is there
                continue
            found = _told(record.decode(errors="replace"), since - booted)
            if found is not None:
                lines.append(found)
    except OSError:  # BlockingIOError at the newest
        pass
    finally:
        os.close(messages)
    return "\n".join(lines[-_MAX_LINES:])


def _told(record: str, since: float) -> str | None:
    """``level,number,microseconds,…;text``: the text if it is new enough and tells something."""
    head, _, text = record.partition(";")
    with suppress(ValueError, IndexError):
        seconds = int(head.split(",")[2]) / 1e6
        line = text.splitlines()[0]
        if seconds >= since and _TELLING.search(line):
            return f"kernel [{seconds:.3f}]: {line}"
    return None
