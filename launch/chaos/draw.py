"""Which faults strike, when and where: a pure function of the config."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.chaos.table import Row, read_table
from parallel.errors import ConfigError
from trainer.config import RunConfig, world_size
from trainer.faults.kinds import KINDS, Fault, check_kind, read_schedule

STEPS_APART = 4
"""Steps a fault has to itself: it is over before the next one strikes."""
_MARGIN = 4
"""Steps without faults, at the begin and at the end together."""


def plan(config: RunConfig) -> list[Fault]:
    """The faults of a resolved config, in the order of their steps.

    Raises:
        ConfigError: there is nothing to inject, or too few steps to inject it in.
    """
    chaos, steps = config.chaos, config.train.steps
    if chaos.schedule is not None:
        faults = read_schedule(Path(chaos.schedule), world_size(config), steps)
        if not faults:
            raise ConfigError("chaos.schedule", chaos.schedule, "is empty", "one JSON line a fault")
        in_order = sorted((_stood_in(fault, config) for fault in faults), key=lambda fault: fault.step)
        faults = _shrinking(in_order, config)
        _check_ranks(faults, config)
        return faults
    chance = random.Random(chaos.seed)
    if chaos.kinds:
        for kind in chaos.kinds:
            check_kind(kind, "chaos.kinds", kind)
        pairs = [("", kind) for kind in chaos.kinds]
    else:
        pairs = draw(read_table(config.cluster), chaos.faults, chance)
    faults = [_stood_in(Fault(0, 0, kind, "", component), config) for component, kind in pairs]
    needed = STEPS_APART * len(faults) + _MARGIN
    if steps < needed:
        raise ConfigError(
            "train.steps",
            steps,
            f"{len(faults)} faults, {STEPS_APART} steps apart, take at least {needed} steps",
            f"train.steps={needed}, or fewer of them (chaos.faults={max(1, (steps - _MARGIN) // STEPS_APART)})",
        )
    if not chaos.kinds:
        faults = _waiting_inside(faults, steps, config.checkpoint.every)
    faults = _shrinking(faults, config)
    at = place(len(faults), steps, chance)
    return [
        replace(fault, step=step, rank=chance.randrange(world), point=chance.choice(KINDS[fault.kind].points))
        for fault, step, world in zip(faults, at, worlds(faults, config), strict=True)
    ]


def num_gone(faults: Sequence[Fault]) -> int:
    """How many nodes do not come back."""
    return sum(fault.kind == "node-gone" for fault in faults)


def worlds(faults: Sequence[Fault], config: RunConfig) -> list[int]:
    """How many ranks there are when each fault strikes, in order: every node-gone takes those of a node."""
    gone = itertools.accumulate((fault.kind == "node-gone" for fault in faults), initial=0)
    return [world_size(config) - nodes * config.launcher.nproc_per_node for nodes in gone][: len(faults)]


def _shrinking(faults: list[Fault], config: RunConfig) -> list[Fault]:
    """The faults, of which the first ``chaos.nodes_gone`` lost nodes do not come back.

    Raises:
        ConfigError: fewer are lost, or none is left at the end.
    """
    number, nodes = config.chaos.nodes_gone, config.chaos.nodes
    lost = [index for index, fault in enumerate(faults) if fault.kind == "node-lost"]
    if not 0 <= number <= len(lost):
        relation = f"{len(lost)} node(s) are lost by these faults"
        raise ConfigError("chaos.nodes_gone", number, relation, f"chaos.nodes_gone={len(lost)}")
    for index in lost[:number]:
        faults[index] = replace(faults[index], kind="node-gone")
    gone = num_gone(faults)
    if gone and gone >= nodes:
        relation = f"{gone} of {nodes} nodes do not come back: none is left"
        raise ConfigError("chaos.nodes", nodes, relation, f"chaos.nodes={gone + 1}")
    return faults


def _check_ranks(faults: Sequence[Fault], config: RunConfig) -> None:
    for fault, world in zip(faults, worlds(faults, config), strict=True):
        if fault.rank >= world:
            relation = f"rank {fault.rank} at step {fault.step}: {world} rank(s) are left by then"
            raise ConfigError("chaos.schedule", config.chaos.schedule, relation, "a rank below that")


def draw(rows: Sequence[Row], number: int, chance: random.Random) -> list[tuple[str, str]]:
    """``number`` (component, kind) pairs of a table, shuffled; 0: all of its interruptions.

    Stratified: shares of components and, within one, of kinds are as in the table up to rounding; where there is
    room for each component, each is there.

    Raises:
        ConfigError: the table has not so many.
    """
    counts = {row.component: row.count for row in rows}
    total = sum(counts.values())
    if not 0 <= number <= total:
        relation = f"the table has {total} interruptions"
        raise ConfigError("chaos.faults", number, relation, f"a number from 1 to {total}, or 0 for all")
    pairs = []
    for component, share in apportion(counts, number or total, chance).items():
        kinds = next(row.kinds for row in rows if row.component == component)
        for kind, times in apportion(kinds, share, chance).items():
            pairs += [(component, kind)] * times
    chance.shuffle(pairs)
    return pairs


def apportion(weights: Mapping[str, float], number: int, chance: random.Random) -> dict[str, int]:
    """``number`` things over names in proportion to weights; one each first if that is possible.

    The rest goes by largest remainder. With fewer things than names, names are drawn by weight.
    """
    names = sorted(weights)
    if number < len(names):
        chosen: list[str] = []
        while len(chosen) < number:
            left = [name for name in names if name not in chosen]
            chosen += chance.choices(left, [weights[name] for name in left])
        return {name: int(name in chosen) for name in names}
    spare, total = number - len(names), sum(weights.values())
    # What a name should have beyond the one it gets anyway.
    wanted = {name: max(0.0, weights[name] * number / total - 1) for name in names}
    scale = spare / sum(wanted.values()) if spare else 0.0
    shares = {name: 1 + int(wanted[name] * scale + 1e-9) for name in names}
    by_remainder = sorted(names, key=lambda name: (shares[name] - 1 - wanted[name] * scale, name))
    for name in by_remainder[: number - sum(shares.values())]:
        shares[name] += 1
    return shares


def place(number: int, steps: int, chance: random.Random) -> list[int]:
    """Steps at which faults strike, spread evenly, each somewhere in its own part of the run."""
    span = steps - _MARGIN
    bounds = [_MARGIN // 2 + index * span // number for index in range(number + 1)]
    return [low + chance.randint(0, high - low - STEPS_APART) for low, high in itertools.pairwise(bounds)]


def _waiting_inside(faults: list[Fault], steps: int, every: int) -> list[Fault]:
    """Faults that wait for checkpoints where some are before and after them, the others around.

    Raises:
        ConfigError: there are no such steps.
    """
    waiting = [fault for fault in faults if KINDS[fault.kind].waits]
    others = [fault for fault in faults if not KINDS[fault.kind].waits]
    if not waiting:
        return faults
    if not 0 < 4 * every <= steps:
        raise ConfigError(
            "checkpoint.every",
            every,
            f"{waiting[0].kind} harms checkpoints while others are there: a run of {steps} steps has too few",
            f"checkpoint.every={max(1, steps // 8)}",
        )
    first = min(len(others), -(-len(faults) * 2 * every // steps))
    last = min(len(others) - first, -(-len(faults) * every // steps))
    inside = waiting + others[first : len(others) - last]
    random.Random(len(inside)).shuffle(inside)
    return [*others[:first], *inside, *others[len(others) - last :]]


def _stood_in(fault: Fault, config: RunConfig) -> Fault:
    """The fault, or what stands for it where this run has not what it harms."""
    kind = KINDS[fault.kind]
    has = {"nodes": config.chaos.nodes > 0, "snapshots": config.checkpoint.memory_every != 0, "": True}
    if has[kind.needs]:
        return fault
    other = KINDS[kind.stand_in]
    point = fault.point if fault.point in ("", *other.points) else other.points[0]
    return replace(fault, kind=kind.stand_in, point=point, instead_of=fault.kind)
