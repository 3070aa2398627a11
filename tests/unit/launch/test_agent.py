"""The agent over real processes: exits, restarts, stops, and who is blamed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_helpers import REPO, wait_for

from launch.agent import Agent, RestartBudget
from trainer.metrics.jsonl import read_events
from trainer.rundir import RunDirectory

Worker = Callable[[str], list[str]]
Make = Callable[..., Agent]


def events(run: RunDirectory, name: str) -> list[dict]:
    return [event for event in read_events(run.path / "events.jsonl") if event["event"] == name]


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody reaps has, too)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def signal_when(paths: list[Path], *numbers: int) -> threading.Thread:
    """Send this process signals once all the files are there."""

    def send() -> None:
        for path in paths:
            wait_for(path)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_all_good(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    body = """
assert os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == "2"
assert os.environ["LOCAL_RANK"] == os.environ["RANK"] and os.environ["MUSTER_AGENT"] == "1"
print("hello from", rank)
"""
    assert make_agent(worker(body)).run().code == 0
    logs = run.path / "logs" / "generation-0"
    assert [(logs / f"rank-{rank}.log").read_text() for rank in (0, 1)] == [
        "hello from 0\n",
        "hello from 1\n",
    ]
    assert not events(run, "failure")


def test_crash_then_good(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    (run.path / "metrics.jsonl").write_text('{"step": 12}\n{"step": 13}\n{"st')
    body = """
if generation == 0:
    checkpoint(10)
    mark(f"ready-{rank}")
    wait_for("ready-0"); wait_for("ready-1")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sleep_forever()
"""
    agent = make_agent(worker(body))
    assert agent.run().code == 0
    (failure,) = events(run, "failure")
    assert (failure["rank"], failure["kind"], failure["cause"]) == (1, "crash", "killed by SIGKILL")
    assert (failure["step"], failure["generation"]) == (13, 0)
    assert is_gone(int((run.path / "ready-0").read_text()))
    assert any("rank-1.log" in line for line in agent.said)  # type: ignore[attr-defined]


def test_generations_go_on_across_agents(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    command = worker('mark(f"generation-{generation}")')
    for _ in range(2):
        assert make_agent(command, num_workers=1).run().code == 0
    assert (run.path / "generation-0").exists() and (run.path / "generation-1").exists()


def test_config_error_is_said_once_and_not_retried(
    run: RunDirectory, worker: Worker, make_agent: Make
) -> None:
    outcome = make_agent(worker('die(f"data.path=x: it is empty. Fix: {rank // 2}.", exit_code=2)')).run()
    assert (outcome.code, outcome.message) == (2, "data.path=x: it is empty. Fix: 0.")
    assert not (run.path / "logs" / "generation-1").exists() and not events(run, "failure")


def test_storage_that_ends_a_run_is_no_mistake_of_the_users(
    run: RunDirectory, worker: Worker, make_agent: Make
) -> None:
    outcome = make_agent(
        worker('die("checkpoint=x: the disk is full. Fix: y.", exit_code=2, kind="storage")')
    ).run()
    assert (outcome.code, outcome.message) == (2, "checkpoint=x: the disk is full. Fix: y.")
    (stop,) = events(run, "stop")
    assert (stop["kind"], stop["reason"], stop["resumable"]) == ("storage", "storage failed", True)
    assert stop["rank"] in (0, 1) and stop["host"]


def test_gives_up_with_the_last_cause(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    outcome = make_agent(
        worker('die(f"ValueError: at {generation}") if rank == 0 else sleep_forever()'), max_restarts=2
    ).run()
    assert outcome.code == 70
    assert "after 2 restart(s)" in outcome.message and "ValueError: at 2" in outcome.message
    assert "muster resume" in outcome.message
    assert len(events(run, "failure")) == 3
    (stop,) = events(run, "stop")
    assert stop["resumable"] and "gave up" in stop["reason"]


def test_a_new_checkpoint_refills_the_budget(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    body = "checkpoint(generation + 1)\nif generation < 4: die('ValueError: again')"
    assert make_agent(worker(body), num_workers=1, max_restarts=1).run().code == 0
    assert len(events(run, "failure")) == 4


def test_restart_budget() -> None:
    budget = RestartBudget(1, newest_checkpoint=5)
    assert [budget.spend(5), budget.spend(5), budget.spend(6), budget.spend(6)] == [True, False, True, False]
    assert not RestartBudget(0, None).spend(None)


SAVES = """
def save(*_):
    checkpoint(7)
    os._exit(75)
