"""A step that the device decides not to commit leaves no bit behind, under every engine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parallel.mesh import build_meshes
from tests.distributed import cases, oracle
from tests.distributed.pool import Pool
from tests.distributed.test_accelerate import Launched
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.checkpoint.digest import weights_digest
from trainer.config import RunConfig, parallel_dims
from trainer.models.init import initialise
from trainer.step import Stepper, Totals

ENGINES = {
    "native": ["engine=native"],
    "accelerate": ["engine=accelerate"],
    **{f"zero-{n}": ["engine=deepspeed", f"engine.zero_stage={n}"] for n in range(4)},
}


class OnDevice:
    """Decides as the guard does where reading a number would make the device wait: every step brings a flag."""

    def corrupt(self) -> Tensor | None:
        return None

    def judge(self, totals: Totals, finite: Tensor) -> Tensor | None:
        assert totals.faults is not None
        return (totals.faults.sum() > 0).float()

    def updated(self) -> None:
        pass


def digest_of_run(rank: int, world: int, config: RunConfig, spoilt: int | None) -> int:
    """Of all state after three steps; ``spoilt`` is first attempted with a NaN in one rank's gradients."""
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)
    share = config.train.global_batch // world

    def spoil() -> None:
        if rank == 1:
            part = next(part for part in engine.named_gradients() if "experts" in part.name)
            part.tensor.view(-1)[0] = math.nan

    for step in range(3):
        batch = oracle.rows(oracle.batch_of_step(config, step), rank * share, (rank + 1) * share)
        if spoilt is not None:
            stepper.gate = OnDevice()
        if step == spoilt:
            stepper.on_gradients = spoil
            result = stepper.train_step(step, [batch])
            assert result.totals.faults is not None and result.totals.faults[0] >= 1
            stepper.on_gradients = lambda: None
        stepper.train_step(step, [batch])
    return weights_digest(engine.named_state())


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_that_is_skipped_and_redone_leaves_the_same_bits(pool: Pool, name: str) -> None:
    """Weights, optimizer slots, step counts and router biases."""
    overrides = [*ENGINES[name], "layout=deepseek", "launcher.nproc_per_node=2", "parallel.ep=2"]
    config = cases.small_config(*overrides)
    ranks = Launched(pool)
    calm = ranks.run(digest_of_run, 2, config, None)
    assert ranks.run(digest_of_run, 2, config, 1) == calm
