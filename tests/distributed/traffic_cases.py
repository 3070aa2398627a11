"""What runs on the pool's ranks in test_traffic.py."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from parallel.mesh import build_meshes
from tests.distributed import oracle
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.config import RunConfig, parallel_dims
from trainer.config_moe import RouterName
from trainer.metrics.step import Hardware, step_metrics
from trainer.models.cost import model_cost, num_choosable
from trainer.models.init import initialise
from trainer.models.transformer import is_moe_layer
from trainer.moe.replay import replaying
from trainer.step import Stepper


def measured(rank: int, world: int, config: RunConfig, steps: int, even: bool) -> list[int]:
    """``moe/a2a_bytes`` of each step; ``even``: every rank's tokens choose all experts equally often."""
    dims = parallel_dims(config)
    meshes = build_meshes(dims, "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    model = build_model(config, build_dispatcher(meshes))
    hardware = Hardware(model_cost(model, config), peak_flops=1.0)
    engine.prepare(model)
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)
    layout, rows = config.layout, config.train.global_batch // dims.dp
    num_layers = sum(is_moe_layer(config, i) for i in range(config.model.num_layers))
    choices = torch.arange(rows * config.train.seq_len * layout.top_k) % num_choosable(layout)
    choices_LBSK = [choices.view(rows, config.train.seq_len, layout.top_k)] * num_layers
    found, first = [], dims.dp_rank(rank) * rows
    for step in range(steps):
        batch = oracle.rows(oracle.batch_of_step(config, step), first, first + rows)
        given = even and layout.router is not RouterName.expert_choice  # which is even by itself
        with replaying(choices_LBSK) if given else nullcontext():
            result = stepper.train_step(step, [batch])
        found.append(step_metrics(result, config, hardware, seconds=1.0)["moe/a2a_bytes"])
    return found
