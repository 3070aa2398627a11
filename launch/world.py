"""What a run on several nodes is laid out for: the full layout, the one in force, the record of their changes."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from launch.relayout import describe, relayout
from parallel.errors import ConfigError
from trainer.config import RunConfig, world_size
from trainer.config_launcher import node_range, num_nodes
from trainer.metrics.jsonl import events_writer
from trainer.rundir import RunDirectory


class World:
    """The layouts of one run.

    Args:
        full: the frozen config for all nodes.

    Attributes:
        config: the one in force.
    """

    def __init__(self, run: RunDirectory, full: RunConfig) -> None:
        self.run, self.full, self.config = run, full, run.config()
        self._asked = run.asked()
        self._events = events_writer(run.path)
        self._fitting: dict[int, RunConfig] = {}

    def fit(self, nodes: int) -> RunConfig:
        """The layout for so many nodes, or for the most below that have one.

        Raises:
            ConfigError: there is none down to the fewest allowed; the message is that of the first tried.
        """
        if nodes not in self._fitting:
            error: ConfigError | None = None
            for fewer in range(nodes, node_range(self.full.launcher).least - 1, -1):
                try:
                    self._fitting[nodes] = relayout(self.full, self._asked, fewer)
                    break
                except ConfigError as wrong:
                    error = error or wrong
            else:
                assert error is not None, "the caller has enough nodes"
                raise error
        return self._fitting[nodes]

    def take(self, config: RunConfig, reason: str) -> None:
        """Put a layout in force, as the next numbered config of the run, if it is another one."""
        if num_nodes(config.launcher) == num_nodes(self.config.launcher):
            return
        before, self.config = self.config, config
        self.run.freeze(config)
        told = {"from": describe(before), "to": describe(config)}
        self.event("relayout", **told, world_size=world_size(config), reason=reason)

    def event(self, event: str, **fields: Any) -> None:
        """Write one event. A full disk must not take the supervisor down with it."""
        with suppress(OSError):
            step = self.run.last_logged_step()
            self._events.write({"time": time.time(), "step": step, "event": event, **fields})
