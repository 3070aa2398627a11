"""What runs on the pool's ranks in test_traffic.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import build_meshes
from tests.distributed import oracle
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.config import RunConfig, parallel_dims
from trainer.config_moe import RouterName
from trainer.data.batch import Batch
from trainer.metrics.step import Hardware, step_metrics
from trainer.models.cost import model_cost, num_choosable, rank_of_experts
from trainer.models.init import initialise
from trainer.models.transformer import Losses, is_moe_layer
from trainer.step import Stepper


class Counting:
    """Counts, choice by choice, the ranks other than this one that tokens go to."""

    def __init__(self, config: RunConfig, ep_rank: int, choices_LBSK: list[Tensor] | None) -> None:
        self._ranks = rank_of_experts(config.layout, config.parallel.ep)
        self._ep_rank, self._choices = ep_rank, choices_LBSK
        self.visits = self.choices = 0

    def routes(self, batch: Batch) -> Sequence[Tensor] | None:
        return self._choices

    def saw(self, batch: Batch, losses: Losses) -> None:
        for stats in losses.moe:
            for choice in stats.expert_BSK.flatten(0, 1).tolist():
                ranks = [self._ranks[expert] for expert in choice if expert < len(self._ranks)]
                away = [rank for rank in ranks if rank != self._ep_rank]
                self.visits += len(set(away))
                self.choices += len(away)


def measured(rank: int, world: int, config: RunConfig, steps: int, even: bool) -> dict[str, int]:
    """``moe/a2a_bytes`` of all steps, and over all ranks what it should count.

    Args:
        even: every rank's tokens choose all experts equally often.
    """
    dims = parallel_dims(config)
    meshes = build_meshes(dims, "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    budget = config.parallel.max_tokens_in_flight
    model = build_model(config, build_dispatcher(meshes, budget=budget))
    hardware = Hardware(model_cost(model, config), peak_flops=1.0)
    engine.prepare(model)
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)
    layout, rows = config.layout, config.train.global_batch // dims.dp
    num_layers = sum(is_moe_layer(config, i) for i in range(config.model.num_layers))
    choices = torch.arange(rows * config.train.seq_len * layout.top_k) % num_choosable(layout)
    choices_LBSK = [choices.view(rows, config.train.seq_len, layout.top_k)] * num_layers
    given = even and layout.router is not RouterName.expert_choice  # which is even by itself
    counting = Counting(config, dist.get_rank(meshes.ep), choices_LBSK if given else None)
    stepper.observer = counting
    found, first = 0, dims.dp_rank(rank) * rows
    for step in range(steps):
        batch = oracle.rows(oracle.batch_of_step(config, step), first, first + rows)
        result = stepper.train_step(step, [batch])
        found += step_metrics(result, config, hardware, seconds=1.0)["moe/a2a_bytes"]
    counts = torch.tensor([counting.visits, counting.choices])
    dist.all_reduce(counts)
    return {"bytes": found, "visits": int(counts[0]), "choices": int(counts[1])}
