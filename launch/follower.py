"""A node other than node 0: it joins, and does what node 0's agent orders until it is told to leave."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from launch.agent import StopRequest
from launch.cluster import TOKEN_FILE
from launch.control import Hello, Link, Order
from launch.failure import has_failed
from launch.local import check_data, worker_plan
from launch.outcome import EXIT_GAVE_UP, EXIT_STOPPED, Outcome
from launch.standby import Standby, standby_for
from launch.workers import WorkerGroup
from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.network import connect
from trainer.rundir import RunDirectory

_POLL_SECONDS = 0.05
_SHARED_SECONDS = 20.0
_ANSWER_SECONDS = 15.0
"""How long node 0 may take to answer a request to stop before there is anything to save."""


def follow(config: RunConfig, mine: Hello, console: Console) -> Outcome:
    """Join node 0's run and work for it. Returns node 0's outcome.

    Args:
        config: as this node resolved it; node 0's is the one that is run.

    Raises:
        ConfigError: node 0 cannot be reached.
    """
    launcher, timeout = config.launcher, config.resilience.node_timeout_seconds
    assert launcher.master_addr is not None

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    store = connect(
        launcher.master_addr, launcher.master_port, launcher.join_timeout_seconds, "launcher.master_addr", say
    )
    link = Link(store, mine, launcher.nnodes, timeout)
    say(f"Joined {launcher.master_addr}:{launcher.master_port}; waiting for the other nodes.")
    follower = Follower(link, f"{launcher.master_addr}:{launcher.master_port}", console)
    try:
        return follower.run()
    finally:
        follower.end()


class Follower:
    """Carries out node 0's orders.

    Args:
        link: to node 0's store.
        node_0: where that is, for messages.
    """

    def __init__(self, link: Link, node_0: str, console: Console) -> None:
        self._link, self._node_0, self._console = link, node_0, console
        self._status = link.status
        self._group: WorkerGroup | None = None
        self._config: RunConfig | None = None
        self._standby: Standby | None = None
        self._stop = StopRequest()
        self._deadline: float | None = None

    def run(self) -> Outcome:
        """Until node 0 says how it ended, or is gone."""
        outcome = self._until("start")  # not listening to signals yet: Ctrl-C just ends this
        if outcome is not None:
            return outcome
        with self._stop.listening():
            while True:
                outcome = self._turn()
                if outcome is not None:
                    return outcome
                time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """Kill what still runs here, and tell node 0."""
        if self._group is not None:
            self._group.kill()
        if self._standby is not None:
            self._standby.close()
        self._status.left = True
        self._link.tell(self._status)
        self._link.close()

    def _until(self, do: str) -> Outcome | None:
        """Carry out orders up to the first of this kind, which is left for later."""
        while True:
            if self._link.lost is not None:
                return self._lost()
            if self._link.orders:
                if self._link.orders[0].do == do and self._is_meant(self._link.orders[0]):
                    return None
                outcome = self._carry_out(self._link.orders.popleft())
                if outcome is not None:
                    return outcome
            time.sleep(_POLL_SECONDS)

    def _turn(self) -> Outcome | None:
        if self._link.lost is not None:
            return self._lost()
        while self._link.orders:
            outcome = self._carry_out(self._link.orders.popleft())
            if outcome is not None:
                return outcome
        self._watch()
        if self._stop.cause is not None and self._status.stopping is None:
            self._say(f"{self._stop.cause}: saving, then stopping. Ctrl-C again stops at once.")
            self._status.stopping = self._stop.cause
            self._deadline = time.monotonic() + _ANSWER_SECONDS
        self._link.tell(self._status)
        if self._stop.now or (self._group is None and self._deadline and time.monotonic() > self._deadline):
            return Outcome(EXIT_STOPPED, "Stopped at once.")
        return None

    def _watch(self) -> None:
        """Note how this node's workers fare."""
        if self._group is None:
            return
        status = self._status
        status.codes = self._group.codes()
        if has_failed(status.codes) and not (status.failure is not None and status.failure.certain):
            status.failure = self._group.failure()
            if status.failure is not None:
                status.failure_age = time.time() - status.failure.time

    def _is_meant(self, order: Order) -> bool:
        return str(self._link.id) in order.ranks

    def _carry_out(self, order: Order) -> Outcome | None:
        if self._is_meant(order):
            if order.do == "leave":
                self._status.orders_done += 1
                return Outcome(order.code, order.message)
            if order.do == "prepare":
                self._prepare(order)
            elif order.do == "start":
                self._start(order)
            elif order.do == "terminate" and self._group is not None:
                self._group.terminate()
            elif order.do == "kill" and self._group is not None:
                self._group.kill()
                self._watch()
                self._group = None
        self._status.orders_done += 1
        self._link.tell(self._status)
        return None

    def _prepare(self, order: Order) -> None:
        try:
            _see(Path(order.run_dir), order.token)
            self._config = RunDirectory(Path(order.run_dir)).config()
            if self._standby is None:
                self._standby = standby_for(self._config, Path(order.run_dir), self._say)
            check_data(self._config, self._console)
            if self._standby is not None:
                self._standby.prepare()  # now, when no other order can be late
            self._status.ready = True
        except ConfigError as error:
            self._status.error = [error.field, str(error.value), error.relation, error.fix]

    def _start(self, order: Order) -> None:
        assert self._config is not None
        rank = order.ranks[str(self._link.id)]
        run = RunDirectory(Path(order.run_dir))
        plan = worker_plan(run, self._config, rank, self._config.launcher.master_port)
        plan = replace(plan, standby=self._standby)
        first, last = plan.first_rank, plan.first_rank + plan.num_workers - 1
        self._say(f"Node {rank}: ranks {first}-{last} of {run.path} start (generation {order.generation}).")
        self._group = WorkerGroup(plan, run.path, order.generation, order.check_exchanges)
        self._status.generation, self._status.failure = order.generation, None
        self._status.codes = self._group.codes()

    def _lost(self) -> Outcome:
        return Outcome(
            EXIT_GAVE_UP,
            f"Node 0 ({self._node_0}) is lost: {self._link.lost}. The workers here were ended; the run goes on "
            "from its newest checkpoint when all nodes are started again.",
        )

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def _see(run_dir: Path, token: str) -> None:
    """Raise ConfigError unless this host sees in the run directory what node 0 has just written there."""
    until = time.monotonic() + _SHARED_SECONDS  # network file systems cache for a while
    while True:
        try:
            if (run_dir / TOKEN_FILE).read_text() == token:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise ConfigError(
                "run.root",
                run_dir,
                f"every node must see the same run directory; {socket.gethostname()} cannot see what node 0 wrote "
                f"to {TOKEN_FILE} there",
                "run.root=DIRECTORY on a file system that all nodes share",
            )
        time.sleep(0.2)
