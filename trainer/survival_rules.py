"""The rules of checkpoints, failures and restarts. Reads only; torch-free."""

from __future__ import annotations

from trainer.config import RunConfig, require
from trainer.config_survival import GuardConfig


def check_survival(config: RunConfig) -> None:
    """Check a resolved config's sections ``checkpoint``, ``resilience``, ``guard`` and ``chaos``.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    checkpoint, resilience = config.checkpoint, config.resilience
    _check_guard(config.guard)
    for path, value in (
        ("checkpoint.every", checkpoint.every),
        ("checkpoint.keep_every", checkpoint.keep_every),
        ("resilience.max_restarts", resilience.max_restarts),
        ("chaos.faults", config.chaos.faults),
        ("resilience.host_failures", resilience.host_failures),
        ("chaos.nodes", config.chaos.nodes),
    ):
        require(value >= 0, path, value, "must not be negative", f"{path}=0")
    require(
        checkpoint.max_failed_saves >= 1,
        "checkpoint.max_failed_saves",
        checkpoint.max_failed_saves,
        "the run stops at this many failed saves in a row, so it must be at least 1",
        "checkpoint.max_failed_saves=1",
    )
    require(
        checkpoint.keep_last >= 1,
        "checkpoint.keep_last",
        checkpoint.keep_last,
        "at least one checkpoint is kept",
        "checkpoint.keep_last=1",
    )
    require(
        checkpoint.memory_every >= -1,
        "checkpoint.memory_every",
        checkpoint.memory_every,
        "steps, 0 for no snapshots in memory, or -1 for as often as costs 2 % of the time",
        "checkpoint.memory_every=-1",
    )
    peer, memory = checkpoint.peer_every, checkpoint.memory_every
    require(
        peer in (-1, 0) or (peer > 0 and memory > 0 and peer % memory == 0),
        "checkpoint.peer_every",
        peer,
        f"snapshots are copied, and checkpoint.memory_every={memory} takes them: -1 (each), 0 (none) or, "
        "where that is above 0, a multiple of it",
        "checkpoint.peer_every=-1",
    )
    require(
        checkpoint.memory_slots >= 3,
        "checkpoint.memory_slots",
        checkpoint.memory_slots,
        "while a rank overwrites one slot, two others must hold what all ranks have",
        "checkpoint.memory_slots=3",
    )
    require(
        checkpoint.memory_log >= 0,
        "checkpoint.memory_log",
        checkpoint.memory_log,
        "snapshots of gradients after each of everything, 0 for none",
        "checkpoint.memory_log=3",
    )
    for path, seconds in (
        ("resilience.collective_timeout_seconds", resilience.collective_timeout_seconds),
        ("resilience.stop_grace_seconds", resilience.stop_grace_seconds),
        ("resilience.step_deadline_seconds", resilience.step_deadline_seconds),
        ("resilience.straggler_seconds", resilience.straggler_seconds),
    ):
        require(seconds > 0, path, seconds, "must be above 0 seconds", f"{path}=60")
    require(
        resilience.heartbeat_seconds >= 1,
        "resilience.heartbeat_seconds",
        resilience.heartbeat_seconds,
        "a worker beats four times a second, and may miss some on a busy machine",
        "resilience.heartbeat_seconds=3",
    )
    require(
        resilience.deadline_factor >= 2,
        "resilience.deadline_factor",
        resilience.deadline_factor,
        "a part of a step may take at least twice as long as usual",
        "resilience.deadline_factor=10",
    )
    factor = resilience.straggler_factor
    require(
        factor == 0 or factor >= 1.2,
        "resilience.straggler_factor",
        factor,
        "ranks that are alike differ by less than 1.2 times",
        "resilience.straggler_factor=2, or 0 for none",
    )


def _check_guard(guard: GuardConfig) -> None:
    for field, least in (
        ("max_skips", 0),
        ("max_skips_in_a_row", 0),
        ("digest_every", 0),
        ("replica_every", 0),
        ("replay_every", 0),
        ("max_rollbacks", 0),
        ("spike_window", 10),
    ):
        value = getattr(guard, field)
        require(value >= least, f"guard.{field}", value, f"must be {least} or more", f"guard.{field}={least}")
    require(
        guard.spike_sigma == 0 or guard.spike_sigma >= 3,
        "guard.spike_sigma",
        guard.spike_sigma,
        "below 3 standard deviations ordinary losses are spikes",
        "guard.spike_sigma=10, or 0 for none",
    )
    require(
        guard.spike_sigma == 0 or guard.non_finite,
        "guard.spike_sigma",
        guard.spike_sigma,
        "a spike is redone and stepped over like a step that is not finite",
        "guard.non_finite=true, or guard.spike_sigma=0",
    )
