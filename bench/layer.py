"""One MoE layer, forward and backward: Muster, its peers and two floors in turn, on the same work and routing.

    make bench-layer            (ARGS="--shape mixtral --dtype fp32 --routing zipf --rounds 15")

All see the same inputs, new ones each round, and hold the same experts. Before anything is timed, output and all
gradients of each are compared with a loop in fp64; who is wrong is timed and called WRONG. A ratio is the median
over rounds of two times of one round, with its 95 % interval (bootstrap). Writes bench/results/layer.md, on CUDA
layer_cuda.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bench.here import RESULTS, measured
from bench.layer_contestant import Contestant, Floor
from bench.layer_page import Block, Row, page, table
from bench.layer_peers import BALANCED, FLOORS, MUSTER, Absent, Build, contestants
from bench.layer_work import (
    LIMITS,
    ROUTINGS,
    SHAPES,
    Answer,
    NoRecording,
    Shape,
    Work,
    error,
    make_weights,
    make_work,
    max_over_mean,
    normalised,
    truth,
    wrong_rows,
)
from bench.live import LiveLog
from bench.paired import in_turn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(
    shape: Shape, dtype: torch.dtype, routing: str, rounds: int, device: str, builds: Mapping[str, Build]
) -> Block:
    """All of them on one shape, dtype and routing.

    Args:
        builds: who takes part; Muster, which must not fail, and the floor of the ratios among them.
    """
    # The targets on a CPU are multiples of the fp32 floor in bf16 too: bf16 products are slower there.
    floor = FLOORS[torch.float32 if device == "cpu" else dtype]
    block = Block(shape.name, str(dtype).removeprefix("torch."), routing, floor)
    try:
        work = make_work(shape, dtype, routing, 0, device)
    except NoRecording as why:
        return replace(block, note=str(why))
    weights = make_weights(shape, dtype, device)
    right = truth(work, weights)
    ready: dict[str, Contestant] = {}
    for name, build in builds.items():
        row = Row(name)
        block.rows.append(row)
        try:
            contestant = build(shape, weights)
            row.peak_bytes = peak(contestant, work)
            if not isinstance(contestant, Floor):
                judge(row, contestant, work, right, LIMITS[dtype])
            contestant.release()
            ready[name] = contestant
        except Absent as why:
            row.note = str(why)
        except Exception as found:  # a peer that breaks is reported, and the others are measured
            if name in (MUSTER, floor):
                raise
            row.note = f"failed: {type(found).__name__}: {found}".splitlines()[0]
    del right
    if routing != "balanced":
        ready[BALANCED] = builds[MUSTER](shape, weights)
        block.rows.append(Row(BALANCED))
    seconds, loads = take_turns(ready, shape, dtype, routing, rounds, device)
    for row in block.rows:
        row.ms = [round(1000 * one, 3) for one in seconds.get(row.name, [])]
    return replace(block, max_over_mean=max(loads))


def peak(contestant: Contestant, work: Work) -> int:
    """Bytes live at the peak of its first step beside inputs, weights and the gradients of both.

    Of the first, so that what it keeps from step to step counts as well. What an operator allocates and frees
    while it runs does not. On one thread: what others allocate is not seen.
    """
    contestant.prepare(work)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with LiveLog() as live:
        contestant.step(work)
    torch.set_num_threads(threads)
    return live.peak_without(contestant.leaf_grads())


def judge(row: Row, contestant: Contestant, work: Work, right: Answer, limit: float) -> None:
    answer = contestant.answer(work)
    wanted = normalised(right, work) if contestant.normalises else right
    row.error, row.where = error(answer, wanted)
    if not row.error <= limit:
        row.wrong_rows = wrong_rows(answer, wanted, limit)
        row.note = f"WRONG: {row.where} by {row.error:.1g}, outputs of {row.wrong_rows:.0%} of the tokens"


def take_turns(
    ready: Mapping[str, Contestant], shape: Shape, dtype: torch.dtype, routing: str, rounds: int, device: str
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each in each round after a first one that warms them up, and the load of each round's routing."""
    works: dict[str, Work] = {}
    loads: list[float] = []

    def before(index: int, name: str) -> None:
        if len(loads) == index:
            works.update(
                {kind: make_work(shape, dtype, kind, index, device) for kind in {routing, "balanced"}}
            )
            loads.append(max_over_mean(works[routing].expert_TK, shape.num_experts))
        for contestant in ready.values():
            contestant.release()
        ready[name].prepare(works[kind_of(name)])

    def kind_of(name: str) -> str:
        return "balanced" if name == BALANCED else routing

    def turn(name: str) -> Callable[[], object]:
        return lambda: ready[name].step(works[kind_of(name)])

    seconds = in_turn({name: turn(name) for name in ready}, 1 + rounds, device, before)
    return {name: values[1:] for name, values in seconds.items()}, loads


def parsed(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    names = [shape.name for shapes in SHAPES.values() for shape in shapes]
    parser.add_argument("--shape", choices=[*names, "all"], default="all")
    parser.add_argument("--dtype", choices=[*DTYPES, "all"], default="all")
    parser.add_argument("--routing", choices=[*ROUTINGS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--tokens", type=int, help="instead of the shape's, for a quick look")
    parser.add_argument("--json", type=Path, help="file for the raw lines, which else end the page")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    return parser.parse_args(args)


def main(given: list[str]) -> int:
    args = parsed(given)
    if args.rounds < 1:
        sys.exit("--rounds: at least 1")
    words = f' ARGS="{" ".join(given)}"' if given else ""
    head = measured(f"make bench-layer{words}")
    if args.device != "cpu":
        head = f"{torch.cuda.get_device_name()}; {head}"
    shapes = [shape for shape in SHAPES[args.device] if args.shape in (shape.name, "all")]
    if not shapes:
        sys.exit(f"--shape {args.shape} is not one of --device {args.device}")
    blocks = []
    for shape in shapes:
        for dtype in [DTYPES[name] for name in DTYPES if args.dtype in (name, "all")]:
            for routing in [name for name in ROUTINGS if args.routing in (name, "all")]:
                sized = shape if args.tokens is None else replace(shape, tokens=args.tokens)
                builds = contestants(args.device, dtype)
                blocks.append(measure(sized, dtype, routing, args.rounds, args.device, builds))
                print(table(blocks[-1]), flush=True)
    lines = [json.dumps(line) for block in blocks for line in block.lines()]
    if args.json:
        args.json.write_text("\n".join(lines) + "\n")
    args.out.mkdir(parents=True, exist_ok=True)
    name = "layer.md" if args.device == "cpu" else f"layer_{args.device}.md"
    (args.out / name).write_text(page(head, shapes, blocks, args.rounds, [] if args.json else lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
