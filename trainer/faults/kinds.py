"""The faults that can be injected, and the file that says which one strikes where. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError

POINTS = {
    "batch": "the step begins: the samples are read",
    "forward": "before the forward pass",
    "exchange": "between dispatch and combine, in the first MoE layer",
    "backward": "before the backward pass",
    "before_optimizer": "gradients are summed, not yet clipped",
    "after_optimizer": "weights are updated, the step is not yet counted",
    "save": "a checkpoint is being written: the rank's shard is, nothing is committed",
    "snapshot": "a snapshot is copied to memory that outlives the rank, and not sealed",
    "load": "state has been read, the first step has not begun",
}
"""Where a fault may strike → what happens there."""

STEP_POINTS = ("batch", "forward", "exchange", "backward", "before_optimizer", "after_optimizer")


@dataclass(frozen=True)
class Kind:
    """A fault.

    Attributes:
        what: its mechanism, for people.
        points: where it may strike; a schedule that names none gets the first.
        ends: the command may end of it, as it should; `muster chaos` then starts it again, as an operator or a
            scheduler would.
        needs: ``nodes`` or ``snapshots``, where it harms these.
        stand_in: the kind that stands for it in a run that has none.
        waits: it strikes at its step or at the first chance after it (a save, two checkpoints on the disk).
    """

    what: str
    points: tuple[str, ...] = STEP_POINTS
    ends: bool = False
    needs: str = ""
    stand_in: str = ""
    waits: bool = False


_SAVE = ("save",)
_BATCH = ("batch",)

KINDS: dict[str, Kind] = {
    # a process dies
    "kill": Kind("SIGKILL to the rank"),
    "segfault": Kind("a read at address 0: SIGSEGV"),
    "bus-error": Kind("a read past the end of a mapped file: SIGBUS, as an uncorrectable memory error gives"),
    "illegal-instruction": Kind("SIGILL to the rank, as a broken core gives"),
    "abort": Kind("abort() in native code: SIGABRT"),
    "exit": Kind("a library ends the process: exit code 1 without a word"),
    "kill-all": Kind("SIGKILL to every rank of the machine at once"),
    "kill-twice": Kind("SIGKILL to the rank, and again while its replacement loads"),
    "agent-kill": Kind("SIGKILL to the agent, whose workers die with it", ends=True),
    # a process raises
    "exception": Kind("a RuntimeError in the model's code"),
    "loader-exception": Kind("an OSError while samples are read", _BATCH),
    "out-of-memory": Kind("memory limited to what is in use, then a large allocation: MemoryError"),
    # a process hangs
    "suspend": Kind("SIGSTOP to the rank"),
    "deadlock": Kind("a lock taken twice: the rank waits for itself, other threads go on"),
    "gil-held": Kind("a native call that never returns and holds the interpreter: no thread goes on"),
    "stuck-collective": Kind("the rank enters a collective that no other joins"),
    # a process is slow
    "slow": Kind("three steps take half a second longer on the rank", ("forward",)),
    "throttle": Kind("the rank is stopped and continued for two seconds, as a hot chip is clocked down"),
    # connections
    "connection-reset": Kind("the rank's connections to other ranks are shut down"),
    "store-cut": Kind("the rank's connections to the rendezvous store are shut down"),
    # numbers
    "nan-gradient": Kind("one element of a gradient becomes NaN", ("before_optimizer",)),
    "bit-flip-weights": Kind("one bit of a weight flips after the optimizer step", ("after_optimizer",)),
    "bit-flip-optimizer": Kind("one bit of the optimizer's state flips after its step", ("after_optimizer",)),
    "bit-flip-exchange": Kind("one bit of the rows that an expert received flips", ("exchange",)),
    # storage
    "disk-full": Kind("writing a checkpoint gives ENOSPC", _SAVE, ends=True, waits=True),
    "read-only": Kind("writing a checkpoint gives EROFS", _SAVE, ends=True, waits=True),
    "io-error": Kind("writing a checkpoint gives EIO", _SAVE, ends=True, waits=True),
    "slow-storage": Kind("writing a checkpoint takes two seconds longer", _SAVE, waits=True),
    "kill-in-save": Kind(
        "SIGKILL to the rank with its shard written and nothing committed", _SAVE, waits=True
    ),
    "flipped-shard": Kind("a bit flips in the newest checkpoint; power goes", _BATCH, waits=True),
    "truncated-shard": Kind("the newest checkpoint loses half of a shard; power goes", _BATCH, waits=True),
    "holed-shard": Kind("zeros in the middle of a shard; power goes", _BATCH, waits=True),
    "missing-shard": Kind("a shard of the newest checkpoint is gone; power goes", _BATCH, waits=True),
    # memory that outlives workers
    "flipped-snapshot": Kind(
        "a bit flips in the rank's newest snapshot in memory; the rank dies",
        _BATCH,
        waits=True,
        needs="snapshots",
        stand_in="kill",
    ),
    "kill-in-snapshot": Kind(
        "SIGKILL to the rank with a snapshot copied and not sealed",
        ("snapshot",),
        waits=True,
        needs="snapshots",
        stand_in="kill",
    ),
    # somebody asks
    "preempt": Kind("SIGTERM to the agent: saved, left, started again", ends=True),
    "time-limit": Kind("SIGUSR1 to one worker, as Slurm sends ahead of a limit", ends=True),
    # a node
    "node-lost": Kind(
        "every process of a node is killed, its memory is gone, a new node comes",
        ends=True,
        needs="nodes",
        stand_in="kill-all",
    ),
    "node-gone": Kind(
        "every process of a node is killed, its memory is gone, nobody comes in its place",
        ends=True,
        needs="nodes",
        stand_in="kill-all",
    ),
    "link-flap": Kind(
        "the link of a node is down for two seconds", needs="nodes", stand_in="connection-reset"
    ),
}
"""Name → kind. Each has a mechanism of its own (trainer/faults/strikes.py)."""


@dataclass(frozen=True)
class Fault:
    """One line of a schedule.

    Attributes:
        step: optimizer steps done when it strikes; 0 is the first step.
        component: of the failure table that it was drawn for; empty if it was not drawn.
        instead_of: the kind that was drawn, where this one stands in for it.
    """

    step: int
    rank: int
    kind: str
    point: str
    component: str = ""
    instead_of: str = ""


def read_schedule(path: Path, world_size: int | None = None, steps: int | None = None) -> list[Fault]:
    """The faults of a file: JSON lines {step, rank, kind, point}; without point, the kind's first.

    Args:
        world_size, steps: of the run; None: not checked.

    Raises:
        ConfigError: it cannot be read; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "chaos.schedule", path, f"cannot be read: {error}", "a file of JSON lines"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    faults = [_parse(f"{path}:{number}", line) for number, line in numbered]
    for (number, _), fault in zip(numbered, faults, strict=True):
        for name, value, limit in (("rank", fault.rank, world_size), ("step", fault.step, steps)):
            if value < 0 or (limit is not None and value >= limit):
                relation = f"{name} is {value}; the run has {name}s 0 to {limit - 1 if limit else '…'}"
                raise ConfigError("chaos.schedule", f"{path}:{number}", relation, f"a {name} of the run")
    return faults


