"""A whole training step: Muster, transformers and DeepSpeed's MoE in turn, on the same model and batches.

    make bench-step          (ARGS="--dtype fp32 --rounds 30 --no-compile")

One process trains the model of the quickstart, a Mixtral of 15.5 M parameters, 2,048 tokens a step. All begin with
the same weights, and before anything is timed the losses of their first steps are compared. A ratio is the median
over rounds of two times of one round, with its 95 % interval (bootstrap). Writes bench/results/step.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from bench.here import RESULTS, measured
from bench.layer_peers import Absent
from bench.paired import in_turn, ratio
from bench.step_contestant import PLAIN, DeepSpeedMoe, Muster, Products, Training, Transformers, Way
from parallel.mesh import Meshes, build_meshes
from trainer.compose import compose
from trainer.config import Machine, RunConfig, parallel_dims, resolve
from trainer.data.batch import Batch
from trainer.profiling import profiled

CONFIG = ["experiment=quickstart", "launcher.nproc_per_node=1", "parallel.ep=1", "model.vocab_size=4096"]
CONFIG += ["data.respect_documents=false", "device=cpu", "optim.warmup_steps=0", "optim.schedule=constant"]
MUSTER, COMPILED, FLOOR = "Muster", "Muster, train.compile", "floor: matmuls, fp32"
CHECKED = 3
EAGER = Way("eager", None)
LIMITS = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative difference of a right loss."""


@dataclass
class Row:
    """One contestant.

    Attributes:
        losses: of its first steps.
        ms: of each round; empty where it took no part, and ``note`` says why.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    note: str = ""


@dataclass
class Block:
    """All contestants in one dtype, and the parts of Muster's step in milliseconds."""

    dtype: str
    rows: list[Row]
    parts: dict[str, float] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def config_of(dtype: str, more: list[str]) -> RunConfig:
    return resolve(compose([*CONFIG, f"train.dtype={dtype}", *more]), Machine.here())


def ways(dtype: str, compiled: bool) -> dict[str, Way]:
    """Those who use transformers."""
    if dtype == "fp32":
        found = {
            "transformers, eager, AdamW": EAGER,
            "transformers, grouped_mm, AdamW": Way("grouped_mm", None),
            "transformers, grouped_mm, fused AdamW": Way("grouped_mm", True),
        }
        last = {"transformers, grouped_mm, fused AdamW, compiled": Way("grouped_mm", True, compiled=True)}
    else:
        found = {
            "transformers, eager, autocast, fused AdamW": Way("eager", True, autocast=True),
            "transformers, grouped_mm, autocast, fused AdamW": Way("grouped_mm", True, autocast=True),
            "transformers, grouped_mm, bf16 weights, fused AdamW": Way("grouped_mm", True),
        }
        last = {
            "transformers, grouped_mm, bf16 weights, fused AdamW, compiled": Way(
                "grouped_mm", True, compiled=True
            )
        }
    return found | (last if compiled else {})


def batch_of(config: RunConfig, number: int) -> Batch:
    """Random tokens, common ones often (Zipf); every position has a target."""
    g = torch.Generator().manual_seed(number)
    B, S, V = config.train.global_batch, config.train.seq_len, config.model.vocab_size
    share = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    tokens = torch.multinomial(share, B * (S + 1), replacement=True, generator=g).view(B, S + 1)
    documents = torch.zeros(B, S, dtype=torch.int32)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, torch.arange(B))


def measure(dtype: str, rounds: int, compiled: bool, meshes: Meshes) -> Block:
    """All of them in one dtype."""
    own = {MUSTER: [], COMPILED: ["train.compile=true"]} if compiled else {MUSTER: []}
    plain, config = config_of(dtype, PLAIN), config_of(dtype, [])
    builds: dict[str, Callable[[], Training]] = {
        name: partial(Muster, config_of(dtype, [*PLAIN, *more]), meshes) for name, more in own.items()
    }
    builds |= {name: partial(Transformers, plain, way) for name, way in ways(dtype, compiled).items()}
    if dtype == "fp32":
        builds["DeepSpeed MoE, no drop, fused AdamW"] = partial(DeepSpeedMoe, plain)
    right = first_losses(Transformers(config_of("fp32", PLAIN), EAGER), plain)
    ready: dict[str, Training] = {}
    rows = []
    for name, build in builds.items():
        row = Row(name)
        rows.append(row)
        try:
            ready[name] = build()
            row.losses = first_losses(ready[name], plain)
            row.note = judged(row.losses, right, LIMITS[dtype])
        except Absent as why:
            row.note = str(why)
        except Exception as found:  # a peer that breaks is reported, and the others are measured
            if name in own:
                raise
            ready.pop(name, None)
            row.note = f"failed: {type(found).__name__}: {found}".splitlines()[0]
    ready |= {name: Muster(config_of(dtype, more), meshes) for name, more in own.items()}
    ready[FLOOR] = Products(config)
    rows.append(Row(FLOOR))
    seconds = _take_turns(ready, config, rounds)
    for row in rows:
        row.ms = [round(1000 * one, 2) for one in seconds.get(row.name, [])]
    muster = ready[MUSTER]
    assert isinstance(muster, Muster)
    batch = batch_of(config, 0)
    return Block(dtype, rows, profiled(lambda: muster.step(0, batch), 5, muster.stepper))


