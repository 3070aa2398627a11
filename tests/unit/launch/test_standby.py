"""The standby over its real processes: forks, exits, signals, and its own death."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from launch.standby import ForkedProcess, Standby, StandbyLost
from launch.workers import Plan, WorkerGroup, worker_command
from tests.commands.watch import wait_until
from tests.configs import composed
from trainer.compose import freeze


@pytest.fixture(scope="module")
def standby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standby]:
    log = tmp_path_factory.mktemp("standby") / "logs" / "standby.log"
    said: list[str] = []
    with Standby({"OMP_NUM_THREADS": "1"}, None, log, said.append) as made:
        assert made.prepare(), log.read_text()
        assert said == []
        yield made
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def fork(standby: Standby, folder: Path, port: int) -> ForkedProcess:
    """A real worker whose config is missing; with port 1, where nobody listens, it waits for the store."""
    env = {
        **os.environ,
        "RANK": "3",
        "WORLD_SIZE": "4",
        "MUSTER_AGENT": "1",
        "MUSTER_AGENT_PID": str(os.getpid()),
    }
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"MUSTER_RUN_DIR": str(folder), "MUSTER_GENERATION": "0"}
    with (folder / "log").open("ab") as log, (folder / "report").open("w+b") as report:
        command = ["--config", str(folder / "config.yaml")]
        return standby.fork(command, env, log, {"MUSTER_ERROR_FILE": report.fileno()})


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether a process handles a signal."""
    (caught,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_forked_worker_is_one_like_any_other(
    standby: Standby, store: dist.TCPStore, tmp_path: Path
) -> None:
    process = fork(standby, tmp_path, store.port)
    assert process.wait() == 2
    report = json.loads((tmp_path / "report").read_text())
    assert report["kind"] == "config" and "there is no such file" in report["cause"]
    assert psutil.pid_exists(process.pid), "its pid is its own until it is forgotten"
    standby.forget([process])
    wait_until(lambda: not psutil.pid_exists(process.pid), "the end of the zombie")


def test_signals_reach_the_workers_and_not_the_standby(standby: Standby, tmp_path: Path) -> None:
    first, second = (fork(standby, tmp_path, port=1) for _ in range(2))
    server = psutil.Process(first.pid).ppid()
    for process in (first, second):
        wait_until(lambda pid=process.pid: os.getsid(pid) == pid, "a session of its own")  # type: ignore[misc]
    comm = Path(f"/proc/{first.pid}/comm")
    wait_until(lambda: comm.read_text() == "muster-rank-3\n", "its name")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(server, number)
    wait_until(lambda: listens(first.pid, signal.SIGTERM), "the worker's own handler")
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGSTOP)
    assert first.poll() is None and second.poll() is None
    for process, number in ((first, signal.SIGKILL), (second, signal.SIGABRT)):
        process.send_signal(number)
        assert process.wait() == -number
    standby.forget([first, second])
    assert fork(standby, tmp_path, port=1).poll() is None, "it still forks"


def test_workers_die_with_the_standby_and_another_takes_its_place(standby: Standby, tmp_path: Path) -> None:
    process = fork(standby, tmp_path, port=1)
    server = psutil.Process(process.pid).parent()
    assert server is not None
    server.kill()
    assert process.wait() == -signal.SIGKILL and process.orphaned
    with pytest.raises(StandbyLost, match="no worker was forked"):
        fork(standby, tmp_path, port=1)
    assert not standby.prepare(), "this generation is started without it"
    assert standby.prepare()
    last = fork(standby, tmp_path, port=1)
    standby.close()
    wait_until(lambda: not psutil.pid_exists(last.pid), "the end of what a closed standby has forked")


def test_a_store_that_dies_is_replaced_and_the_standby_takes_it_along(tmp_path: Path) -> None:
    with Standby({"OMP_NUM_THREADS": "1"}, None, tmp_path / "log", print) as standby:
        assert standby.prepare(), (tmp_path / "log").read_text()
        port = standby.store_port()
        assert standby.store_port() == port, "it outlives generations"
        client = dist.TCPStore("127.0.0.1", port, is_master=False)
        client.set("key", "value")
        assert client.get("key") == b"value"
        (server,) = (child for child in psutil.Process().children() if child.name() == "muster-standby")
        (store,) = server.children()
        assert store.name() == "muster-store"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            store.send_signal(number)  # they mean the workers
        client.set("key", "again")
        assert client.get("key") == b"again"
        store.kill()
        wait_until(lambda: standby.store_port() != port, "another store")
        (last,) = (child for child in server.children() if child.name() == "muster-store")
    wait_until(lambda: not last.is_running(), "the end of the store")


def test_workers_that_wait_for_each_other_do_not_outlive_their_store(tmp_path: Path) -> None:
    freeze(
        composed("device=cpu", "train.num_threads=1", "launcher.nproc_per_node=2"), tmp_path / "config.yaml"
    )
    with Standby({"OMP_NUM_THREADS": "1"}, None, tmp_path / "log", print) as standby:
        plan = Plan(worker_command(tmp_path / "config.yaml"), 1, {}, world_size=2, standby=standby)
        ports = []
        for generation in (0, 1):
            with WorkerGroup(plan, tmp_path, generation) as group:
                ports.append(standby.store_port())
                (worker,) = group.workers
                wait_until(lambda worker=worker: worker.vitals().beat, "a worker that waits for rank 1")
                assert group.codes() == [None] and group.failure() is None
                (store,) = (
                    p for p in psutil.Process().children(recursive=True) if p.name() == "muster-store"
                )
                store.kill()
                wait_until(lambda group=group: group.codes() != [None], "the end of the worker")
                failure = group.failure()
                assert failure is not None and failure.certain and failure.kind == "crash"
                assert failure.cause == "the process that hosts the store ended (SIGKILL)"
        assert ports[0] != ports[1]


@pytest.mark.timeout(120)
def test_a_standby_that_still_imports_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.standby._LEAVE_SECONDS", 3600.0)
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nprint('imports', flush=True)\ntime.sleep(3600)\n"
    )
    log = tmp_path / "log"
    with Standby({"PYTHONPATH": str(tmp_path)}, None, log, print):
        wait_until(lambda: log.exists() and "imports" in log.read_text(), "the server")
        (server,) = (
            child
            for child in psutil.Process().children()
            if "trainer.forkserver" in child.cmdline() and str(tmp_path) in child.environ()["PYTHONPATH"]
        )
    assert not server.is_running()
