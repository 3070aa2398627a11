"""A snapshot that holds only what its steps were given is the state that they left, to the bit, on every layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engines.base import Replayable
from parallel.mesh import build_meshes
from tests.distributed import cases, oracle
from tests.distributed.pool import Pool
from tests.distributed.test_accelerate import Launched
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.checkpoint.lease import Lease, memory_folder
from trainer.checkpoint.memory import MemoryTier, rank_tensors_of
from trainer.checkpoint.timeline import Timelines
from trainer.config import EngineName, RunConfig, parallel_dims
from trainer.models.init import initialise
from trainer.step import Stepper, Totals

CPU = torch.device("cpu")
TIMELINES = Timelines("run", [0])
STEPS = 10
NOT_COMMITTED = 7


class AllButOne:
    """A gate that one step does not pass, decided on the device."""

    def __init__(self) -> None:
        self.step = 0

    def corrupt(self) -> torch.Tensor | None:
        return None

    def judge(self, totals: Totals, finite: torch.Tensor) -> torch.Tensor | None:
        self.step += 1
        return torch.tensor(float(self.step == NOT_COMMITTED))

    def updated(self) -> None:
        pass


def replayed(rank: int, world: int, config: RunConfig, root: str, gated: bool) -> dict[str, Any]:
    """Train with a snapshot after every step; load all that are offered at the end, the newest first.

    Returns:
        The steps offered, those of them whose every tensor came back, and how many snapshots were of everything.
    """
    dims = parallel_dims(config)
    engine = build_engine(config, build_meshes(dims, "cpu"), CPU)
    engine.prepare(build_model(config, build_dispatcher(build_meshes(dims, "cpu"))))
    initialise(engine.model, engine.named_state(), config.train.seed)
    assert isinstance(engine, Replayable) and engine.can_replay
    engine.keep_updates = True
    stepper = Stepper(engine, config, CPU, wants_stop=lambda: False)
    stepper.gate = AllButOne() if gated else None
    run_dir = Path(root) / f"run-{rank}"
    run_dir.mkdir()
    memory = MemoryTier(
        Lease(memory_folder(root, run_dir), run_dir), rank, world, 0, "layout", 3, num_updates=3
    )
    memory.claim("here", list(engine.named_state()), rank_tensors_of(CPU), engine.example_update())
    memory.prepare(CPU)
    seen, whole = {}, 0
    share, micro = config.train.global_batch // dims.dp, config.train.micro_batch
    first = dims.dp_rank(rank) * share
    for step in range(STEPS):
        batch = oracle.batch_of_step(config, step)
        stepper.train_step(
            step, [oracle.rows(batch, i, i + micro) for i in range(first, first + share, micro)]
        )
        torch.rand(1)
        memory.snapshot(
            step + 1, engine.named_state(), rank_tensors_of(CPU), {"step": step + 1}, TIMELINES,
            update=engine.last_update(),
        )  # fmt: skip
        whole += memory.log.base is not None and memory.log.base.step == step + 1
        seen[step + 1] = [*(p.tensor.clone() for p in engine.named_state()), torch.get_rng_state()]
    memory.wait()
    slices = list(engine.named_state())
    offered = sorted(memory.offers("run", memory.plan(slices, rank_tensors_of(CPU)).layout), reverse=True)
    same = []
    for snapshot in offered:
        assert memory.fault(snapshot) is None
        state, own = memory.load(snapshot, slices, ["torch_rng"], engine.replay)
        assert state == {"step": snapshot.step}
        found = [*(piece.tensor for piece in slices), own["torch_rng"]]
        if all(torch.equal(a, b) for a, b in zip(found, seen[snapshot.step], strict=True)):
            same.append(snapshot.step)
    memory.remove()
    differ = [not torch.equal(a, b) for a, b in zip(seen[STEPS], seen[STEPS - 1], strict=True)]
    return {"offered": [s.step for s in offered], "same": same, "whole": whole, "differ": sum(differ)}


@pytest.mark.parametrize(
    ("world", "overrides", "gated"),
    [
        (1, ["layout=dense"], True),
        (4, ["layout=deepseek", "parallel.ep=2", "parallel.dp_shard=4"], True),
        (4, ["layout=mixtral", "parallel.ep=2", "parallel.dp_shard=2", "parallel.dp_replicate=2"], False),
        (2, ["layout=mixtral", "parallel.ep=2", "train.dtype=bf16"], False),
        (2, ["layout=mixtral", "parallel.ep=2", "engine=accelerate"], True),
    ],
    ids=["dense", "bias", "replicas", "bf16", "accelerate"],
)
def test_what_steps_were_given_makes_the_state_that_they_left(
    pool: Pool, tmp_path: Path, world: int, overrides: list[str], gated: bool
) -> None:
    config = cases.small_config(*overrides, f"launcher.nproc_per_node={world}")
    ranks = Launched(pool) if config.engine.name is EngineName.accelerate else pool
    for told in ranks.run(replayed, world, copy.deepcopy(config), str(tmp_path), gated):
        # 9 is of everything; 5 with the three after it; 1, whose updates were written over.
        assert told["offered"] == [10, 9, 8, 7, 6, 5, 1]
        assert told["same"] == told["offered"]
        assert told["whole"] == 3
        assert told["differ"] > 0, "steps that change nothing prove nothing"
