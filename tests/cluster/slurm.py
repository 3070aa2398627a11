"""A real Slurm on this machine: munge, a controller and five nodes, all state in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster.hosts import cannot_run

PATIENCE_SECONDS = 300.0
"""A job's start may take a minute where other work has the cores."""
PACKAGES = "slurmctld slurmd slurm-client munge"
"""Debian's; from Slurm 22.05 on."""
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# A node's name is its address, so that names resolve as they do on a cluster.
PARTITIONS = {"a": ("127.0.0.1", "127.0.0.2", "127.0.0.3"), "b": ("127.0.0.4", "127.0.0.5")}
NODES = tuple(node for nodes in PARTITIONS.values() for node in nodes)

_CONF = """\
ClusterName=muster-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as a credential lives.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
# The nodes are one host: what it has is not what the file says.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=12
"""


def wait_until(condition: Callable[[], object], what: Callable[[], str]) -> None:
    """Poll a condition until it holds; ``what`` tells what was never seen."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what()}"
        time.sleep(0.1)


def missing() -> str | None:
    """Why a Slurm cannot be run here; None if it can."""
    if os.geteuid() != 0:
        return "needs root, as which a real Slurm is run"
    absent = [name for name in _COMMANDS if shutil.which(name) is None]
    return f"needs {', '.join(absent)}: apt-get install {PACKAGES}" if absent else None


def require_slurm() -> None:
    """A Slurm that runs here, or the test cannot be run."""
    if reason := missing():
        cannot_run(reason)


@dataclass
class Slurm:
    """The cluster. Use it as a context manager: at its end no process of it is left.

    Attributes:
        folder: for configuration, state, sockets and logs; short, since a socket's path has at most 107 bytes.
        slots: CPUs that each node claims to have.
    """

    folder: Path
    slots: int = 2
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Slurm:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        controller, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        lines = [_CONF.format(host=host, folder=self.folder, controller_port=controller)]
        for node, port in zip(NODES, ports, strict=True):
            lines.append(f"NodeName={node} NodeAddr={node} NodeHostname={host} Port={port} CPUs={self.slots}")
        for name, nodes in PARTITIONS.items():
            default = "YES" if name == "a" else "NO"
            lines.append(f"PartitionName={name} Nodes={','.join(nodes)} Default={default} State=UP")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        try:
            self._start_all()
        except BaseException:
            self._end()
            raise
        return self

    def _start_all(self) -> None:
        inside = self.folder
        options = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        files = [f"--{name}={inside / file}" for name, file in options.items()]
        self._start("munged", "--foreground", "--force", *files)
        wait_until((inside / "munge.socket").exists, self.logs)
        self._start("slurmctld", "-D", "-f", str(inside / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes(*NODES)

    def _start(self, *command: str, name: str | None = None) -> None:
        with (self.folder / f"{name or command[0]}.out").open("ab") as output:
            self._daemons[name or command[0]] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self.env()
            )

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._start("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"), name=node)

    def wait_for_nodes(self, *nodes: str) -> None:
        """Until these nodes can take a job."""

        def idle() -> bool:
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} ended: {self.logs()}"
            states = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).splitlines()
            return {f"{node} idle" for node in nodes} <= set(states)

        wait_until(idle, self.logs)

    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands find this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True) -> str:
        """A command's output."""
        done = subprocess.run(
            command, env=self.env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by name."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, CANCELLED, FAILED, …"""
        return self.job(job_id)["JobState"]

    def wait_for_state(self, job_id: str, *states: str) -> None:
        """Until the job is in one of these states."""
        wait_until(lambda: self.state(job_id) in states, lambda: f"job {job_id} in {states}\n{self.logs()}")

    def nodes_of(self, job_id: str) -> list[str]:
        """Names of the job's nodes, in the order of their ranks."""
        return self.run("scontrol", "show", "hostnames", self.job(job_id)["NodeList"]).split()

    def crash(self, node: str) -> None:
        """What a power cut does: the node's daemon and all it has started end at once; then Slurm learns of it."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        self._kill_steps(node)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def mend(self, node: str) -> None:
        """Bring a crashed node back."""
        self.start_node(node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume")
        self.wait_for_nodes(node)

    def steps(self, node: str) -> list[psutil.Process]:
        """A node's slurmstepd processes, each the parent of its part of a job step: they write the node's log."""
        log, found = str(self.folder / f"slurmd-{node}.log"), []
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if process.info["name"] == "slurmstepd" and log in (f.path for f in process.open_files()):
                    found.append(process)
        return found

    def _kill_steps(self, node: str) -> None:
        for step in self.steps(node):
            for process in (*_below(step), step):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def logs(self) -> str:
        """The ends of all logs, for a test that fails."""
        parts = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-6:])
            parts.append(f"--- {path.name}\n{tail}")
        return "\n".join(parts)

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _end(self) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user=root", check=False)
        for name in (*NODES, "slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for node in NODES:
            self._kill_steps(node)


def free_ports(number: int) -> Sequence[int]:
    """TCP ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
