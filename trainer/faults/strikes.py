"""How each kind of fault does its harm. Only ``muster chaos`` calls anything here."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from parallel.engines.base import StateSlice

if TYPE_CHECKING:
    from trainer.checkpoint.slots import Slot
    from trainer.faults.inject import Scene

Strike = Callable[["Scene"], None]

_HOLE_BYTES = 1 << 16
_SLOW_STEPS = 3


class InjectedFault(RuntimeError):
    """Raised where a fault is an exception of the program."""


# -- a process dies ---------------------------------------------------------------------------------------


def kill_self() -> None:
    """SIGKILL; does not return."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _segfault(scene: Scene) -> None:
    ctypes.string_at(0)


def _bus_error(scene: Scene) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * mmap.PAGESIZE)
        view = mmap.mmap(file.fileno(), 0)
        file.truncate(0)
        view[mmap.PAGESIZE]


def _exit(scene: Scene) -> None:
    os._exit(1)


def _kill_all(scene: Scene) -> None:
    here = socket.gethostname()
    for path in scene.injector.folder.glob("rank-*.json"):
        other = json.loads(path.read_text())
        alike = (other["host"], other["generation"]) == (here, scene.injector.generation)
        if alike and other["pid"] != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(other["pid"], signal.SIGKILL)
    kill_self()


def _signal(number: int) -> Strike:
    return lambda scene: os.kill(os.getpid(), number)


def _signal_agent(number: int) -> Strike:
    def strike(scene: Scene) -> None:
        os.kill(int(os.environ["MUSTER_AGENT_PID"]), number)

    return strike


# -- a process raises -------------------------------------------------------------------------------------


def _raise(scene: Scene) -> None:
    raise InjectedFault(f"injected at {scene.fault.point} of step {scene.step + 1}")


def _loader_raises(scene: Scene) -> None:
    raise OSError(errno.EIO, "injected: a shard of the data cannot be read")


def _out_of_memory(scene: Scene) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    bytearray(1 << 40)


# -- a process hangs or is slow ---------------------------------------------------------------------------


def _deadlock(scene: Scene) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _hold_interpreter(scene: Scene) -> None:
    libc = ctypes.PyDLL(None)  # which, unlike CDLL, does not let go of the interpreter's lock
    mutex = ctypes.create_string_buffer(128)  # zeros are a mutex that may be taken once
    while True:  # signals do not end it, as they would a sleep: a worker is asked for its stacks by one
        libc.pthread_mutex_lock(mutex)


def _stuck_collective(scene: Scene) -> None:
    dist.barrier(group=scene.trainer.control)


def _slow(scene: Scene) -> None:
    scene.injector.slow_until = scene.step + _SLOW_STEPS


def _throttle(scene: Scene) -> None:
    pid = os.getpid()
    cycle = f"kill -STOP {pid} && sleep 0.1; kill -CONT {pid} && sleep 0.1 || exit 0"
    subprocess.Popen(["sh", "-c", f"for i in 1 2 3 4 5 6 7 8 9 10; do {cycle}; done 2>/dev/null"])


# -- connections ------------------------------------------------------------------------------------------


def _cut(to_store: bool) -> Strike:
    def strike(scene: Scene) -> None:
        store_port = int(os.environ["MASTER_PORT"])
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):  # one that was closed meanwhile, or is no connection
                if not str(entry.readlink()).startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(entry.name))) as other:
                    internet = other.family in (socket.AF_INET, socket.AF_INET6)
                    if internet and (other.getpeername()[1] == store_port) == to_store:
                        other.shutdown(socket.SHUT_RDWR)

    return strike


def _await_end(scene: Scene) -> None:
    """``muster chaos`` sees the mark and destroys the node."""
    while True:
        signal.pause()


def _link_flap(scene: Scene) -> None:
    script = "ip link set eth0 down && sleep 2; ip link set eth0 up"
    subprocess.Popen(["sh", "-c", script], start_new_session=True)


# -- numbers ----------------------------------------------------------------------------------------------


def flip_bit(tensor: torch.Tensor, element: int) -> None:
    """Flip the highest bit of an element's fraction, in place: a wrong number that looks like any other."""
    width = {4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()]
    bit = {torch.float32: 22, torch.bfloat16: 6, torch.float16: 9, torch.float64: 51}[tensor.dtype]
    at = torch.unravel_index(torch.tensor(element % tensor.numel()), tensor.shape)
    one = tensor[tuple(slice(int(i), int(i) + 1) for i in at)]  # rows may have gaps between them
    one.view(width).bitwise_xor_(1 << bit)


