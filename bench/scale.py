"""More ranks: a small run over 1 to 8 processes, and what 16,384 ranks cost each of them to set up.

    make bench-scale             (ARGS="--worlds 64 4096")

First, real training over gloo with as many tokens a rank, a thread each: tokens per second and bytes between ranks.
Then, with PyTorch's fake process group, one rank of a large world builds all its meshes and groups in a fresh
process: seconds, memory, groups. Writes bench/results/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.here import RESULTS, measured
from bench.step import batch_of
from parallel.dims import ParallelDims
from parallel.mesh import build_meshes
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.compose import compose
from trainer.config import Machine, RunConfig, parallel_dims, resolve
from trainer.models.init import initialise
from trainer.step import Stepper

ROWS = 4
"""A rank and step, of 256 tokens."""
RUNS = {1: 1, 2: 2, 4: 4, 8: 4}
"""World → ep."""
LAYOUTS = {
    "dp_shard": {},
    "ep 8": {"ep": 8},
    "dp_replicate 8, ep 8": {"dp_replicate": 8, "ep": 8},
    "dp_shard 64, ep 64": {"dp_replicate": -64, "ep": 64},
}
"""Degrees; a negative dp_replicate: what leaves so many ranks to dp_shard."""
WORLDS = (64, 512, 4096, 16384)


def config_of(world: int) -> RunConfig:
    overrides = ["experiment=quickstart", "device=cpu", "model.vocab_size=4096", "model.num_layers=2"]
    overrides += [f"launcher.nproc_per_node={world}", f"parallel.ep={RUNS[world]}"]
    overrides += [f"train.global_batch={ROWS * world}", "data.respect_documents=false"]
    return resolve(compose(overrides), Machine.here())


def train(rank: int, world: int, folder: str, rounds: int) -> None:
    """One rank of a real run; rank 0 writes down the median step of the slowest rank and its bytes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    config, device = config_of(world), torch.device("cpu")
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, device)
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, device, wants_stop=lambda: False)
    seconds, sent = [], 0
    share = config_of(1)  # a rank's own rows
    for step in range(2 + rounds):
        batch = batch_of(share, step * world + rank)
        dist.barrier()
        began = time.perf_counter()
        totals = stepper.train_step(step, [batch]).totals
        seconds.append(time.perf_counter() - began)
        sent = int(totals.sent_L.sum())
    slowest = torch.tensor(seconds[2:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        found = {"world": world, "ep": RUNS[world], "ms": [round(1000 * s, 2) for s in slowest.tolist()]}
        Path(folder, "found.json").write_text(json.dumps({**found, "bytes_a_rank": sent // world}))
    dist.destroy_process_group()


def run_world(world: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (world, folder, rounds), nprocs=world)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
        return found


def dims_of(world: int, layout: str) -> ParallelDims:
    degrees = dict(LAYOUTS[layout])
    if degrees.get("dp_replicate", 1) < 0:
        degrees["dp_replicate"] = world // -degrees["dp_replicate"]
    return ParallelDims.create(world, **degrees)


def set_up(world: int, rank: int, layout: str) -> dict[str, Any]:
    """Build the meshes of one rank in this process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    dims = dims_of(world, layout)
    before, began = _memory(), time.perf_counter()
    meshes = build_meshes(dims, "cpu")
    seconds, grown = time.perf_counter() - began, _memory() - before
    groups = dist.distributed_c10d._world.pg_map
    sizes = sorted(dist.get_world_size(group) for group in groups)
    assert meshes.ep is not None
    about = {"world": world, "rank": rank, "layout": layout}
    return {**about, "seconds": round(seconds, 3), "mb": round(grown / 1e6, 1), "groups": sizes}


def _memory() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def in_a_fresh_process(world: int, rank: int, layout: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.scale", "--one", str(world), str(rank), layout]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(head: str, runs: Sequence[dict[str, Any]], fakes: Sequence[dict[str, Any]], rounds: int) -> str:
    raw = [json.dumps(line) for line in (*runs, *fakes)]
    parts = ["# More ranks\n", head, _explained(rounds), runs_table(runs), fakes_table(fakes)]
    parts.append("\n".join(["Raw:\n", "```json", *raw, "```"]))
    return "\n".join(parts) + "\n"


def _explained(rounds: int) -> str:
    return f"""## Real processes

The quickstart's model with 2 layers; {rounds} steps after two that are not counted, {ROWS} rows of 256 tokens a
rank, a thread each, gloo. More ranks than cores share these, so that tokens per second in all is what can be
compared: **of the cores** is that ÷ (tokens per second of one rank · the ranks that have a core of their own).
"""


def runs_table(runs: Sequence[dict[str, Any]]) -> str:
    cores = len(os.sched_getaffinity(0))
    lines = ["| ranks | ep | ms a step | tokens/s | of the cores | all-to-all MB a rank and step |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    alone = next((run for run in runs if run["world"] == 1), None)
    for run in runs:
        rate = ROWS * 256 * run["world"] / median(run["ms"]) * 1000
        share = ""
        if alone is not None:
            share = f"{median(alone['ms']) / median(run['ms']) * run['world'] / min(cores, run['world']):.2f}"
        cells = [run["world"], run["ep"], f"{median(run['ms']):.0f}", f"{rate:.0f}", share]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} | {run['bytes_a_rank'] / 1e6:.1f} |")
    return "\n".join(lines) + "\n"


def fakes_table(fakes: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## Large worlds\n",
        "One rank, all meshes and groups of a layout, PyTorch's fake process group (nothing is sent), each line a",
        "process of its own. **groups**: sizes of those that the rank is a member of, the world's among them.\n",
        "| ranks | layout | rank | seconds | MB | groups |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in fakes:
        sizes = ", ".join(str(size) for size in line["groups"])
        cells = [line["world"], line["layout"], line["rank"], line["seconds"], line["mb"], sizes]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--worlds", type=int, nargs="*", default=WORLDS, help="of the fake process group")
    parser.add_argument("--one", nargs=3, metavar=("WORLD", "RANK", "LAYOUT"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    args = parser.parse_args(given)
    if args.one:
        print(json.dumps(set_up(int(args.one[0]), int(args.one[1]), args.one[2])))
        return 0
    words = f' ARGS="{" ".join(given)}"' if given else ""
    head = measured(f"make bench-scale{words}")
    runs = [run_world(world, args.rounds) for world in RUNS]
    print(runs_table(runs), flush=True)
    fakes = [
        in_a_fresh_process(world, rank, layout)
        for layout in LAYOUTS
        for world in args.worlds
        for rank in (0, world // 2 + 1)
    ]
    print(fakes_table(fakes), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scale.md").write_text(page(head, runs, fakes, args.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
