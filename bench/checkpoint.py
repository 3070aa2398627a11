"""What one save costs: Muster's two tiers, torch.save, DCP and the hardware in turn, on the same tensors.

    make bench-checkpoint        (ARGS="--mib 256 --rounds 15")

Two processes save half of the state each. *Stall* is how long a rank's caller waits, *total* until all is durable
(or in memory, for the snapshot); of the slower rank. What training loses to a save is bench/saves.py's. Writes
bench/results/checkpoint.md.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor

from bench.here import RESULTS, measured
from bench.paired import ratio
from bench.recovery.plain import stager
from parallel.engines.base import StateSlice
from trainer.checkpoint.durable import DurableCheckpointer
from trainer.checkpoint.lease import Lease, memory_folder
from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.resume import open_checkpoint
from trainer.checkpoint.timeline import Timelines

WORLD, TENSORS, _SLOTS = 2, 32, 3
SNAPSHOT, DURABLE = "Muster, snapshot in memory", "Muster, durable"
COPY, FSYNCED = "plain copy to warm shared memory", "plain write and fsync"
DIRECT = "plain write, O_DIRECT and fsync"
Wait = Callable[[], object]


class Saver:
    """One way to save this rank's tensors.

    Attributes:
        folder: of this way, shared by the ranks; emptied between rounds by who does not do so itself.
    """

    empties = True

    def __init__(self, tensors: dict[str, Tensor], folder: Path, rank: int) -> None:
        self.tensors, self.folder, self.rank = tensors, folder, rank

    def save(self, step: int) -> Wait:
        """Begin; what it returns waits for the end."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait for what is done after the end."""

    def load(self) -> None:
        """Read the newest save into the tensors."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what is no file in the folder."""


def nothing() -> None:
    pass


class Durable(Saver):
    empties = False

    def __init__(self, tensors: dict[str, Tensor], folder: Path, rank: int) -> None:
        super().__init__(tensors, folder, rank)
        self.saver = DurableCheckpointer(
            folder, rank, WORLD, "bench", keep_last=1, keep_every=0, timeout_seconds=120
        )

    def save(self, step: int) -> Wait:
        state = {"torch_rng": torch.get_rng_state()}
        self.saver.save(step, slices_of(self.tensors), {"step": step}, state, {})
        return lambda: self._committed(step)

    def _committed(self, step: int) -> None:
        while not self.saver.committed(step):
            if self.saver.error is not None:
                raise self.saver.error
            time.sleep(0.001)

    def settle(self) -> None:
        self.saver.wait()  # until it was read back

    def load(self) -> None:
        checkpoint = open_checkpoint(newest_of(self.folder), verify=False)
        for name, tensor in self.tensors.items():
            tensor.copy_(checkpoint.read(f"model.{name}", (0,), tuple(tensor.shape)))


class Snapshot(Saver):
    empties = False

    def __init__(self, tensors: dict[str, Tensor], folder: Path, rank: int) -> None:
        super().__init__(tensors, folder, rank)
        self.rng, self.timelines = {"torch_rng": torch.get_rng_state()}, Timelines(starts=[0])
        self.memory = MemoryTier(Lease(memory_folder(None, folder), folder), rank, WORLD, 0, "bench", 3)
        self.memory.claim("here", slices_of(tensors), self.rng)
        self.memory.prepare(torch.device("cpu"))
        for step in range(-_SLOTS, 0):
            self.save(step)()

    def save(self, step: int) -> Wait:
        self.memory.snapshot(step, slices_of(self.tensors), self.rng, {"step": step}, self.timelines)
        return self.memory.wait

    def close(self) -> None:
        self.memory.remove()


class TorchSave(Saver):
    def save(self, step: int) -> Wait:
        torch.save(self.tensors, self.folder / f"rank-{self.rank}.pt")
        return nothing

    def load(self) -> None:
        found = torch.load(self.folder / f"rank-{self.rank}.pt", mmap=False)
        for name, tensor in self.tensors.items():
            tensor.copy_(found[name])


class Dcp(Saver):
    def __init__(self, tensors: dict[str, Tensor], folder: Path, rank: int) -> None:
        super().__init__({f"{rank}.{name}": tensor for name, tensor in tensors.items()}, folder, rank)

    def save(self, step: int) -> Wait:
        dcp.save(self.tensors, checkpoint_id=str(self.folder / f"step-{step}"))
        return nothing

    def load(self) -> None:
        dcp.load(self.tensors, checkpoint_id=str(newest_of(self.folder)))


