"""A run directory and an agent over small real worker processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_helpers import PRELUDE, REPO

from launch.agent import Agent
from launch.workers import Plan
from trainer.rundir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def worker(tmp_path: Path) -> Callable[[str], list[str]]:
    """Turns a worker's body into a command."""

    def build(body: str) -> list[str]:
        script = tmp_path / "worker.py"
        script.write_text(PRELUDE.format(repo=str(REPO)) + body)
        return [sys.executable, str(script)]

    return build


@pytest.fixture
def make_agent(run: RunDirectory) -> Callable[..., Agent]:
    """An agent over ``num_workers`` of a command; what it says is kept in ``agent.said``."""

    def build(
        command: list[str],
        num_workers: int = 2,
        max_restarts: int = 3,
        grace: float = 20.0,
        heartbeat: float = 3.0,
    ) -> Agent:
        said: list[str] = []
        start = Plan(command, num_workers, env={}, heartbeat_seconds=heartbeat).starter(run.path)
        agent = Agent(run, start, max_restarts, grace, say=said.append)
        agent.said = said  # type: ignore[attr-defined]
        return agent

    return build
