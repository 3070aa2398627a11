"""A collapsed run recovers by each policy and not without; what was done survives deaths and does not depend on
the layout."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engines.base import StateSlice
from tests.configs import composed
from tests.distributed import cure_cases
from tests.distributed.pool import Pool
from trainer.checkpoint.resume import open_checkpoint
from trainer.config import CallbackConfig, Machine, resolve
from trainer.rules import validate

SMALL = [
    *("device=cpu", "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_dim=64"),
    *("model.num_kv_heads=2", "data=text", "data.tokenizer.vocab_size=300", "train.seq_len=32"),
    *("train.global_batch=16", "train.num_threads=1", "optim.schedule=constant", "optim.warmup_steps=5"),
    *("optim.lr=2e-3", "eval.max_rows=32", "logger.terminal=off", "logger.wandb.mode=disabled"),
    *("checkpoint.every=0", "checkpoint.memory_every=0", "layout.num_experts=8", "data.valid_fraction=0.2"),
]
AT = 10
EP2 = ["launcher.nproc_per_node=2", "parallel.ep=2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("argparse", "textwrap", "shlex", "csv", "ast", "glob", "pprint", "string"):
        (folder / f"{name}.txt").write_text((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text())
    return folder


class Run:
    """A run directory and what its workers wrote there."""

    def __init__(self, pool: Pool, corpus: Path, path: Path) -> None:
        self.pool, self.corpus, self.path = pool, corpus, path
        self.path.mkdir()

    def train(self, overrides: list[str], hooks: list[CallbackConfig], generation: int = 0) -> list[Any]:
        paths = [f"data.path={self.corpus}", f"data.cache_dir={self.corpus.parent / 'cache'}"]
        config = resolve(composed(*SMALL, *paths, *overrides), Machine(num_cpus=2))
        config.callbacks = hooks
        validate(config)
        world = config.launcher.nproc_per_node
        return self.pool.run(cure_cases.work, world, config, str(self.path), generation, connect=False)

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]

    def cures(self) -> list[dict[str, Any]]:
        return [event for event in self.records("events.jsonl") if event["event"] == "cure"]


def collapse(**how: float) -> CallbackConfig:
    return CallbackConfig("bench.cure:Collapse", {"at": AT, **how})


SWITCH = ["layout=switch", "layout.capacity_factor=null", "layout.balance.router_z=0"]
DEEPSEEK = [
    *("layout=deepseek", "layout.top_k=2", "layout.balance.coefficient=0"),
    "layout.balance.bias_update_rate=0.02",
]
RAISE = [
    *("cure.raise_balance.enabled=true", "cure.raise_balance.patience=4"),
    *("cure.raise_balance.factor=16", "cure.raise_balance.limit=5000"),
]
ADAPT = [
    *("cure.adapt_balance.enabled=true", "cure.adapt_balance.decay=0.8"),
    "cure.adapt_balance.maximum=0.03",
]
REVIVE = [
    *("cure.revive_dead.enabled=true", "cure.revive_dead.patience=4"),
    "cure.revive_dead.max_at_once=12",
]
RESET = ["cure.reset_bias.enabled=true", "cure.reset_bias.patience=4"]
# policy → overrides, how the run collapses, the policy's overrides, steps.
COLLAPSES = {
    "raise_balance": ([*SWITCH, "layout.balance.coefficient=1e-5"], {"scale": 2.0}, RAISE, 90),
    "adapt_balance": ([*SWITCH, "layout.balance.coefficient=0"], {"scale": 2.0}, ADAPT, 80),
    "revive_dead": ([*SWITCH, "layout.balance.coefficient=0.02"], {"scale": 16.0}, REVIVE, 80),
    "reset_bias": (DEEPSEEK, {"bias": 5.0}, RESET, 60),
}


@pytest.mark.parametrize(
    "policy",
    [pytest.param(name, marks=pytest.mark.long if name != "reset_bias" else ()) for name in COLLAPSES],
)
def test_a_collapsed_run_recovers(pool: Pool, corpus: Path, tmp_path: Path, policy: str) -> None:
    """And does not without; the loss is no worse for it."""
    layout, how, cure, steps = COLLAPSES[policy]
    uneven, dead, loss = {}, {}, {}
    for name, more in (("without", []), ("with", cure)):
        run = Run(pool, corpus, tmp_path / name)
        run.train([*EP2, *layout, *more, f"train.steps={steps}", f"eval.every={steps}"], [collapse(**how)])
        metrics = run.records("metrics.jsonl")
        assert metrics[AT]["moe/dead_experts"] >= 6, "it collapses"
        last = metrics[-10:]
        uneven[name] = sum(record["moe/max_over_mean"] for record in last) / len(last)
        dead[name] = sum(record["moe/dead_experts"] for record in last) / len(last)
        loss[name] = metrics[-1]["loss/valid"]
        if more:
            coefficients = [record.get("moe/balance_coefficient") for record in metrics]
            kinds = {event["kind"] for event in run.cures()}
            assert kinds == ({policy} if policy != "adapt_balance" else set())
            assert (coefficients[0] is None) == (policy in ("revive_dead", "reset_bias"))
    assert dead["without"] >= 3 and dead["with"] <= 1, "dead experts, mean over the last ten steps"
    assert uneven["with"] <= 0.75 * uneven["without"], "max / mean"
    assert loss["with"] <= 1.01 * loss["without"]


EARLY = [
    *(*SWITCH, "layout.balance.coefficient=0.01", "model.ffn_dim=32"),
    *("cure.revive_dead.enabled=true", "cure.revive_dead.patience=3", "cure.revive_dead.max_at_once=3"),
    *("cure.raise_balance.enabled=true", "cure.raise_balance.patience=4", "cure.raise_balance.threshold=2.5"),
]


def done(run: Run) -> list[tuple[Any, ...]]:
    """Each action once, without the time: one that was lost with its step is done, and logged, again."""
    found = {(event["step"], event["kind"], event["layer"]): event for event in run.cures()}
    keys = ("experts", "before", "after", "message", "evidence")
    return [(*place, *(event[key] for key in keys)) for place, event in sorted(found.items())]


def test_what_was_done_survives_deaths_to_the_bit(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """Killed right after an action was saved, and right after one that was not: the same weights at the end."""
    whole, torn = Run(pool, corpus, tmp_path / "whole"), Run(pool, corpus, tmp_path / "torn")
    common = [*EP2, *EARLY, "train.steps=24"]
    hooks = [CallbackConfig("bench.cure:Collapse", {"at": 4, "scale": 12.0})]
    assert whole.train(common, hooks) == [True, True]
    steps = sorted({place[0] for place in done(whole) if place[1] == "revive_dead"})
    saved = steps[0]
    lost = next(step for step in steps if step % saved)  # between two checkpoints
    every = [f"checkpoint.every={saved}"]
    for generation, step in enumerate((saved, lost)):
        death = CallbackConfig("tests.distributed.cure_cases:DieAt", {"step": step})
        assert torn.train([*common, *every], [*hooks, death], generation) == ["died", "died"]
    assert torn.train([*common, *every], hooks, 2) == [True, True]
    resumed = [event["step"] for event in torn.records("events.jsonl") if event["event"] == "resume"]
    assert resumed == [saved, lost - lost % saved]
    assert done(torn) == done(whole)
    assert len(torn.cures()) > len(done(torn)), "what was lost is done again"
    assert {kind for _, kind, *_ in done(whole)} == {"revive_dead", "raise_balance"}
    digests = [run.records("events.jsonl")[-1]["weights_digest"] for run in (whole, torn)]
    assert digests[0] == digests[1]


LAYOUTS = {
    "one process": ["launcher.nproc_per_node=1"],
    "ep 2": EP2,
    "ep 2, sharded": ["launcher.nproc_per_node=4", "parallel.ep=2"],
    "ep 4": ["launcher.nproc_per_node=4", "parallel.ep=4"],
    "accelerate": [*EP2, "engine=accelerate"],
    "deepspeed": [*EP2, "engine=deepspeed", "engine.zero_stage=3"],
}


def test_every_layout_does_the_same(pool: Pool, corpus: Path, tmp_path: Path) -> None:
    """And every engine: the same actions on the same evidence, and weights equal to rounding."""
    found = {}
    for number, (name, mesh) in enumerate(LAYOUTS.items()):
        run = Run(pool, corpus, tmp_path / str(number))
        hooks = [CallbackConfig("bench.cure:Collapse", {"at": 2, "scale": 12.0})]
        run.train([*mesh, *EARLY, "train.steps=9"], hooks)
        checkpoint = open_checkpoint(run.path)
        weights = {
            key: torch.empty(entry.global_shape)
            for key, entry in checkpoint.tensors.items()
            if key.startswith("model.")
        }
        checkpoint.load_into(
            [StateSlice(key, tuple(w.shape), (0,) * w.dim(), w, True) for key, w in weights.items()], "model."
        )
        found[name] = done(run), weights
    expected, weights = found["one process"]
    assert {kind for _, kind, *_ in expected} == {"revive_dead", "raise_balance"}
    for name, (actions, others) in found.items():
        assert actions == expected, name
        for key, value in weights.items():
            deviation = torch.linalg.vector_norm(others[key] - value) / torch.linalg.vector_norm(value)
            assert deviation <= 1e-5, f"{name}: {key}: ‖a − b‖ / ‖b‖ = {deviation:.2e}"