class DcpAsync(Dcp):
    """With its stager, shared memory and a process group of its own: the fastest of its ways."""

    def __init__(self, tensors: dict[str, Tensor], folder: Path, rank: int) -> None:
        super().__init__(tensors, folder, rank)
        self.group, self.stager = dist.new_group(backend="gloo"), stager()

    def save(self, step: int) -> Wait:
        made: Any = dcp.async_save(
            self.tensors,
            checkpoint_id=str(self.folder / f"step-{step}"),
            process_group=self.group,
            async_stager=self.stager,
        )
        future = getattr(made, "upload_completion", made)
        return lambda: future.result()


class Copy(Saver):
    def __init__(self, tensors: dict[str, Tensor], folder: Path, rank: int) -> None:
        super().__init__(tensors, folder, rank)
        self.path = Path("/dev/shm") / f"bench-checkpoint-{os.getpid()}"
        with self.path.open("w+b") as file:
            file.truncate(sum(tensor.nbytes for tensor in tensors.values()))
            self.target = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.float32).zero_()

    def save(self, step: int) -> Wait:
        at = 0
        for tensor in self.tensors.values():
            self.target[at : at + tensor.numel()].copy_(tensor)
            at += tensor.numel()
        return nothing

    def close(self) -> None:
        self.path.unlink()


class Fsynced(Saver):
    flags = 0

    def save(self, step: int) -> Wait:
        file = os.open(self.folder / f"rank-{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | self.flags)
        for tensor in self.tensors.values():
            os.write(file, tensor.numpy().data)
        os.fsync(file)
        os.close(file)
        return nothing


class Direct(Fsynced):
    """Past the page cache; tensors of whole blocks that begin on a block's border."""

    flags = os.O_DIRECT


WAYS: dict[str, type[Saver]] = {
    SNAPSHOT: Snapshot,
    DURABLE: Durable,
    "torch.save, not fsynced": TorchSave,
    "DCP save": Dcp,
    "DCP async_save": DcpAsync,
    COPY: Copy,
    FSYNCED: Fsynced,
    DIRECT: Direct,
}


def slices_of(tensors: dict[str, Tensor]) -> list[StateSlice]:
    return [
        StateSlice(f"model.{name}", tuple(tensor.shape), (0,), tensor, owner=True)
        for name, tensor in tensors.items()
    ]


def newest_of(folder: Path) -> Path:
    return max(folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))


def aligned(num_bytes: int) -> Tensor:
    """fp32, at the beginning of a page."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.float32)


def serve(rank: int, folder: str, mib: int, rounds: int) -> None:
    """One rank; rank 0 writes down what all measured."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(minutes=5))
    size = (mib << 20) // (WORLD * TENSORS)
    # Others' names differ by rank: what a layout gives to one rank alone.
    tensors = {f"{rank}-{index}": aligned(size).normal_() for index in range(TENSORS)}
    ways: dict[str, Saver] = {}
    for name, way in WAYS.items():
        own = Path(folder, str(len(ways)))
        own.mkdir(exist_ok=True)
        dist.barrier()
        ways[name] = way(tensors, own, rank)
    lines: dict[str, dict[str, list[float]]] = {
        name: {"stall": [], "total": [], "settled": [], "load": []} for name in ways
    }
    for step in range(1 + rounds):
        order = list(ways)
        for name in order[step % len(order) :] + order[: step % len(order)]:
            way, line = ways[name], lines[name]
            stall, total, settled = _timed_save(way, step + 1)
            load = _timed_load(way)
            if step:
                line["stall"].append(stall)
                line["total"].append(total)
                line["settled"].append(settled)
                line["load"].append(load)
    sizes = {name: _disk_bytes(way.folder) for name, way in ways.items()}
    for way in ways.values():
        way.close()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps({"lines": lines, "bytes": sizes}))
    dist.barrier()
    os._exit(0)  # DCP's stager leaves processes that an exit would wait for


