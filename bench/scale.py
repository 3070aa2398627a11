"""More ranks: a small run over 1 to 8 processes, and what 16,384 ranks cost each of them to set up.

    make bench-scale             (ARGS="--worlds 64 4096")

First, real training over gloo with as many tokens a rank, a thread each: tokens per second and bytes between ranks,
beside the same ranks that exchange nothing, and beside what they exchange alone.
Then, with PyTorch's fake process group, one rank of a large world builds all its meshes and groups in a fresh
process: seconds, memory, groups. Writes bench/results/scale.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
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
REPEATS = 15


def config_of(world: int) -> RunConfig:
    overrides = ["experiment=quickstart", "device=cpu", "model.vocab_size=4096", "model.num_layers=2"]
    overrides += [f"launcher.nproc_per_node={world}", f"parallel.ep={RUNS[world]}"]
    overrides += [f"train.global_batch={ROWS * world}", "data.respect_documents=false"]
    return resolve(compose(overrides), Machine.here())


class Ranks:
    """How the ranks of a run meet before a step, whatever they exchange in it."""

    def __init__(self, folder: str, world: int) -> None:
        self.store, self.world, self.count = dist.FileStore(f"{folder}/meet", world), world, 0

    def meet(self) -> None:
        self.count += self.world
        self.store.add("met", 1)
        while self.store.add("met", 0) < self.count:
            time.sleep(0.0005)


def train(rank: int, world: int, folder: str, rounds: int, alone: bool) -> None:
    """One rank of a real run; writes down its steps' seconds, and what its collectives alone take.

    Args:
        alone: it trains by itself, beside the others.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # names that PyTorch 2.13 has changed, and 2.11 has not
    size, place = (1, 0) if alone else (world, rank)
    store = dist.FileStore(f"{folder}/store-{rank if alone else 0}", size)
    dist.init_process_group("gloo", store=store, rank=place, world_size=size, timeout=timedelta(minutes=5))
    config, device = config_of(size), torch.device("cpu")
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, device)
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, device, wants_stop=lambda: False)
    ranks, share = Ranks(folder, world), config_of(1)
    seconds, sent = [], 0
    for step in range(2 + rounds):
        batch = batch_of(share, step * world + rank)
        ranks.meet()
        began = time.perf_counter()
        totals = stepper.train_step(step, [batch]).totals
        seconds.append(time.perf_counter() - began)
        sent = int(totals.sent_L.sum()) // size
    found = {"seconds": seconds[2:], "sent": sent, "exchange": 0.0, "weights": 0.0}
    if size > 1:
        assert meshes.ep is not None
        group = meshes.ep
        found["exchange"] = exchanges_alone(group, sent, config.model.num_layers, ranks)
        whole = [p.numel() for n, p in engine.model.named_parameters() if ".experts." not in n]
        found["weights"] = weights_alone(sum(whole), ranks)
    Path(folder, f"found-{rank}.json").write_text(json.dumps(found))
    ranks.meet()
    dist.destroy_process_group()


def exchanges_alone(group: dist.ProcessGroup, sent: int, num_layers: int, ranks: Ranks) -> float:
    """Median seconds of all all-to-alls of a step: four a layer, as if all were of one size."""
    ep = dist.get_world_size(group)
    each = max(1, sent // (4 * num_layers * 4 * (ep - 1)))  # fp32 numbers to each other rank
    splits = [0 if rank == dist.get_rank(group) else each for rank in range(ep)]
    out, got = torch.ones(sum(splits)), torch.empty(sum(splits))

    def once() -> None:
        for _ in range(4 * num_layers):
            dist.all_to_all_single(got, out, splits, splits, group=group)

    return timed(once, ranks)


def weights_alone(numel: int, ranks: Ranks) -> float:
    """Median seconds to gather all weights that every rank needs, twice, and to sum their gradients."""
    world = dist.get_world_size()
    part = torch.ones(numel // world)
    whole = torch.ones(world * len(part))

    def once() -> None:
        dist.all_gather_into_tensor(whole, part)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)

    return timed(once, ranks)


def timed(work: Callable[[], None], ranks: Ranks) -> float:
    seconds = []
    for _ in range(REPEATS):
        ranks.meet()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def run_world(world: int, rounds: int, alone: bool) -> dict[str, Any]:
    """The median step of the slowest rank, and what it is made of."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (world, folder, rounds, alone), nprocs=world)
        found = [json.loads(Path(folder, f"found-{rank}.json").read_text()) for rank in range(world)]
    slowest = [round(1000 * max(steps), 2) for steps in zip(*(one["seconds"] for one in found), strict=True)]
    line: dict[str, Any] = {"world": world, "ep": RUNS[world], "alone": alone, "ms": slowest}
    if not alone:
        line["bytes_a_rank"] = sum(one["sent"] for one in found) // world
        for name in ("exchange", "weights"):
            line[f"{name}_ms"] = round(1000 * max(one[name] for one in found), 2)
    return line


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
rank, a thread each, gloo. More ranks than cores share these. A step is that of the slowest rank; the ranks meet
before each.

- **apart**: as many processes at the same time that train by themselves, all experts in each.
- **exchange**, **weights**: the all-to-alls of a step alone, as if all were of one size; and weights gathered
  twice and gradients summed once, all at a time.
- **÷ model**: the step ÷ the sum of these three. What is above 1 is waiting for ranks with more rows, and
  collectives that are smaller than these.
- **of apart**: tokens per second ÷ those of processes that train by themselves.
"""


def runs_table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| ranks | ep | ms a step | tokens/s a rank | apart | exchange | weights | ÷ model | of apart | MB sent |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    apart = {run["world"]: median(run["ms"]) for run in runs if run["alone"]}
    for run in runs:
        if run["alone"]:
            continue
        ms, by_itself = median(run["ms"]), apart[run["world"]]
        model = by_itself + run["exchange_ms"] + run["weights_ms"]
        cells = [str(run["world"]), str(run["ep"]), f"{ms:.0f}", f"{ROWS * 256 / ms * 1000:.0f}"]
        cells += [f"{by_itself:.0f}", f"{run['exchange_ms']:.1f}", f"{run['weights_ms']:.1f}"]
        cells += [f"{ms / model:.2f}", f"{by_itself / ms:.2f}", f"{run['bytes_a_rank'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
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
    runs = [run_world(world, args.rounds, alone) for world in RUNS for alone in (True, False)]
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
