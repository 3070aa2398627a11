"""Does each policy of `cure` bring a collapsed run back? Prints a Markdown table of real runs on two processes.

    .venv/bin/python -m bench.cure [--steps 160] [--at 30]

In each run the router of every MoE layer is forced onto a few experts: rows ±a, large, so that the larger one of
``a·x`` and ``−a·x`` always wins, and zeros for everyone else; or a large bias on the choice. "Dead experts" and
"max/mean": right after that → at the end (max/mean and loss/train are means over the last ten steps). "Steps to
recover": until no expert of either layer is dead and the worst layer's max/mean is below 2 for the first time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.bits import name_key, normal_
from trainer.callbacks import Callback

if TYPE_CHECKING:
    from trainer.loop import Trainer

REPO = Path(__file__).resolve().parent.parent
SMALL = [
    *("device=cpu", "model.dim=64", "model.num_layers=2", "model.num_heads=4", "model.ffn_dim=128"),
    *("data.tokenizer.vocab_size=512", "train.seq_len=64", "train.global_batch=16", "train.num_threads=1"),
    *("optim.schedule=constant", "optim.warmup_steps=10", "optim.lr=2e-3"),
    *("launcher.nproc_per_node=2", "parallel.ep=2", "eval.max_rows=64", "checkpoint.every=0"),
    *("logger.terminal=off", "logger.wandb.mode=disabled"),
]
RAISE = ["cure.raise_balance.enabled=true", "cure.raise_balance.patience=10"]
ADAPT = [
    *("cure.adapt_balance.enabled=true", "cure.adapt_balance.decay=0.9"),
    "cure.adapt_balance.maximum=0.03",
]
REVIVE = [
    *("cure.revive_dead.enabled=true", "cure.revive_dead.patience=5"),
    "cure.revive_dead.max_at_once=12",
]
RESET = ["cure.reset_bias.enabled=true", "cure.reset_bias.patience=5"]
POLICIES = {
    "no collapse": [],
    "none": [],
    "raise_balance": RAISE,
    "adapt_balance": ADAPT,
    "revive_dead": REVIVE,
    "raise_balance + revive_dead": [*RAISE, *REVIVE],
    "reset_bias": RESET,
}
SWITCH = ["layout=switch", "layout.balance.router_z=0"]
BIASED = [
    *("layout=deepseek", "layout.num_experts=8", "layout.top_k=2", "layout.granularity=1"),
    *("layout.balance.coefficient=0", "layout.balance.bias_update_rate=0.02"),
]
LEARNT = [name for name in POLICIES if name != "reset_bias"]
SCENARIOS: dict[str, tuple[list[str], dict[str, float], list[str]]] = {
    "switch, logits of 2, coefficient 0.0005": (
        [*SWITCH, "layout.balance.coefficient=0.0005"],
        {"scale": 2.0},
        LEARNT,
    ),
    "switch, logits of 16, coefficient 0.01": ([*SWITCH], {"scale": 16.0}, LEARNT),
    "mixtral, logits of 16, coefficient 0.02": (["layout=mixtral"], {"scale": 16.0}, LEARNT),
    "deepseek, a bias of 5 on two experts": (BIASED, {"bias": 5.0}, ["no collapse", "none", "reset_bias"]),
}
"""What is shown → overrides, how the run collapses, policies that are tried."""


class Collapse(Callback):
    """Forces every router onto ``2 · top_k`` experts, before the step that follows ``at`` ones.

    Args:
        scale: standard deviation of the logit of a forced expert, for a normalised input; 0: the weights stay.
        bias: on the first ``top_k`` experts, of a layout with a bias on the choice.
    """

    def __init__(self, at: int, scale: float = 0.0, bias: float = 0.0) -> None:
        self.at, self.scale, self.bias = at, scale, bias

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> dict[str, float] | None:
        if trainer.state.step != self.at:
            return None
        num = 2 * trainer.config.layout.top_k
        for part in trainer.engine.named_state():
            if part.name.endswith(".router.bias_E") and self.bias:
                part.tensor[: num // 2] = self.bias
            if part.name.startswith("model.") and part.name.endswith(".router.weight") and self.scale:
                forced = forced_rows(part.name, part.global_shape, num, self.scale)
                window = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.tensor.shape, strict=True))
                part.tensor.copy_(forced[window])
        return None


def forced_rows(name: str, shape: tuple[int, ...], num: int, scale: float) -> torch.Tensor:
    """``[E, D]``: rows a, −a, b, −b, … for the first ``num`` experts, zeros for the rest."""
    weight, half = torch.zeros(shape), (num // 2, shape[1])
    rows = normal_(torch.empty(half), name_key(name), half, (0, 0), std=scale / math.sqrt(shape[1]))
    weight[0:num:2], weight[1:num:2] = rows, -rows
    return weight


def train(folder: Path, name: str, overrides: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run `muster train`; its metrics and events."""
    command = [
        str(Path(sys.executable).parent / "muster"),
        "train",
        *SMALL,
        "run.name=cure",
        f"run.id={name}",
    ]
    done = subprocess.run(
        [*command, *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    run = folder / "runs" / "cure" / name
    metrics, events = (
        [json.loads(line) for line in (run / file).read_text().splitlines()]
        for file in ("metrics.jsonl", "events.jsonl")
    )
    return metrics, events


def row(name: str, at: int, metrics: list[dict[str, Any]], events: list[dict[str, Any]]) -> str:
    """A line of the table."""
    struck, last = metrics[at], metrics[-1]
    ends = metrics[-10:]
    recovered = next(
        (r["step"] for r in metrics[at:] if r["moe/max_over_mean"] < 2.0 and not r["moe/dead_experts"]), None
    )
    mean = {key: sum(r[key] for r in ends) / len(ends) for key in ("moe/max_over_mean", "loss/train")}
    cells = [
        name,
        f"{struck['moe/dead_experts']} → {last['moe/dead_experts']}",
        f"{struck['moe/max_over_mean']:.2f} → {mean['moe/max_over_mean']:.2f}",
        "never" if recovered is None else f"{recovered - at}",
        f"{mean['loss/train']:.3f}",
        f"{last['loss/valid']:.3f}",
        str(sum(event["event"] == "cure" for event in events)),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--at", type=int, default=30)
    given = parser.parse_args()
    for title, (overrides, how, policies) in SCENARIOS.items():
        print(f"\n{title} (8 experts, 2 MoE layers; collapse before step {given.at + 1} of {given.steps})\n")
        print("| policy | dead experts | max/mean | steps to recover | loss/train | loss/valid | actions |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        settings = ", ".join(f"{key}: {value}" for key, value in {"at": given.at, **how}.items())
        hook = f'callbacks=[{{target: "bench.cure:Collapse", kwargs: {{{settings}}}}}]'
        for name in policies:
            common = [*overrides, f"train.steps={given.steps}", f"eval.every={given.steps}"]
            with tempfile.TemporaryDirectory() as folder:
                hooks = [] if name == "no collapse" else [hook]
                records = train(Path(folder), "a", [*common, *POLICIES[name], *hooks])
            print(row(name, given.at, *records), flush=True)


if __name__ == "__main__":
    main()
