"""What does a budget of rows cost, and what does it save? One MoE layer on CPU processes, at several skews.

    python -m bench.bounded_memory [--ranks 2] [--repeats 9]

Budgets take turns in every repeat, so that a machine that others use as well treats them alike.
A ratio is the median over the repeats of (time of this budget / time without one in the same repeat).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.one_layer import OneLayer, Sizes, bound
from parallel.dispatch.rounds import num_rounds

SIZES = Sizes(tokens=1024, choices=2, experts=8, dim=256, ffn_dim=512)
SKEWS = (0.0, 0.5, 1.0)
SHARES = (None, 2.0, 1.0, 0.5, 0.25)
"""Budgets as shares of the rows that a rank gets if all get as many."""


def measure(rank: int, ranks: int, store: str, repeats: int, report: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    budgets = [None if share is None else int(share * SIZES.rows) for share in SHARES]
    lines = []
    for skew in SKEWS:
        layer = OneLayer(SIZES, skew)
        most = layer.most_rows()
        peaks = {budget: _largest(layer.peak(budget)) for budget in budgets}
        times = _times(layer, budgets, repeats)
        for budget in budgets:
            ratio = statistics.median(a / b for a, b in zip(times[budget], times[None], strict=True))
            rounds = 1 if budget is None else num_rounds(most, budget)
            allowed = "" if budget is None else f"{bound(SIZES, ranks, budget) / 2**20:.1f}"
            name = "none" if budget is None else f"{budget:,}"
            median = statistics.median(times[budget])
            lines.append(
                f"| {skew:.0%} | {most:,} | {name} | {rounds} | {peaks[budget] / 2**20:.1f} | {allowed} "
                f"| {median:.3f} | {ratio:.2f} |"
            )
    if rank == 0:
        Path(report).write_text("\n".join(lines))
    dist.destroy_process_group()


def _largest(value: int) -> int:
    """Over all ranks."""
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def _times(layer: OneLayer, budgets: list[int | None], repeats: int) -> dict[int | None, list[float]]:
    times: dict[int | None, list[float]] = {budget: [] for budget in budgets}
    for _ in range(repeats):
        for budget in budgets:
            dist.barrier()
            start = time.perf_counter()
            layer.step(budget)
            dist.barrier()
            times[budget].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    print(f"{SIZES}, {asked.ranks} ranks, fp32, torch {torch.__version__}, {os.cpu_count()} cores, CPU")
    print(
        f"{time.strftime('%Y-%m-%d')}, median of {asked.repeats} interleaved steps (forward and backward)\n"
    )
    print("| skew | most rows | budget | rounds | peak MiB | bound MiB | step s | time ratio |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder) / "report")
        mp.spawn(measure, (asked.ranks, f"{folder}/store", asked.repeats, report), asked.ranks)
        print(Path(report).read_text())


if __name__ == "__main__":
    main()
