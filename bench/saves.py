"""What does a durable save take from training? Muster's writer and DCP's asynchronous save in one run, in turn.

    make bench-saves [ARGS="--rounds 8"]

Two ranks train the same dense model (DDP). A block is a number of steps; in turn without a save, with one of
Muster's, and with one of DCP's (`async_save` with its stager, shared memory, a process group of its own), begun
after the block's first step and ended within the block. *Lost* is the block's time less the time of the steps of
the blocks without a save on either side of it. Both write the same tensors, half of the bytes a rank, to the same
disk; both have saved once before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn.parallel import DistributedDataParallel

from bench.here import RESULTS, measured
from bench.recovery.plain import stager
from bench.recovery.work import Work
from bench.survival import BIN, REPO, freeze
from parallel.engines.base import StateSlice
from trainer.checkpoint.durable import DurableCheckpointer

STEPS = 3
KEEP = 2  # checkpoints, the default of Muster
Saver = Callable[[int], Callable[[], None]]
"""Begins a save of a step; what it returns waits for its end."""


def muster_saver(work: Work, folder: Path, rank: int, world_size: int) -> Saver:
    """Muster's durable tier on the weights and both slots of AdamW."""
    saver = DurableCheckpointer(
        folder, rank, world_size, "bench", keep_last=KEEP, keep_every=0, timeout_seconds=60
    )

    def slices() -> list[StateSlice]:
        found = []
        for index, (name, parameter) in enumerate(work.objective.named_parameters()):
            slots = {"model": parameter.detach()}
            slots |= {
                f"optim.{key}": work.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")
            }
            for kind, tensor in slots.items():
                shape = tuple(tensor.shape)
                owner = index % world_size == rank
                found.append(StateSlice(f"{kind}.{name}", shape, (0,) * len(shape), tensor, owner))
        return found

    def save(step: int) -> Callable[[], None]:
        saver.save(step, slices(), {"step": step}, {"torch_rng": torch.get_rng_state()}, {})
        return saver.wait

    return save


def dcp_saver(work: Work, folder: Path) -> Saver:
    """DCP's `async_save`; older checkpoints are removed, as Muster's are."""
    group, staging = dist.new_group(backend="gloo"), stager()

    def save(step: int) -> Callable[[], None]:
        weights, slots = get_state_dict(work.objective, work.optimizer)
        made: Any = dcp.async_save(
            {"model": weights, "optimizer": slots},
            checkpoint_id=str(folder / f"step-{step:08d}"),
            process_group=group,
            async_stager=staging,
        )
        future = getattr(made, "upload_completion", made)

        def end() -> None:
            future.result()
            if dist.get_rank() == 0:
                for old in sorted(folder.glob("step-*"))[:-KEEP]:
                    shutil.rmtree(old)

        return end

    return save


def worker(config: Path, folder: Path, rounds: int) -> None:
    """One rank: all blocks, the seconds of each to ``folder/blocks-RANK.json``."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    work = Work(config, rank, world_size)
    model = DistributedDataParallel(work.objective)

    def step() -> None:
        for batch in work.batches():
            model(batch.tokens, batch.targets).backward()
        work.optimizer.step()
        work.optimizer.zero_grad()

    savers: dict[str, Saver | None] = {
        "Muster": muster_saver(work, folder / "muster", rank, world_size),
        "DCP": dcp_saver(work, folder / "dcp"),
    }
    blocks: list[dict[str, Any]] = []
    number = 0
    for count in range(rounds + 1):
        for name in ("none", "Muster", "none", "DCP"):
            saver = savers.get(name)
            dist.barrier()
            began, stall, end = time.perf_counter(), 0.0, None
            for index in range(STEPS):
                step()
                if index == 0 and saver is not None:
                    number += 1
                    at = time.perf_counter()
                    end = saver(number)
                    stall = time.perf_counter() - at
            if end is not None:
                end()
            seconds = time.perf_counter() - began
            blocks.append({"round": count, "name": name, "seconds": seconds, "stall": stall})
    blocks.append({"round": rounds + 1, "name": "none", "seconds": blocks[-2]["seconds"], "stall": 0.0})
    (folder / f"blocks-{rank}.json").write_text(json.dumps(blocks))
    dist.barrier()
    os._exit(0)


def ratio_interval(these: list[float], those: list[float]) -> tuple[float, float]:
    """95 % interval of the ratio of the medians; a round's noise may exceed what a save takes, so not of ratios."""
    dice, ratios = random.Random(0), []
    for _ in range(2000):
        drawn = dice.choices(range(len(these)), k=len(these))
        ratios.append(statistics.median(these[i] for i in drawn) / statistics.median(those[i] for i in drawn))
    ratios.sort()
    return ratios[50], ratios[-51]


def main() -> None:
    """Start the ranks, read what they measured, write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.config, args.worker, args.rounds)
    folder = Path(tempfile.mkdtemp(prefix="muster-saves-"))
    head = measured(f"make bench-saves ARGS='{' '.join(sys.argv[1:])}'")
    try:
        config = freeze(folder, "model.dim=512", "model.ffn_dim=2048")
        for name in ("muster", "dcp"):
            (folder / name).mkdir()
        command = [str(BIN / "torchrun"), "--nproc-per-node=2", "--standalone", "-m", "bench.saves"]
        command += ["--worker", str(folder), "--config", str(config), "--rounds", str(args.rounds)]
        environment = {**os.environ, "PYTHONPATH": str(REPO), "MUSTER_CACHE": str(folder / "cache")}
        subprocess.run(command, check=True, cwd=folder, env=environment)
        blocks = json.loads((folder / "blocks-0.json").read_text())
        newest = max((folder / "dcp").glob("step-*"))
        size = sum(path.stat().st_size for path in newest.rglob("*.distcp"))
    finally:
        shutil.rmtree(folder)
    lost: dict[str, list[float]] = {"Muster": [], "DCP": []}
    stall: dict[str, list[float]] = {"Muster": [], "DCP": []}
    for index, block in enumerate(blocks):
        if block["round"] == 0 or block["name"] == "none":
            continue  # the first round warms both up
        beside = (blocks[index - 1]["seconds"] + blocks[index + 1]["seconds"]) / 2
        lost[block["name"]].append(block["seconds"] - beside)
        stall[block["name"]].append(block["stall"])
    medians = {name: statistics.median(values) for name, values in lost.items()}
    lines = [
        "# What an asynchronous save takes from training",
        "",
        head,
        f"{size / 1e6:.0f} MB a save, two ranks, blocks of {STEPS} steps, {args.rounds} saves each, in turn.",
        "",
        "| | training time lost a save, median (range), s | stall of the training thread, median, s |",
        "| --- | --- | --- |",
    ]
    for name, values in lost.items():
        spread = f"{min(values):.3f}–{max(values):.3f}"
        lines.append(f"| {name} | {medians[name]:.3f} ({spread}) | {statistics.median(stall[name]):.4f} |")
    low, high = ratio_interval(lost["Muster"], lost["DCP"])
    lines += [
        "",
        f"Muster / DCP: {medians['Muster'] / medians['DCP']:.2f} "
        f"(95 % interval {low:.2f}–{high:.2f}, bootstrap over rounds)",
        "",
        "Raw, seconds a block on rank 0:",
        "",
    ]
    lines += ["```json", *(json.dumps(block) for block in blocks), "```"]
    page = "\n".join(lines) + "\n"
    print(page)
    (RESULTS / "saves.md").write_text(page)


if __name__ == "__main__":
    main()