def first_losses(contestant: Training, config: RunConfig) -> list[float]:
    """Of its first steps, which change it."""
    return [float(contestant.step(number, batch_of(config, number))) for number in range(CHECKED)]


def judged(losses: list[float], right: list[float], limit: float) -> str:
    """Why it is wrong; empty: it is right."""
    worst = max(abs(a / b - 1) for a, b in zip(losses, right, strict=True))
    return "" if worst <= limit else f"WRONG: its losses differ by {worst:.1g}"


def _take_turns(ready: dict[str, Training], config: RunConfig, rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round after two that warm them up."""
    now: dict[str, Any] = {}

    def before(index: int, name: str) -> None:
        if now.get("index") != index:
            now.update(index=index, batch=batch_of(config, CHECKED + index))

    def turn(contestant: Training) -> Callable[[], object]:
        return lambda: contestant.step(CHECKED + now["index"], now["batch"])

    turns = {name: turn(contestant) for name, contestant in ready.items()}
    return {name: values[2:] for name, values in in_turn(turns, 2 + rounds, before=before).items()}


def page(head: str, blocks: list[Block], rounds: int, raw: list[str]) -> str:
    """All of it.

    Args:
        raw: JSON lines for its end; empty: they are in a file.
    """
    parts = ["# One training step of a small Mixtral\n", head, _explained(rounds)]
    parts += [table(block) for block in blocks]
    if raw:
        parts.append("\n".join(["Raw, milliseconds of each round:\n", "```json", *raw, "```"]))
    return "\n".join(parts) + "\n"


def _explained(rounds: int) -> str:
    threads = torch.get_num_threads()
    return f"""{rounds} rounds after two that are not counted, one process, {threads} threads. A step is forward,
backward, clipping of the gradients' norm and AdamW of the model of the quickstart: 15.5 M parameters, 4 layers of
width 256, 8 experts of width 512, 2 a token, 4,096 words, 8 rows of 256 tokens. Muster's has its balance loss, its
z-loss, its counts and its sums over ranks besides; the others compute the cross-entropy alone.

- **× floor**, **Muster ÷ it**: median over rounds of the ratio of two times of one round, and its 95 % interval
  (bootstrap). Muster is ahead where the interval is below 1.
- **{FLOOR}**: the matrix products of projections, attention (the causal half), routers, experts and
  head, forward and backward, as plain ones of the same FLOPs into memory that is there already: an expert matrix
  is taken as if it were the only one, attention as if its heads were one.
- The first {CHECKED} losses are compared with those of transformers in fp32 with eager experts and PyTorch's own
  AdamW: above {LIMITS["fp32"]:g}, in bf16 {LIMITS["bf16"]:g}, a relative difference is called WRONG.
- DeepSpeed's MoE stands in Muster's transformer, with plain PyTorch around it. "AdamW" is PyTorch's where nothing
  is asked for; transformers' Trainer asks for the fused one, and its models for grouped_mm.
"""


def table(block: Block) -> str:
    """One dtype."""
    floor, muster = block.row(FLOOR), block.row(MUSTER)
    lines = [
        f"## {block.dtype}\n",
        "| | ms | × floor | Muster ÷ it | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in block.rows:
        if not row.ms:
            lines.append(f"| {row.name} | | | | {row.note} |")
            continue
        against = "" if row is muster else _ratio(muster, row)
        lines.append(f"| {row.name} | {median(row.ms):.0f} | {_ratio(row, floor)} | {against} | {row.note} |")
    whole = sum(block.parts.values())
    lines += ["\nParts of Muster's step under PyTorch's profiler, forward and backward together:\n"]
    lines += ["| | ms | |", "| --- | --- | --- |"]
    lines += [f"| {name} | {ms:.1f} | {ms / whole:.0%} |" for name, ms in block.parts.items()]
    return "\n".join(lines) + "\n"


def _ratio(these: Row, those: Row) -> str:
    middle, low, high = ratio(these.ms, those.ms)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dtype", choices=[*LIMITS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave out what must be compiled first")
    parser.add_argument("--json", type=Path, help="file for the raw lines, which else end the page")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    args = parser.parse_args(given)
    if args.rounds < 1:
        sys.exit("--rounds: at least 1")
    words = f' ARGS="{" ".join(given)}"' if given else ""
    head = measured(f"make bench-step{words}")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    meshes = build_meshes(parallel_dims(config_of("fp32", [])), "cpu")
    blocks = []
    for dtype in [name for name in LIMITS if args.dtype in (name, "all")]:
        blocks.append(measure(dtype, args.rounds, not args.no_compile, meshes))
        print(table(blocks[-1]), flush=True)
    lines = [json.dumps({"dtype": b.dtype, **vars(row)}) for b in blocks for row in b.rows]
    lines += [json.dumps({"dtype": b.dtype, "parts_ms": b.parts}) for b in blocks]
    if args.json:
        args.json.write_text("\n".join(lines) + "\n")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step.md").write_text(page(head, blocks, args.rounds, [] if args.json else lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
