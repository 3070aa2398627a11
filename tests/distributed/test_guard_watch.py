"""Ranks that hold or compute something else than the others are named, on real layouts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from parallel.mesh import build_meshes
from tests.distributed import cases, oracle
from tests.distributed.pool import Pool
from tests.distributed.test_accelerate import Launched
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.config import RunConfig, parallel_dims
from trainer.data.batch import Batch
from trainer.guard.digest import state_at_rest
from trainer.guard.watch import Watch
from trainer.models.init import initialise
from trainer.step import Stepper

EVERY = ["guard.replica_every=2", "guard.replay_every=2", "guard.digest_every=1"]


def look(rank: int, world: int, config: RunConfig, wrong: int, what: str) -> list[dict[str, Any]]:
    """What the watch says on this rank when rank ``wrong`` holds a flipped bit, or computes wrong."""
    dims = parallel_dims(config)
    meshes = build_meshes(dims, "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)
    left = {"always computes": 1000, "computes once": 1, "holds": 0}[what]
    armed = False

    def forward(batch: Batch) -> float:
        nonlocal left
        fails = armed and rank == wrong and left > 0
        left -= fails
        return stepper.loss_of(batch) * (1 + 1e-3 * fails)

    control = torch.distributed.group.WORLD
    assert control is not None
    watch = Watch(config, dims, engine, control, forward)
    watch.begin(0)
    share = config.train.global_batch // dims.dp
    first = dims.dp_rank(rank) * share

    def compare(step: int) -> list[dict[str, Any]]:
        batch = oracle.rows(oracle.batch_of_step(config, step), first, first + share)
        found = [
            {**asdict(corruption.finding), "sound": corruption.sound}
            for corruption in watch.compare(step, batch)
        ]
        return found or [asdict(finding) for finding in watch.settled(step)]

    assert compare(1) == [], "not due"
    assert compare(2) == [], "all agree, to the bit where no rows of several ranks meet"
    dense = next(p for p in state_at_rest(engine) if p.name.endswith("embedding.weight"))
    byte = dense.tensor.view(-1).view(torch.uint8)[5:6]
    if rank == wrong and what == "holds":
        byte ^= 16
    armed = True
    found = compare(4)
    if rank == wrong and what == "holds":
        byte ^= 16  # as if the steps had been done again from before
    return found + compare(4)


def findings(pool: Pool, world: int, wrong: int, what: str, *overrides: str) -> list[dict[str, Any]]:
    config = cases.small_config(*EVERY, f"launcher.nproc_per_node={world}", *overrides)
    answers = Launched(pool).run(look, world, config, wrong, what)
    assert all(answer == answers[0] for answer in answers), "every rank comes to the same decision"
    return list(answers[0])


def test_of_four_replicas_the_majority_names_the_odd_one(pool: Pool) -> None:
    (found,) = findings(pool, 4, 2, "holds", "layout=mixtral", "parallel.dp_replicate=4")
    assert (found["rank"], found["sound"]) == (2, 2)
    assert found["evidence"] == "model.embedding.weight"


def test_of_two_replicas_the_steps_done_again_name_the_odd_one(pool: Pool) -> None:
    first, settled = findings(pool, 2, 1, "holds", "layout=dense", "parallel.dp_replicate=2")
    assert first["rank"] is None and "the replicas of ranks 0, 1 differ" in first["what"]
    assert settled["rank"] == 1 and "done again" in settled["what"]


def test_dense_tensors_that_all_ranks_hold_are_replicas_beside_experts_that_they_share_out(
    pool: Pool,
) -> None:
    first, settled = findings(pool, 2, 0, "holds", "engine=accelerate", "layout=mixtral", "parallel.ep=2")
    assert first["rank"] is None and first["evidence"] == "model.embedding.weight"
    assert settled["rank"] == 0


@pytest.mark.parametrize(
    ("world", "overrides", "what", "named"),
    [
        (3, ["layout=dense", "train.global_batch=6"], "always computes", 1),
        (2, ["layout=mixtral"], "computes once", 1),
        (2, ["layout=mixtral", "parallel.ep=2"], "computes once", 1),
        (2, ["layout=dense"], "always computes", None),
    ],
)
def test_a_rank_that_computes_otherwise_is_named(
    pool: Pool, world: int, overrides: list[str], what: str, named: int | None
) -> None:
    found, *_ = findings(pool, world, 1, what, *overrides)
    assert (found["rank"], found["sound"]) == (named, 2)
    assert named is not None or found["what"].startswith("ranks 0, 1: found different losses")
