"""The standby of a node: a process that has imported everything a worker needs, and forks workers in milliseconds.

    python -m trainer.forkserver --channel FD --parent PID [--engine NAME]

An agent (launch/standby.py) starts it and speaks with it over a ``SOCK_SEQPACKET`` Unix socket, a JSON object
a message:

=========================================  ==================================================================
from the agent                             ``{"run": "worker", "argv": […], "env": {…}, "files": [name, …]}`` with a
                                           descriptor for the output and one for each name: fork a worker;
                                           ``"run": "store"``: a process that hosts the ranks' store and writes
                                           its port to the file ``MUSTER_PORT_FILE``;
                                           ``{"reap": [pid, …]}``: their exits were heard, forget them
from the server, once                      ``{"ready": true}``, or ``{"ready": false, "why": …}``: it cannot fork
from the server                            ``{"pid": …}``: forked, in the order of the requests;
                                           ``{"exit": pid, "code": …}``: it ended (−signal)
=========================================  ==================================================================

A child is a session of its own, has the requested environment and nothing else, and dies with the server; the
server dies with the agent. An exited child stays a zombie until the agent asks to reap it, so that its pid
cannot become another process's while the agent may still signal it. Nothing here computes or touches CUDA: a
forked child could use neither threads nor devices that were in use before.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from parallel.errors import ConfigError
from trainer.compose import load_frozen
from trainer.process import die_with_parent, name_process, spin_briefly

MAX_MESSAGE = 1 << 20
MAX_FILES = 8
_JOB_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Sent to whole jobs and process groups. They mean the workers and the agent, never their standby."""
_MODULES = (
    "trainer.__main__",
    "trainer.launched",
    "trainer.run",
    "parallel.engines.native",
    # What these import only when they are used.
    "torch._inductor",
    "torch.distributed.fsdp",
    "pyarrow.compute",
    "pyarrow.parquet",
    "trainer.checkpoint.resume",
)

Main = Callable[[list[str], int], NoReturn]


class ForkServer:
    """Answers one agent until the channel ends.

    Args:
        channel: to the agent.
        mains: what a child runs, by name, given its arguments and the pid of the process that it must not outlive.
        dispositions: of signals, for children.
    """

    def __init__(
        self, channel: socket.socket, mains: Mapping[str, Main], dispositions: Mapping[int, Any]
    ) -> None:
        self._channel, self._mains, self._dispositions = channel, mains, dispositions
        self._children: set[int] = set()
        self._exited: set[int] = set()

    def serve(self) -> None:
        """Fork what is asked for, and tell of exits, until the agent closes its end."""
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        channel = self._channel.fileno()
        while True:
            ready, _, _ = select.select([channel, woken], [], [])
            if woken in ready:
                os.read(woken, 1 << 12)
            self._tell_exits()
            if channel in ready:
                data, files, _, _ = socket.recv_fds(self._channel, MAX_MESSAGE, MAX_FILES)
                if not data:
                    return
                self._carry_out(json.loads(data), files)

    def _carry_out(self, request: Mapping[str, Any], files: Sequence[int]) -> None:
        for pid in request.get("reap", []):
            if pid in self._exited:
                os.waitpid(pid, 0)
                self._exited.discard(pid)
        if "run" in request:
            if "--config" in request["argv"]:
                with suppress(ConfigError):  # the worker will say so
                    load_frozen(Path(request["argv"][request["argv"].index("--config") + 1]))
            main = self._mains[request["run"]]
            self._fork(main, request["argv"], request["env"], request["files"], files)

    def _fork(
        self, main: Main, argv: list[str], env: Mapping[str, str], names: Sequence[str], files: Sequence[int]
    ) -> None:
        server = os.getpid()
        # Until the child listens to them itself: none may be lost between.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
        pid = os.fork()
        if pid == 0:
            try:
                self._become_child(argv, env, names, files)
                main(argv, server)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for file in files:
            os.close(file)
        self._children.add(pid)
        self._send({"pid": pid})

    def _become_child(
        self, argv: list[str], env: Mapping[str, str], names: Sequence[str], files: Sequence[int]
    ) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._dispositions.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])  # the others: trainer/resilience.py
        self._channel.close()
        os.setsid()
        output, *rest = files
        for target in (1, 2):
            os.dup2(output, target)
        os.close(output)
        os.environ.clear()
        os.environ.update(env)
        for name, file in zip(names, rest, strict=True):
            os.environ[name] = f"/dev/fd/{file}"
        sys.argv = ["trainer", *argv]
        name_process(f"muster-rank-{env.get('RANK', '')}")
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed()  # Python's own generator is seeded anew in every fork

    def _tell_exits(self) -> None:
        for pid in list(self._children):
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
                self._children.discard(pid)
                self._exited.add(pid)
                self._send({"exit": pid, "code": code})

    def _send(self, message: Mapping[str, Any]) -> None:
        self._channel.send(json.dumps(message).encode())


def host_store(argv: list[str], parent: int) -> NoReturn:
    """Host the store of a node's ranks until the server ends: an agent that did would have to import torch."""
    import torch.distributed as dist

    for number in _JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)
    name_process("muster-store")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    Path(os.environ["MUSTER_PORT_FILE"]).write_text(f"{store.port}\n")
    while True:
        signal.pause()


def import_all(engine: str | None) -> str | None:
    """Import what a worker needs. Returns why this process must not fork, None if it may.

    Args:
        engine: imported beside the native one. An engine's own imports may ask for devices: only where workers
            run on the CPU.
    """
    gc.disable()  # else it goes through all that is imported again and again; run_worker turns it on
    for module in (*_MODULES, *([f"parallel.engines.{engine}"] if engine else [])):
        importlib.import_module(module)
    gc.freeze()
    tasks = Path("/proc/self/task")
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir() if int(task.name) != os.getpid()]
    if names:
        return f"an import started {len(names)} thread(s) ({', '.join(sorted(set(names)))})"
    torch = sys.modules["torch"]
    return "an import initialised CUDA" if torch.cuda.is_initialized() else None


def main(argv: list[str]) -> None:
    """Serve until the agent is gone."""
    parser = argparse.ArgumentParser(prog="python -m trainer.forkserver")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of a SOCK_SEQPACKET socket")
    parser.add_argument("--parent", type=int, required=True, help="pid of the agent")
    parser.add_argument("--engine", help="engine to import beside the native one")
    args = parser.parse_args(argv)
    die_with_parent(args.parent)
    spin_briefly()
    name_process("muster-standby")
    dispositions: dict[int, Any] = {signal.SIGCHLD: signal.SIG_DFL}
    dispositions |= {number: signal.signal(number, signal.SIG_IGN) for number in _JOB_SIGNALS}
    channel = socket.socket(fileno=args.channel)
    why = import_all(args.engine)
    # An agent that leaves meanwhile is an ordinary end.
    with suppress(ConnectionResetError, BrokenPipeError):
        channel.send(json.dumps({"ready": why is None, "why": why}).encode())
        if why is None:
            from trainer.__main__ import main as work

            ForkServer(channel, {"worker": work, "store": host_store}, dispositions).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # children that still live are killed by the kernel
