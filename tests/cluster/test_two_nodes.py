"""Two hosts of their own network: every launcher trains the same model, and says what is wrong with a host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from launch.chaos.hosts import Host
from tests.chaos.plugins import KillAt
from tests.cluster.conftest import RUN
from tests.command import MUSTER, REPO, SMALL, Workplace
from tests.commands.plugins import entry
from tests.commands.watch import assert_nothing_left, wait_until

NODES = ["launcher.nnodes=2", "launcher.master_addr=node-a", "launcher.nproc_per_node=1"]


def overrides(workplace: Workplace, *more: str) -> list[str]:
    return [*SMALL, f"data.path={workplace.path / 'corpus'}", *RUN, *more]


def train_on(workplace: Workplace, host: Host, *more: str) -> subprocess.Popen[str]:
    """`muster train` on one of the hosts."""
    return workplace.start(*host.command(MUSTER, "train", *overrides(workplace, *NODES, *more)))


def held(workplace: Workplace, **kwargs: object) -> list[str]:
    """Rank 0 waits in a step, once (tests/cluster/plugins.py); the file ``held`` tells."""
    return [f"callbacks=[{entry('tests.cluster.plugins:Hold', mark=str(workplace.path / 'held'), **kwargs)}]"]


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """The whole output of commands that all end well."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def assert_same(workplace: Workplace, calm: Workplace) -> None:
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()
    assert_nothing_left(workplace)


@pytest.mark.long
def test_a_killed_rank_of_the_other_node_comes_back(
    workplace: Workplace, nodes: list[Host], calm: Workplace
) -> None:
    marks = str(workplace.path / "marks")
    killer = entry(f"{KillAt.__module__}:KillAt", folder=marks, at=[[6, 1], [10, 0]], every=4)
    finish(*(train_on(workplace, host, f"callbacks=[{killer}]") for host in nodes))
    failures = [(e["rank"], e["host"], e["cause"]) for e in workplace.events("failure")]
    assert failures == [(1, "node-b", "killed by SIGKILL"), (0, "node-a", "killed by SIGKILL")]
    assert [event["step"] for event in workplace.events("resume")] == [4, 8]
    assert_same(workplace, calm)


@pytest.mark.long
def test_a_node_that_dies_is_waited_for(workplace: Workplace, nodes: list[Host], calm: Workplace) -> None:
    more = [*held(workplace, step=6, forever=True), "resilience.node_timeout_seconds=5"]
    first, second = (train_on(workplace, host, *more) for host in nodes)
    wait_until((workplace.path / "held").exists, "the middle of the run")
    second.kill()
    second.communicate()
    finish(train_on(workplace, nodes[1], *more), first)
    (failure,) = workplace.events("failure")
    assert (failure["kind"], failure["host"]) == ("node-lost", "node-b")
    assert "has not been heard" in failure["cause"]
    assert_same(workplace, calm)