signal.signal(signal.SIGTERM, save)
mark(f"ready-{rank}")
sleep_forever()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_saves(run: RunDirectory, worker: Worker, make_agent: Make, number: int) -> None:
    before = signal.getsignal(signal.SIGINT)  # whoever started the tests may have it ignored
    sender = signal_when([run.path / "ready-0", run.path / "ready-1"], number)
    outcome = make_agent(worker(SAVES)).run()
    sender.join()
    assert outcome.code == 75
    assert f"Stopped and saved. Go on from step 7:\n  muster resume {run.path}" == outcome.message
    assert signal.getsignal(signal.SIGINT) is before


def test_preempted_workers_stop_the_agent(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    body = SAVES.replace("sleep_forever()", "save() if rank == 0 else sleep_forever()")
    assert make_agent(worker(body)).run().code == 75


DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
mark(f"ready-{rank}")
sleep_forever()
"""


def test_second_interrupt_kills_at_once(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    ready = [run.path / "ready-0", run.path / "ready-1"]
    sender = signal_when(ready, signal.SIGINT, signal.SIGINT)
    outcome = make_agent(worker(DEAF), grace=600.0).run()
    sender.join()
    assert outcome.code == 75 and "Stopped without saving" in outcome.message
    assert all(is_gone(int(path.read_text())) for path in ready)


def test_the_grace_period_ends(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    ready = [run.path / "ready-0", run.path / "ready-1"]
    sender = signal_when(ready, signal.SIGTERM, signal.SIGTERM)
    outcome = make_agent(worker(DEAF), grace=0.5).run()
    sender.join()
    assert outcome.code == 75 and "Stopped without saving" in outcome.message
    assert all(is_gone(int(path.read_text())) for path in ready)


def test_stopped_survivors_are_killed(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    body = """
if generation == 0:
    mark(f"ready-{rank}")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for("ready-0")
    die("ValueError: bad")
"""
    assert make_agent(worker(body)).run().code == 0
    assert events(run, "failure")[0]["rank"] == 1
    assert is_gone(int((run.path / "ready-0").read_text()))


def test_witnesses_are_not_blamed(run: RunDirectory, worker: Worker, make_agent: Make) -> None:
    """Rank 0 reports its reset connection first; rank 2, the origin, dies after it was noticed."""
    body = """
if generation == 0:
    if rank == 0:
        mark("witness")
        die("RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234")
    wait_for("witness")
    if rank == 2:
        time.sleep(0.15)
        print("Traceback: the real reason", flush=True)
        die("IndexError: index out of range")
    sleep_forever()
"""
    assert make_agent(worker(body), num_workers=3).run().code == 0
    (failure,) = events(run, "failure")
    assert (failure["rank"], failure["cause"]) == (2, "IndexError: index out of range")
    assert "the real reason" in failure["evidence"]


def test_a_suspended_rank_is_blamed_for_a_timeout(
    run: RunDirectory, worker: Worker, make_agent: Make
) -> None:
    body = """
if generation == 0:
    mark(f"ready-{rank}")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for("ready-1")
    time.sleep(0.2)
    die("RuntimeError: [gloo] Timed out waiting 1000ms for recv operation to complete")
"""
    assert make_agent(worker(body)).run().code == 0
    (failure,) = events(run, "failure")
    assert (failure["rank"], failure["kind"]) == (1, "hang")


def test_no_orphans_when_the_agent_is_killed(run: RunDirectory, worker: Worker) -> None:
    command = worker('mark(f"ready-{rank}"); sleep_forever()')
    script = run.path / "agent.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "from pathlib import Path\n"
        "from launch.agent import Agent\nfrom trainer.rundir import RunDirectory\n"
        "from launch.workers import Plan\n"
        f"run = RunDirectory(Path({str(run.path)!r}))\n"
        f"Agent(run, Plan({command!r}, 2, {{}}).starter(run.path), 3, 5.0).run()\n"
    )
    agent = subprocess.Popen([sys.executable, str(script)])
    ready = [run.path / "ready-0", run.path / "ready-1"]
    for path in ready:
        wait_for(path)
    agent.kill()
    agent.wait()
    pids = [int(path.read_text()) for path in ready]
    deadline = time.monotonic() + 10
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its agent"
        time.sleep(0.01)


def test_a_full_disk_neither_silences_nor_ends_it(
    run: RunDirectory, worker: Worker, make_agent: Make, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        (run.path / "events.jsonl").symlink_to(disk / "events.jsonl")
        body = """
ballast = run_dir / "disk" / "ballast"
if generation == 0:
    try:
        with ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        die("ValueError: here")
ballast.unlink()
"""
        agent = make_agent(worker(body), num_workers=1)
        assert agent.run().code == 0
        (failure,) = events(run, "failure")
        assert failure["cause"] == "ValueError: here" and failure["generation"] == 0
        said = [line for line in agent.said if "events.jsonl" in line]  # type: ignore[attr-defined]
        assert "No space left on device" in said[0] and "is written again; 1 line(s)" in said[1]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
