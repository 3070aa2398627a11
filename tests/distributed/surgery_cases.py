"""What runs on the pool's ranks for the tests of expert surgery."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from parallel.mesh import build_meshes
from trainer.bits import name_key, normal_
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.config import RunConfig, parallel_dims
from trainer.moe.surgery import Revival, moe_parts, reset_bias, revive


def operate(
    rank: int,
    world: int,
    config: RunConfig,
    layer: int,
    pairs: list[tuple[int, int]],
    noise: float,
    split: float,
) -> list[Any]:
    """State that depends on names and indices only, experts of a layer revived; this rank's part of the whole.

    Without pairs its router's bias is reset instead.
    """
    size, me = str(world), str(rank)  # as launchers say it, for Accelerate
    with patch.dict(os.environ, RANK=me, LOCAL_RANK=me, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size):
        return _operate(config, layer, pairs, noise, split)


def _operate(
    config: RunConfig, layer: int, pairs: list[tuple[int, int]], noise: float, split: float
) -> list[Any]:
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    for part in engine.named_state():
        if part.global_shape and part.tensor.dtype.is_floating_point:  # step counts are shared
            normal_(part.tensor, name_key(part.name), part.global_shape, part.offsets)
    parts = moe_parts(engine.model)[layer]
    control = dist.new_group(backend="gloo")
    assert control is not None
    revivals = [Revival(dead, busy) for dead, busy in pairs]
    revive(engine, parts, revivals, control, noise=noise, split=split, seed=7)
    if not pairs:
        reset_bias(engine, parts)
    return [
        (part.name, part.global_shape, part.offsets, part.tensor.clone(), part.owner)
        for part in engine.named_state()
    ]