def _largest(slices: Iterable[StateSlice], prefix: str) -> torch.Tensor:
    """The largest of this rank's own tensors under a prefix, made of floating-point numbers."""
    own = [s.tensor for s in slices if s.owner and s.name.startswith(prefix) and s.tensor.is_floating_point()]
    return max(own, key=lambda tensor: tensor.numel())


def _nan_gradient(scene: Scene) -> None:
    tensor = _largest(scene.trainer.engine.named_gradients(), "")
    tensor.view(-1)[scene.index % tensor.numel()] = float("nan")


def _flip_state(prefix: str) -> Strike:
    def strike(scene: Scene) -> None:
        tensor = _largest(scene.trainer.engine.named_state(), prefix)
        with torch.no_grad():
            flip_bit(tensor, 7919 * (scene.index + 1))

    return strike


def _flip_received(scene: Scene) -> None:
    rows = scene.facts["rows"]
    if rows.numel():
        with torch.no_grad():
            flip_bit(rows.detach(), 7919 * (scene.index + 1))


# -- storage ----------------------------------------------------------------------------------------------


def _storage_fails(number: int) -> Strike:
    def strike(scene: Scene) -> None:
        raise OSError(number, os.strerror(number), str(scene.facts["path"]))

    return strike


def _committed(scene: Scene) -> list[Path]:
    directory = scene.trainer.checkpoints.directory
    return sorted(path.parent for path in directory.glob("step-*/manifest.json"))


def ready(scene: Scene) -> bool:
    """Whether there is what the fault would harm: of two checkpoints, or of two snapshots, one may be damaged."""
    if scene.fault.kind == "flipped-snapshot":
        return len(_sealed(scene)) > 1
    return not scene.fault.kind.endswith("-shard") or len(_committed(scene)) > 1


def _sealed(scene: Scene) -> list[Slot]:
    """This rank's snapshots, the newest last."""
    memory = scene.trainer.memory
    if memory is None:
        return []
    memory.wait()
    known = [
        (slot.header.step, slot) for slot in (*memory.slots, *memory.log.slots) if slot.header is not None
    ]
    return [slot for _, slot in sorted(known, key=lambda pair: pair[0])]


def _damage(harm: Callable[[Path], None]) -> Strike:
    def strike(scene: Scene) -> None:
        shards = sorted(_committed(scene)[-1].glob("*.safetensors"))
        harm(shards[scene.index % len(shards)])
        if scene.trainer.memory is not None:  # power goes: what memory held is not there to go on from
            for path in scene.trainer.memory.lease.folder.glob("rank-*.slot-*"):
                path.unlink()
        _kill_all(scene)

    return strike


def flip_file(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def _flip_snapshot(scene: Scene) -> None:
    flip_file(_sealed(scene)[-1].path)
    kill_self()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _hole(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(max(0, size // 2 - _HOLE_BYTES // 2))
        file.write(bytes(min(size, _HOLE_BYTES)))


STRIKES: dict[str, Strike] = {
    "kill": lambda scene: kill_self(),
    "segfault": _segfault,
    "bus-error": _bus_error,
    "illegal-instruction": _signal(signal.SIGILL),
    "abort": lambda scene: os.abort(),
    "exit": _exit,
    "kill-all": _kill_all,
    "kill-twice": lambda scene: kill_self(),
    "agent-kill": _signal_agent(signal.SIGKILL),
    "exception": _raise,
    "loader-exception": _loader_raises,
    "out-of-memory": _out_of_memory,
    "suspend": _signal(signal.SIGSTOP),
    "deadlock": _deadlock,
    "gil-held": _hold_interpreter,
    "stuck-collective": _stuck_collective,
    "slow": _slow,
    "throttle": _throttle,
    "connection-reset": _cut(to_store=False),
    "store-cut": _cut(to_store=True),
    "nan-gradient": _nan_gradient,
    "bit-flip-weights": _flip_state("model."),
    "bit-flip-optimizer": _flip_state("optim."),
    "bit-flip-exchange": _flip_received,
    "disk-full": _storage_fails(errno.ENOSPC),
    "read-only": _storage_fails(errno.EROFS),
    "io-error": _storage_fails(errno.EIO),
    "slow-storage": lambda scene: time.sleep(2.0),
    "kill-in-save": lambda scene: kill_self(),
    "flipped-shard": _damage(flip_file),
    "truncated-shard": _damage(_truncate),
    "holed-shard": _damage(_hole),
    "missing-shard": _damage(lambda path: path.unlink()),
    "flipped-snapshot": _flip_snapshot,
    "kill-in-snapshot": lambda scene: kill_self(),
    "preempt": _signal_agent(signal.SIGTERM),
    "time-limit": _signal(signal.SIGUSR1),
    "node-lost": _await_end,
    "node-gone": _await_end,
    "link-flap": _link_flap,
}