def test_ctrl_c_on_any_node_saves_and_stops_all(workplace: Workplace, nodes: list[Host]) -> None:
    first, second = (train_on(workplace, host, *held(workplace, step=6)) for host in nodes)
    wait_until((workplace.path / "held").exists, "the middle of the run")
    second.terminate()
    outputs = [process.communicate(timeout=600)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [75, 75], outputs
    assert all("Stopped and saved. Go on from step 7" in output for output in outputs), outputs
    assert "SIGTERM on node 1 (node-b): saving" in outputs[0]
    assert_nothing_left(workplace)


def start_over_ssh(workplace: Workplace, host: Host, ssh_config: Path, *more: str) -> subprocess.Popen[str]:
    given = ["launcher=ssh", f"launcher.ssh_args=[-F,{ssh_config}]", *more]
    return workplace.start(*host.command(MUSTER, "train", *overrides(workplace, *given)))


def hostfile(workplace: Workplace, *lines: str) -> str:
    path = workplace.path / "hosts"
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"launcher.hostfile={path}"


def test_one_command_starts_all_nodes_and_resumes_them(
    workplace: Workplace, nodes: list[Host], ssh_config: Path, calm: Workplace
) -> None:
    file = hostfile(workplace, "node-a slots=1", "node-b slots=1  # the second")
    (output,) = finish(start_over_ssh(workplace, nodes[0], ssh_config, file, "train.steps=6"))
    assert "[node-b] Node 1: ranks 1-1" in output
    resume = [MUSTER, "resume", str(workplace.run_dir), "train.steps=12"]
    finish(workplace.start(*nodes[0].command(*resume)))
    assert [event["step"] for event in workplace.events("resume")] == [6]
    assert_same(workplace, calm)


@pytest.mark.long
def test_an_agent_that_dies_is_started_again(
    workplace: Workplace, nodes: list[Host], ssh_config: Path, calm: Workplace
) -> None:
    file = hostfile(workplace, "node-a slots=1", "node-b slots=1")
    more = [*held(workplace, step=6, forever=True), "resilience.node_timeout_seconds=5"]
    process = start_over_ssh(workplace, nodes[0], ssh_config, file, *more)
    wait_until((workplace.path / "held").exists, "the middle of the run")
    (agent,) = (pid for pid in nodes[1].processes() if "launch.remote" in psutil.Process(pid).cmdline())
    os.kill(agent, signal.SIGKILL)
    (output,) = finish(process)
    assert "[node-b] ended with code 255; starting it again" in output
    assert [(event["kind"], event["host"]) for event in workplace.events("failure")] == [
        ("node-lost", "node-b")
    ]
    assert_same(workplace, calm)


@pytest.mark.long
def test_no_agent_outlives_the_command_that_started_it(
    workplace: Workplace, nodes: list[Host], ssh_config: Path
) -> None:
    file = hostfile(workplace, "node-a", "node-b")
    process = start_over_ssh(workplace, nodes[0], ssh_config, file, *held(workplace, step=6))
    wait_until((workplace.path / "held").exists, "the middle of the run")
    process.kill()
    process.communicate()
    assert_nothing_left(workplace)
    assert workplace.events("checkpoint")[-1]["step"] == 7, "the agents saved before they went"


def refused(process: subprocess.Popen[str], *parts: str) -> None:
    """A command that ends with one clear error."""
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 2, f"exit code {process.returncode}:\n{output}"
    lines = [
        line for line in output.splitlines() if all(part in line for part in parts) and "[node-b]" not in line
    ]
    assert len(lines) == 1 and "Traceback" not in output, f"{parts} in one line of:\n{output}"


class TestWhatIsWrong:
    def test_a_hostfile(self, workplace: Workplace, nodes: list[Host], ssh_config: Path) -> None:
        for lines, said in (
            (["node-a slots=two"], "line 1 is `node-a slots=two`"),
            (["node-a", "node-a"], "line 2 names node-a again"),
            (["# none"], "names no host"),
        ):
            refused(start_over_ssh(workplace, nodes[0], ssh_config, hostfile(workplace, *lines)), said)
        refused(
            start_over_ssh(workplace, nodes[0], ssh_config, "launcher.hostfile=gone"), "gone: cannot be read"
        )

    def test_a_host_that_is_not_there(
        self, workplace: Workplace, nodes: list[Host], ssh_config: Path
    ) -> None:
        for name in ("node-c", "10.77.0.99"):
            file = hostfile(workplace, "node-a slots=1", f"{name} slots=1")
            process = start_over_ssh(workplace, nodes[0], ssh_config, file)
            refused(process, f"launcher.hostfile={name}: this host cannot be reached over ssh")
            assert_nothing_left(workplace)

    @pytest.mark.long
    def test_a_first_node_that_is_not_there(self, workplace: Workplace, nodes: list[Host]) -> None:
        cases = (("node-c", "no host has this name"), ("10.77.0.99", "10.77.0.99:29400 cannot be reached"))
        started = [
            train_on(workplace, nodes[1], f"launcher.master_addr={name}", "launcher.node_rank=1")
            for name, _ in cases
        ]
        for process, (name, why) in zip(started, cases, strict=True):
            refused(process, f"launcher.master_addr={name}: seen from node-b", why)

    def test_a_port_in_use(self, workplace: Workplace, nodes: list[Host]) -> None:
        server = subprocess.Popen(nodes[0].command("python3", "-m", "http.server", "29400"))
        try:
            wait_until(lambda: _listens(nodes[0], 29400), "the server")
            first, second = (train_on(workplace, host) for host in nodes)
            refused(first, "launcher.master_port=29400: on node-a this port is in use by process", "python3")
            refused(second, "something else than the first node's store listens at node-a:29400")
        finally:
            server.kill()
            server.wait()
        assert_nothing_left(workplace)

    def test_another_config(self, workplace: Workplace, nodes: list[Host]) -> None:
        first, second = train_on(workplace, nodes[0]), train_on(workplace, nodes[1], "optim.lr=7e-4")
        for process in (first, second):
            refused(process, "optim.lr=0.0007: node-b was started with another config than node-a")
        assert not workplace.run_dir.exists()

    def test_other_code(self, workplace: Workplace, nodes: list[Host]) -> None:
        copy = workplace.path / "copy"
        for folder in ("launch", "trainer", "parallel", "conf"):
            shutil.copytree(REPO / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        with (copy / "trainer" / "optim.py").open("a") as file:
            file.write("# changed\n")
        first = train_on(workplace, nodes[0])
        workplace.env["PYTHONPATH"] = str(copy)
        second = train_on(workplace, nodes[1])
        for process in (first, second):
            refused(
                process, "the nodes differ: muster code is ", " on node-b", "Fix: install the same on node-b"
            )
        assert_nothing_left(workplace)

    @pytest.mark.long
    def test_a_directory_that_only_one_node_sees(self, workplace: Workplace, nodes: list[Host]) -> None:
        own = f'mount -t tmpfs own {workplace.path / "runs"} && exec "$@"'
        (workplace.path / "runs").mkdir()
        apart = nodes[1].command("unshare", "--mount", "sh", "-c", own, "sh", MUSTER, "train")
        first, second = train_on(workplace, nodes[0]), workplace.start(*apart, *overrides(workplace, *NODES))
        for process in (first, second):
            refused(process, "every node must see the same run directory; node-b cannot see")
        assert_nothing_left(workplace)


def _listens(host: Host, port: int) -> bool:
    return subprocess.run(host.command("bash", "-c", f"exec 3<>/dev/tcp/localhost/{port}")).returncode == 0
