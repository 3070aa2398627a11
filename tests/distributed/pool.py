"""A pool of real worker processes that lives for the whole test session.

Each call runs one function on ranks 0 … world-1 of a fresh gloo process group; starting a process and
importing torch is paid once.
"""

from __future__ import annotations

import importlib
import multiprocessing as mp
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def _serve(rank: int, connection: Connection, store_path: str) -> None:
    import torch
    import torch.distributed as dist

    from trainer.process import die_with_parent

    parent = mp.parent_process()
    assert parent is not None and parent.pid is not None
    die_with_parent(parent.pid)
    torch.set_num_threads(1)
    while True:
        call, world, connect, module, name, args = connection.recv()
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
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Pool:
    """``run(function, world, *args)`` → the results of all ranks; a rank's exception fails the caller.

    With ``connect=False`` the function is given a store instead of a process group and makes its own.
    """

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._store = str(Path(self._folder.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        self._calls = 0
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self._store), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], world: int, *args: Any, connect: bool = True) -> list[Any]:
        self._calls += 1
        for pipe in self._pipes[:world]:
            pipe.send((self._calls, world, connect, function.__module__, function.__qualname__, args))
        answers = [pipe.recv() for pipe in self._pipes[:world]]
        for rank, (fine, answer) in enumerate(answers):
            assert fine, f"rank {rank} of {world}:\n{answer}"
        return [answer for _, answer in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()