def _timed_save(way: Saver, step: int) -> tuple[float, float, float]:
    """Stall, total, and until nothing more is done, of the slower rank. What is on the disk from before has been
    written by then."""
    if way.empties and way.rank == 0:
        for old in way.folder.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    if way.rank == 0:
        os.sync()
    dist.barrier()
    began = time.perf_counter()
    wait = way.save(step)
    stall = time.perf_counter() - began
    wait()
    total = time.perf_counter() - began
    way.settle()
    return _slower(stall), _slower(total), _slower(time.perf_counter() - began)


def _timed_load(way: Saver) -> float:
    if type(way).load is Saver.load:
        return 0.0
    wanted = {name: tensor[0].item() for name, tensor in way.tensors.items()}
    for tensor in way.tensors.values():
        tensor[0] = 0.0
    dist.barrier()
    began = time.perf_counter()
    way.load()
    seconds = time.perf_counter() - began
    assert {name: tensor[0].item() for name, tensor in way.tensors.items()} == wanted
    return _slower(seconds)


def _slower(seconds: float) -> float:
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return round(float(most), 5)


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def page(head: str, found: dict[str, Any], mib: int, rounds: int) -> str:
    """All of it."""
    lines, sizes = found["lines"], found["bytes"]
    stall, durable = lines[SNAPSHOT]["stall"], lines[DURABLE]["total"]
    parts = [
        "# What one save costs\n",
        head,
        f"{mib} MiB over {WORLD} processes, {rounds} rounds after one that is not counted, in turn; medians, of\n"
        "the slower rank. Files are removed and the disk is idle before each save; what is loaded is in the page\n"
        "cache (Muster compares checksums of it). Every slot of the snapshots was written before.\n"
        "A durable save of Muster's is done with its commit; then every rank reads its shard back from the disk:\n"
        f"{median(lines[DURABLE]['settled']):.2f} s after the beginning nothing is left to do.\n"
        "What training loses to a save, beside DCP: [saves.md](saves.md).\n",
        "| | stall, s | until it is done, s | MB/s | load, s | MB on disk |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, line in lines.items():
        total, load = median(line["total"]), median(line["load"])
        cells = [f"{median(line['stall']):.3f}", f"{total:.3f}", f"{(mib << 20) / 1e6 / total:.0f}"]
        cells += [f"{load:.3f}" if load else "", f"{sizes[name] / 1e6:.0f}" if sizes[name] else ""]
        parts.append(f"| {name} | {' | '.join(cells)} |")
    copies, written = lines[COPY]["total"], lines[FSYNCED]["total"]
    parts += [
        "",
        "Median over rounds of the ratio of two times of one round, and its 95 % interval (bootstrap):\n",
        "| | ratio | to reach |",
        "| --- | --- | --- |",
        f"| stall of a snapshot ÷ {COPY} | {_ratio(stall, copies)} | 1.3 at most |",
        f"| stall of a durable save ÷ {COPY} | {_ratio(lines[DURABLE]['stall'], copies)} | |",
        f"| {FSYNCED} ÷ Muster's durable save: its share of the disk's rate | {_ratio(written, durable)} "
        "| 0.8 at least |",
        f"| {DIRECT} ÷ Muster's durable save | {_ratio(lines[DIRECT]['total'], durable)} | |",
    ]
    parts += [
        f"| Muster's durable save ÷ {name}, until it is done | {_ratio(durable, lines[name]['total'])} | |"
        for name in ("DCP save", "DCP async_save", "torch.save, not fsynced")
    ]
    raw = [json.dumps({"name": name, **line}) for name, line in lines.items()]
    parts += ["", "Raw, seconds of each round:\n", "```json", *raw, "```"]
    return "\n".join(parts) + "\n"


def _ratio(these: list[float], those: list[float]) -> str:
    middle, low, high = ratio(these, those)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def run(mib: int, rounds: int) -> dict[str, Any]:
    folder = tempfile.mkdtemp(prefix="muster-checkpoint-")
    try:
        mp.spawn(serve, (folder, mib, rounds), nprocs=WORLD)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
        return found
    finally:
        shutil.rmtree(folder)


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mib", type=int, default=1024, help="of both processes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    args = parser.parse_args(given)
    if args.rounds < 1 or args.mib < 1:
        sys.exit("--mib, --rounds: at least 1")
    words = f' ARGS="{" ".join(given)}"' if given else ""
    head = measured(f"make bench-checkpoint{words}")
    text = page(head, run(args.mib, args.rounds), args.mib, args.rounds)
    print(text.partition("\nRaw")[0])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "checkpoint.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
