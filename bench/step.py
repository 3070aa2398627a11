"""A whole training step: Muster, transformers and DeepSpeed's MoE in turn, on the same model and batches.

    make bench-step          (ARGS="--dtype fp32 --rounds 30 --no-compile", "--device cuda")

One process trains the model of the quickstart, a Mixtral of 15.5 M parameters, 2,048 tokens a step; on a GPU (not
run so far) four layers of OLMoE-1B-7B, which writes bench/results/step_cuda.md. All begin with the same weights,
and before anything is timed the losses of their first steps are compared. A ratio is the median over rounds of two
times of one round, with its 95 % interval (bootstrap). Writes bench/results/step.md.
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
from textwrap import wrap
from typing import Any

import torch
import torch.distributed as dist

from bench.here import RESULTS, measured
from bench.layer_peers import Absent
from bench.paired import in_turn, ratio
from bench.step_contestant import (
    PLAIN,
    DeepSpeedMoe,
    Muster,
    Products,
    Training,
    Transformers,
    Way,
    product_sizes,
)
from parallel.mesh import Meshes, build_meshes
from trainer.build import torch_dtype
from trainer.compose import compose
from trainer.config import Machine, RunConfig, parallel_dims, resolve
from trainer.data.batch import Batch
from trainer.hardware import peak_flops
from trainer.profiling import profiled

COMMON = ["launcher.nproc_per_node=1", "parallel.ep=1", "data.respect_documents=false"]
COMMON += ["optim.warmup_steps=0", "optim.schedule=constant"]
CONFIGS = {
    "cpu": ["experiment=quickstart", "model.vocab_size=4096"],
    "cuda": ["model=olmoe_1b_7b", "model.num_layers=4", "train.seq_len=4096", "train.global_batch=4"],
}
MODELS = {
    "cpu": "the model of the quickstart: 15.5 M parameters, 4 layers of width 256, 8 experts of width 512, 2 a "
    "token, 4,096 words, 8 rows of 256 tokens",
    "cuda": "OLMoE-1B-7B cut to 4 of its 16 layers: 64 experts of width 1,024, 8 a token, 4 rows of 4,096 tokens",
}
MUSTER, COMPILED = "Muster", "Muster, train.compile"
FLOORS = {"cpu": "floor: matmuls, fp32", "cuda": "floor: matmuls, bf16"}
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
    """All contestants in one dtype.

    Attributes:
        tokens: of a step.
        flops: of a step's products, forward and backward.
        peak: FLOP/s that the share of them is of.
        parts: milliseconds of each part of Muster's step.
    """

    dtype: str
    device: str
    rows: list[Row]
    tokens: int
    flops: float
    peak: float
    parts: dict[str, float] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def config_of(dtype: str, more: list[str], device: str = "cpu") -> RunConfig:
    overrides = [*COMMON, *CONFIGS[device], f"device={device}", f"train.dtype={dtype}", *more]
    return resolve(compose(overrides), Machine.here(num_gpus=int(device == "cuda")))


def ways(dtype: str, compiled: bool, device: str = "cpu") -> dict[str, Way]:
    """Those who use transformers. On a GPU few, since the states of all are there at once."""
    if device == "cuda":
        return {"transformers, grouped_mm, bf16 weights, fused AdamW": Way("grouped_mm", True)}
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


def measure(dtype: str, device: str, rounds: int, compiled: bool, meshes: Meshes) -> Block:
    """All of them in one dtype."""

    def config(*more: str, kind: str = dtype) -> RunConfig:
        return config_of(kind, list(more), device)

    plain, floor = config(*PLAIN), FLOORS[device]
    own = {MUSTER: [], COMPILED: ["train.compile=true"]} if compiled and device == "cpu" else {MUSTER: []}
    builds: dict[str, Callable[[], Training]] = {
        name: partial(Muster, config(*PLAIN, *more), meshes) for name, more in own.items()
    }
    builds |= {name: partial(Transformers, plain, way) for name, way in ways(dtype, compiled, device).items()}
    if dtype == "fp32":
        builds["DeepSpeed MoE, no drop, fused AdamW"] = partial(DeepSpeedMoe, plain)
    right = first_losses(Transformers(config(*PLAIN, kind="fp32"), EAGER), plain)
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
        if name in own:
            del ready[name]  # before there are two of its states
            ready[name] = Muster(config(*own[name]), meshes)
    ready[floor] = Products(config())
    rows.append(Row(floor))
    seconds = _take_turns(ready, config(), rounds)
    for row in rows:
        row.ms = [round(1000 * one, 2) for one in seconds.get(row.name, [])]
    muster = ready[MUSTER]
    assert isinstance(muster, Muster)
    batch = batch_of(config(), 0)
    return Block(
        dtype,
        device,
        rows,
        tokens=config().train.global_batch * config().train.seq_len,
        flops=sum(6.0 * rows * inner * outer for rows, inner, outer in product_sizes(config())),
        peak=peak_flops(torch.device(device), torch_dtype(config())),
        parts=profiled(lambda: muster.step(0, batch), 5, muster.stepper),
    )


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
    seconds = in_turn(turns, 2 + rounds, config.device.value, before)
    return {name: values[2:] for name, values in seconds.items()}


def page(head: str, blocks: list[Block], rounds: int, raw: list[str]) -> str:
    """All of it.

    Args:
        raw: JSON lines for its end; empty: they are in a file.
    """
    titles = {"cpu": "a small Mixtral", "cuda": "four layers of OLMoE"}
    device = blocks[0].device
    parts = [f"# One training step of {titles[device]}\n", head, _explained(rounds, device)]
    parts += [table(block) for block in blocks]
    if raw:
        parts.append("\n".join(["Raw, milliseconds of each round:\n", "```json", *raw, "```"]))
    return "\n".join(parts) + "\n"


def _explained(rounds: int, device: str) -> str:
    where = f"one process, {torch.get_num_threads()} threads" if device == "cpu" else "one GPU"
    model = "\n".join(
        wrap(
            f"{rounds} rounds after two that are not counted, {where}. A step is forward, backward, clipping of "
            f"the gradients' norm and AdamW of {MODELS[device]}. Muster's has its balance loss, its z-loss, its "
            "counts and its sums over ranks besides; the others compute the cross-entropy alone.",
            118,
        )
    )
    return f"""{model}