def write_schedule(faults: Sequence[Fault], path: Path) -> None:
    """Write what :func:`read_schedule` reads."""
    path.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in faults), encoding="utf-8")


def _parse(place: str, line: str) -> Fault:
    example = '{"step": 12, "rank": 0, "kind": "kill", "point": "forward"}'
    try:
        found: Any = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError("chaos.schedule", place, "is not a JSON object", f"a line such as {example}")
    unknown = sorted(set(found) - set(Fault.__dataclass_fields__))
    missing = sorted({"step", "rank", "kind"} - set(found))
    if unknown or missing:
        what = f"has a field {unknown[0]}, which faults have not" if unknown else f"has no {missing[0]}"
        raise ConfigError("chaos.schedule", place, what, f"a line such as {example}")
    for name in ("step", "rank"):
        if not isinstance(found[name], int):
            raise ConfigError("chaos.schedule", place, f"{name} is no whole number", f"such as {example}")
    kind = check_kind(str(found["kind"]), "chaos.schedule", place)
    point = found.setdefault("point", kind.points[0])
    if point not in kind.points:
        relation = f"{found['kind']} cannot strike at {point}"
        raise ConfigError("chaos.schedule", place, relation, f"one of {', '.join(kind.points)}")
    return Fault(**found)


def check_kind(name: str, field: str, value: object) -> Kind:
    """The kind of a name. Raises ConfigError, about ``field=value``, if there is none."""
    if name not in KINDS:
        near = get_close_matches(name, KINDS, n=1, cutoff=0.4)
        fix = f"did you mean {near[0]}" if near else f"one of {', '.join(KINDS)}"
        raise ConfigError(field, value, f"there is no kind of fault {name!r}", fix)
    return KINDS[name]
