"""What a snapshot in memory costs training: its stall beside a plain copy of the same bytes to warm memory.

    make bench-snapshot ARGS="--mib 256 --rounds 20"

Both copies take turns in one process. The checksum runs behind the stall, as in training, and is waited for outside
of what is timed. Writes bench/results/snapshot.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from bench.here import RESULTS, measured
from parallel.engines.base import StateSlice
from trainer.checkpoint.lease import Lease, memory_folder
from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.timeline import Timelines

_TENSORS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the state")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    head = measured(f'make bench-snapshot ARGS="--mib {arguments.mib} --rounds {arguments.rounds}"')
    torch.set_num_threads(1)
    size = (arguments.mib << 20) // (4 * _TENSORS)
    slices = [
        StateSlice(f"model.{index}", (size,), (0,), torch.randn(size), owner=True)
        for index in range(_TENSORS)
    ]
    rng, timelines = {"torch_rng": torch.get_rng_state()}, Timelines(starts=[0])
    plain = [torch.zeros(size) for _ in slices]
    stalls, copies = [], []
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "bench" / "snapshot"
        memory = MemoryTier(Lease(memory_folder(None, run_dir), run_dir), 0, 1, 0, "bench", 3)
        memory.claim("here", slices, rng)
        memory.prepare(torch.device("cpu"))
        for step in range(arguments.rounds + 3):
            memory.snapshot(step, slices, rng, {"step": step}, timelines)
            memory.wait()
            began = time.perf_counter()
            for target, piece in zip(plain, slices, strict=True):
                target.copy_(piece.tensor)
            if step >= 3:  # every slot has been written once: its pages are warm
                copies.append(time.perf_counter() - began)
                stalls.append(memory.stall_seconds)
        memory.remove()
    stall, copy = median(stalls), median(copies)
    lines = [
        "# The stall of a snapshot in memory\n",
        head,
        "| state | snapshot | plain copy | snapshot / copy, median of rounds |",
        "| --- | --- | --- | --- |",
        f"| {arguments.mib} MiB | {stall * 1e3:.2f} ms | {copy * 1e3:.2f} ms | "
        f"{median(a / b for a, b in zip(stalls, copies, strict=True)):.2f} |",
        "\nMilliseconds by round:\n",
        "```text",
        *(f"{a * 1e3:.2f} {b * 1e3:.2f}" for a, b in zip(stalls, copies, strict=True)),
        "```",
    ]
    (RESULTS / "snapshot.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