- **of peak**: the FLOPs of the step's matrix products ÷ its time ÷ a GPU's stated rate for bf16, or a processor's
  measured one for fp32.
- **× floor**, **Muster ÷ it**: median over rounds of the ratio of two times of one round, and its 95 % interval
  (bootstrap). Muster is ahead where the interval is below 1.
- **{FLOORS[device]}**: the matrix products of projections, attention (the causal half), routers, experts and
  head, forward and backward, as plain ones of the same FLOPs into memory that is there already: an expert matrix
  is taken as if it were the only one, attention as if its heads were one.
- The first {CHECKED} losses are compared with those of transformers in fp32 with eager experts and PyTorch's own
  AdamW: above {LIMITS["fp32"]:g}, in bf16 {LIMITS["bf16"]:g}, a relative difference is called WRONG.
- DeepSpeed's MoE stands in Muster's transformer, with plain PyTorch around it. "AdamW" is PyTorch's where nothing
  is asked for; transformers' Trainer asks for the fused one, and its models for grouped_mm.
"""


def table(block: Block) -> str:
    """One dtype."""
    floor, muster = block.row(FLOORS[block.device]), block.row(MUSTER)
    lines = [
        f"## {block.dtype}\n",
        "| | ms | tokens/s | of peak | × floor | Muster ÷ it | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in block.rows:
        if not row.ms:
            lines.append(f"| {row.name} | | | | | | {row.note} |")
            continue
        seconds = median(row.ms) / 1000
        cells = [f"{1000 * seconds:.0f}", f"{block.tokens / seconds:,.0f}"]
        cells += [f"{block.flops / seconds / block.peak:.0%}", _ratio(row, floor)]
        cells += ["" if row is muster else _ratio(muster, row), row.note]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
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
    parser.add_argument("--dtype", choices=[*LIMITS, "all"], default="all", help="on a GPU bf16")
    parser.add_argument("--device", choices=list(CONFIGS), default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave out what must be compiled first")
    parser.add_argument("--json", type=Path, help="file for the raw lines, which else end the page")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    args = parser.parse_args(given)
    if args.rounds < 1:
        sys.exit("--rounds: at least 1")
    words = f' ARGS="{" ".join(given)}"' if given else ""
    head = measured(f"make bench-step{words}")
    if args.device != "cpu":
        head = f"{torch.cuda.get_device_name()}; {head}"
    backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    meshes = build_meshes(parallel_dims(config_of("fp32", [], args.device)), args.device)
    wanted = [name for name in LIMITS if args.dtype in (name, "all")] if args.device == "cpu" else ["bf16"]
    blocks = []
    for dtype in wanted:
        blocks.append(measure(dtype, args.device, args.rounds, not args.no_compile, meshes))
        print(table(blocks[-1]), flush=True)
    lines = [json.dumps({"dtype": b.dtype, **vars(row)}) for b in blocks for row in b.rows]
    lines += [json.dumps({"dtype": b.dtype, "parts_ms": b.parts}) for b in blocks]
    if args.json:
        args.json.write_text("\n".join(lines) + "\n")
    args.out.mkdir(parents=True, exist_ok=True)
    name = "step.md" if args.device == "cpu" else f"step_{args.device}.md"
    (args.out / name).write_text(page(head, blocks, args.rounds, [] if args.json else lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
