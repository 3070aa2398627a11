"""A pool of real worker processes.

Each call runs one function on ranks 0 … world-1 of a fresh gloo process group. Workers are forked from a server
that has imported torch: that is paid once, however many pools there are.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing as mp
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_MAX_THREADS = 32
"""A group of gloo that is never let go has a thread that wakes up 100 times a second: 8 groups took 0.9 % of a core
from everyone, and there are four workers to each process of the tests."""


def _serve(rank: int, connection: Connection, store_path: str) -> None:
    import torch
    import torch.distributed as dist

    from trainer.process import die_with_parent

    die_with_parent(os.getppid())  # the server, which goes with the tests
    torch.set_num_threads(1)
    num_modules = 0
    while True:
        call, world, connect, module, name, args = connection.recv()
        result: Any = None
        try:
            store = dist.PrefixStore(f"call-{call}", dist.FileStore(store_path, -1))
            function = getattr(importlib.import_module(module), name)
            if connect:
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
                )
                result = function(rank, world, *args)
            else:
                result = function(rank, world, store, *args)
            fine = True
        except BaseException:
            fine, result = False, traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        function = None
        gc.collect()  # models hold their groups in cycles, and each group of gloo runs three threads
        if len(sys.modules) > num_modules:
            gc.freeze()  # modules stay: the next collection need not go through all of torch again
            num_modules = len(sys.modules)
        connection.send((fine, result, len(list(Path("/proc/self/task").iterdir()))))


class Pool:
    """``run(function, world, *args)`` → the results of all ranks; a rank's exception fails the caller.

    With ``connect=False`` the function is given a store instead of a process group and makes its own.
    Workers in which a library has left many threads behind (groups that it never lets go) are replaced.
    """

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._store = str(Path(self._folder.name) / "store")
        self._size, self._calls = size, 0
        self._start()

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preload"])
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self._store), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], world: int, *args: Any, connect: bool = True) -> list[Any]:
        assert threading.current_thread() is threading.main_thread(), (
            "workers die with the thread that made them"
        )
        self._calls += 1
        for pipe in self._pipes[:world]:
            pipe.send((self._calls, world, connect, function.__module__, function.__qualname__, args))
        answers = [pipe.recv() for pipe in self._pipes[:world]]
        if max(num_threads for *_, num_threads in answers) > _MAX_THREADS:
            self._stop()
            self._start()
        for rank, (fine, answer, _) in enumerate(answers):
            assert fine, f"rank {rank} of {world}:\n{answer}"
        return [answer for _, answer, _ in answers]

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()
