"""The MoE layer over several processes, against its products and its bytes alone; and how fast bytes go.

    make bench-exchange          (ARGS="--world 2 --shape fine --rounds 30")

Ranks of one machine, a thread each, over gloo. The layer's time is compared with that of the ranks'
matrix products plus that of the fewest bytes they can send, both measured in the same rounds. Before anything is
timed, output and all gradients are compared with a loop in fp64. Writes bench/results/exchange.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.exchange_ranks import FLOOR, MUSTER, WIRE, Block, Row, bandwidth, measure
from bench.here import RESULTS, measured
from bench.layer_work import ROUTINGS, SHAPES
from bench.paired import ratio

TARGETS = {"mixtral": 1.20, "fine": 1.45, "switch": 1.20}
"""Of the layer at ep 2, × (floor + bytes)."""


def serve(rank: int, world: int, folder: str, given: argparse.Namespace) -> None:
    """One rank: everything that is to be measured with as many; rank 0 writes it down."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    lines = bandwidth(given.rounds)
    blocks = []
    for shape in SHAPES["cpu"]:
        sized = shape if given.tokens is None else replace(shape, tokens=given.tokens)
        for routing in ROUTINGS:
            if given.shape in (shape.name, "all") and given.routing in (routing, "all"):
                blocks.append(measure(sized, routing, given.rounds))
                if rank == 0:
                    print(table(blocks[-1]), flush=True)
    if rank == 0:
        found = {"bandwidth": lines, "blocks": [asdict(block) for block in blocks]}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_world(world: int, given: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Block]]:
    """Measure with so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (world, folder, given), nprocs=world)
        found = json.loads(Path(folder, "found.json").read_text())
    blocks = [Block(**{**block, "rows": [Row(**row) for row in block["rows"]]}) for block in found["blocks"]]
    return found["bandwidth"], blocks


def model(block: Block) -> list[float]:
    """Milliseconds of floor and bytes, one after the other, in each round."""
    return [a + b for a, b in zip(block.row(FLOOR).ms, block.row(WIRE).ms, strict=True)]


def page(
    head: str, bandwidths: Sequence[dict[str, Any]], blocks: Sequence[Block], rounds: int, raw: list[str]
) -> str:
    """All of it; ``raw``: JSON lines for its end."""
    parts = ["# The MoE layer over several processes\n", head, _explained(rounds), summary(blocks)]
    parts += [bandwidth_table(bandwidths), *(table(block) for block in blocks)]
    parts.append("\n".join(["Raw, milliseconds of each round:\n", "```json", *raw, "```"]))
    return "\n".join(parts) + "\n"


def _explained(rounds: int) -> str:
    return f"""{rounds} rounds after a first that is not counted, fp32, gloo, a thread a rank; more ranks than cores
share these. Forward and backward of one layer with the shapes and routings of bench/results/layer.md, each rank
with its share of tokens and experts. A time is that of the slowest rank, and all begin together.

- **{FLOOR}**: each rank's nine products, of the rows that its experts get, on all ranks at once.
- **{WIRE}**: four all-to-alls of the fewest bytes: a token once to each other rank of its choice.
- **× both**: Muster ÷ their sum; **Muster ÷ it**: median over rounds of the ratio of two times of one round, and
  its 95 % interval (bootstrap).
- **MB**: what leaves the busiest rank in a step.
"""


def summary(blocks: Sequence[Block]) -> str:
    """Muster against the sum of its products and its bytes, and against DeepSpeed."""
    lines = [
        "| ranks | shape | routing | × both | to reach at 2 | Muster ÷ DeepSpeed MoE |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for block in blocks:
        muster = block.row(MUSTER)
        peer = next(row for row in block.rows if row.name.startswith("DeepSpeed"))
        wanted = f"{TARGETS[block.shape]:.2f}" if block.world == 2 else ""
        against = _ratio(muster.ms, peer.ms) if peer.ms else peer.note
        cells = [block.shape, block.routing, _ratio(muster.ms, model(block)), wanted, against]
        lines.append(f"| {block.world} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bandwidth_table(lines: Sequence[dict[str, Any]]) -> str:
    """Microseconds of one exchange, and what that is in MB/s of what leaves a rank."""
    found = [
        "## How fast bytes go\n",
        "Medians of the slowest rank, µs.\n",
        "| ranks | bytes a rank | all_to_all_single | MB/s to others | Muster's | plain copy | barrier |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        leaves = line["bytes"] * (line["world"] - 1) / line["world"]
        cells = [line["world"], line["bytes"], line["all_to_all_single"]]
        cells += [round(leaves / line["all_to_all_single"]), line["Muster"], line["copy"], line["barrier"]]
        found.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(found) + "\n"


def table(block: Block) -> str:
    """One block."""
    muster = block.row(MUSTER)
    lines = [
        f"## {block.world} ranks, {block.shape}, {block.routing}\n",
        f"Muster × ({FLOOR} + {WIRE}): {_ratio(muster.ms, model(block))}.\n",
        "| | ms | Muster ÷ it | MB | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in block.rows:
        if not row.ms:
            lines.append(f"| {row.name} | {row.note} | | | |")
            continue
        against = "" if row is muster else _ratio(muster.ms, row.ms)
        sent = "" if row.mb is None else f"{row.mb:.1f}"
        right = row.note or ("" if row.error is None else f"{row.error:.1g}")
        lines.append(f"| {row.name} | {median(row.ms):.1f} | {against} | {sent} | {right} |")
    return "\n".join(lines) + "\n"


def _ratio(these: Sequence[float], those: Sequence[float]) -> str:
    middle, low, high = ratio(these, those)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--world", choices=["2", "4", "all"], default="all")
    parser.add_argument("--shape", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--routing", choices=[*ROUTINGS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, help="instead of the shape's, for a quick look")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    args = parser.parse_args(given)
    if args.rounds < 1:
        sys.exit("--rounds: at least 1")
    words = f' ARGS="{" ".join(given)}"' if given else ""
    head = measured(f"make bench-exchange{words}")
    bandwidths: list[dict[str, Any]] = []
    blocks: list[Block] = []
    for world in (2, 4):
        if args.world in (str(world), "all"):
            lines, found = run_world(world, args)
            bandwidths += lines
            blocks += found
    raw = [json.dumps(line) for line in bandwidths]
    raw += [
        json.dumps({"world": b.world, "shape": b.shape, "routing": b.routing, **asdict(row)})
        for b in blocks
        for row in b.rows
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "exchange.md").write_text(page(head, bandwidths, blocks, args.rounds, raw))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
