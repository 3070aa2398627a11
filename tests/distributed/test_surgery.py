"""Experts are operated on alike in every layout and under every engine: each bit of weights and optimizer."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.distributed import cases, surgery_cases
from tests.distributed.pool import Pool
from trainer.bits import name_key, normal_
from trainer.config import RunConfig

DEAD, BUSY = 6, 1
NOISE, SPLIT = 0.03, 0.4
LAYOUTS = {
    "mixtral": ([], 1, [(DEAD, BUSY), (0, 7)]),
    "deepseek": (["layout.num_experts=8", "layout.top_k=2"], 0, [(DEAD, BUSY)]),
    "ernie": (
        ["layout.expert_sizes=[{num: 4, granularity: 1}, {num: 4, granularity: 2}]"],
        0,
        [(7, 4), (0, 3)],
    ),
}
MESHES = {
    "one": (1, []),
    "ep2": (2, ["parallel.ep=2"]),
    "ep4": (4, ["parallel.ep=4"]),
    "ep2·expert_shard2": (4, ["parallel.ep=2"]),
    "replicas": (4, ["parallel.ep=2", "parallel.dp_replicate=2"]),
    "accelerate": (4, ["parallel.ep=2", "engine=accelerate"]),
    **{f"zero{n}": (4, ["parallel.ep=2", "engine=deepspeed", f"engine.zero_stage={n}"]) for n in range(4)},
}
GRID = [
    *((mesh, "mixtral") for mesh in MESHES),
    *((mesh, layout) for mesh in ("one", "ep2·expert_shard2", "zero1") for layout in ("deepseek", "ernie")),
]


def overrides(layout: str) -> list[str]:
    sizes = ["layout.num_experts=8", "layout.top_k=2"] if layout == "ernie" else []
    return [f"layout={layout}", *sizes, *LAYOUTS[layout][0]]


def start(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return normal_(torch.empty(shape), name_key(name), shape, (0,) * len(shape))


def noise(name: str, shape: tuple[int, ...], row: int) -> torch.Tensor:
    z = torch.empty(shape)
    return normal_(z, name_key(f"revival of {name}", 7), shape, (0,) * len(shape))[row]


def expected(name: str, shape: tuple[int, ...], layout: str) -> torch.Tensor:
    """A tensor after the operation, by plain indexing of whole tensors."""
    value = start(name, shape)
    _, layer, pairs = LAYOUTS[layout]
    index = layer + (1 if layout in ("deepseek", "ernie") else 0)  # the first block is dense
    kind, _, rest = name.partition(".")
    slot, parameter = ("", rest) if kind == "model" else (rest.partition(".")[0], rest.partition(".")[2])
    if not parameter.startswith(
        (f"layers.{index}.feed_forward.experts", f"layers.{index}.feed_forward.router")
    ):
        return value
    first = 4 if ".sizes.1." in parameter else 0
    for dead, busy in pairs:
        if ".experts." in parameter and not first <= dead < first + shape[0]:
            continue
        dead, busy = (dead - first, busy - first) if ".experts." in parameter else (dead, busy)
        if slot == "exp_avg":
            value[dead] = 0.0
            continue
        value[dead] = value[busy]
        if slot or parameter.endswith("bias_E"):
            continue
        z = noise(parameter if kind != "model" else name, shape, dead)
        if ".experts." in parameter:
            value[dead] *= z * NOISE + 1.0
        else:
            value[dead] *= z * -SPLIT + 1.0
            value[busy] *= z * SPLIT + 1.0
    return value


@cache
def config_of(layout: str, mesh: str) -> RunConfig:
    world, more = MESHES[mesh]
    return cases.small_config(*overrides(layout), f"launcher.nproc_per_node={world}", *more)


@pytest.mark.parametrize(("mesh", "layout"), GRID)
def test_every_bit_is_as_by_plain_indexing(pool: Pool, mesh: str, layout: str) -> None:
    _, layer, pairs = LAYOUTS[layout]
    answers = pool.run(
        surgery_cases.operate, MESHES[mesh][0], config_of(layout, mesh), layer, pairs, NOISE, SPLIT
    )
    for name, value in cases.assemble(answers).items():
        if value.dim() and value.dtype.is_floating_point:
            assert torch.equal(value, expected(name, tuple(value.shape), layout)), name
    for answer in answers:  # replicas too
        for name, shape, offsets, values, _ in answer:
            if shape and values.dtype.is_floating_point:
                window = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
                assert torch.equal(values, expected(name, shape, layout)[window]), name
