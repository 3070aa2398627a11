"""How numbers and events read, in the terminal and in the report."""

from __future__ import annotations

import math
from pathlib import Path

from trainer.metrics.schema import Record, as_float


def seconds_text(seconds: float) -> str:
    """``42 s``, ``3m 10s``, ``2h 05m``, ``3d 04h``."""
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def count_text(value: float) -> str:
    """A count in three digits: ``950``, ``12.3k``, ``4.56M``, ``671B``."""
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.6k prints as 1.00M, not as 1000k.
        if abs(value) >= size * 0.9995:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def percent_text(value: float) -> str:
    """``41.2%`` of a fraction."""
    return f"{100 * value:.1f}%"


def bytes_text(value: float) -> str:
    """``950 B``, ``12.3 MB``, ``4.56 GB``."""
    text = count_text(value)
    if not text[-1].isalpha() or not math.isfinite(value):
        return f"{text} B"
    return f"{text[:-1]} {text[-1].replace('B', 'G')}B"


def event_text(event: Record) -> str:
    """What an event says, in words, without its name and step; one line."""
    kind, get = event.get("event"), event.get
    if kind == "start":
        text = (
            f"generation {get('generation')}: {get('world_size')} ranks, {get('parallel')}, {get('device')}"
        )
    elif kind == "resume":
        at = f"step {get('step')}" if get("tier") != "durable" else Path(str(get("path"))).name
        text = f"from {at} ({get('tier')})"
    elif kind == "checkpoint":
        size, stall = bytes_text(as_float(get("bytes"))), seconds_text(as_float(get("stall_seconds")))
        text = f"{Path(str(get('path'))).name}, {size}, training waited {stall}"
    elif kind == "evaluation":
        text = f"validation loss {as_float(get('loss_valid')):.3f}" + (
            ", the best so far" if get("best") else ""
        )
    elif kind == "profile":
        slowest = [f"{name} {ms:.1f} ms" for name, ms in list(get("parts_ms", {}).items())[:3]]
        text = f"{get('path')}: a step's largest parts are {', '.join(slowest)}"
    elif kind == "failure":
        text = f"{get('kind')} of rank {get('rank')} on {get('host')}: {get('cause')}"
    elif kind == "restart":
        seconds, lost = seconds_text(as_float(get("restart_seconds"))), get("lost_steps")
        text = (
            f"generation {get('generation')} after {seconds}, {lost} step{'' if lost == 1 else 's'} to redo"
        )
    elif kind == "recovered":
        parts = ("detect", "restart", "load", "recompute")
        spent = ", ".join(f"{part} {seconds_text(as_float(get(f'{part}_seconds')))}" for part in parts)
        text = f"from {get('kind')} after {seconds_text(as_float(get('seconds')))}: {spent}"
    elif kind == "rollback":
        text = f"from step {get('from_step')} to {get('step')} ({get('tier')}): {get('reason')}"
    elif kind == "stop":
        text = f"{get('reason')}" + (", resumable" if get("resumable") else "")
    elif kind in ("alarm", "cure"):
        text = f"{str(get('kind')).replace('_', ' ')}: {get('message')}"
    elif kind == "finish":
        text = f"after {seconds_text(as_float(get('seconds')))}, weights {get('weights_digest')}"
    else:
        text = " ".join(
            f"{key}={value}" for key, value in event.items() if key not in ("event", "step", "time")
        )
    return " ".join(text.split())


def event_line(event: Record) -> str:
    """An event for grep: ``failure  step 120  kind=crash rank=1 …``."""
    skip = ("event", "time", "step", "config", "sample", "run_dir", "evidence", "log", "parts_ms")
    values = [
        f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={' '.join(str(value).split())}"
        for key, value in event.items()
        if key not in skip and value is not None
    ]
    return "  ".join([str(event["event"]), f"step {event['step']}", " ".join(values)]).rstrip()
