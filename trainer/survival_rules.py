"""The rules of checkpoints, failures and restarts. Reads only; torch-free."""

from __future__ import annotations

from trainer.config import RunConfig, require


def check_survival(config: RunConfig) -> None:
    """Check a resolved config's sections ``checkpoint`` and ``resilience``.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    checkpoint, resilience = config.checkpoint, config.resilience
    for path, value in (
        ("checkpoint.every", checkpoint.every),
        ("checkpoint.keep_every", checkpoint.keep_every),
        ("resilience.max_restarts", resilience.max_restarts),
    ):
        require(value >= 0, path, value, "must not be negative", f"{path}=0")
    require(
        checkpoint.keep_last >= 1,
        "checkpoint.keep_last",
        checkpoint.keep_last,
        "at least one checkpoint is kept",
        "checkpoint.keep_last=1",
    )
    for path, seconds in (
        ("resilience.collective_timeout_seconds", resilience.collective_timeout_seconds),
        ("resilience.stop_grace_seconds", resilience.stop_grace_seconds),
    ):
        require(seconds > 0, path, seconds, "must be above 0 seconds", f"{path}=60")
