"""`train.profile`: the parts of a step add up to it, and nothing of the profile stays in the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch.profiler import profile

from parallel.dims import ParallelDims
from parallel.errors import ConfigError
from parallel.mesh import Meshes, build_meshes
from trainer import profiling
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.compose import compose
from trainer.config import Machine, RunConfig, parallel_dims, profiled_steps, resolve
from trainer.data.batch import Batch
from trainer.models.init import initialise
from trainer.step import Stepper

SMALL = ["device=cpu", "model.dim=32", "model.num_heads=4", "model.ffn_dim=48", "model.num_layers=2"]
SMALL += ["model.vocab_size=64", "train.seq_len=16", "train.global_batch=2", "train.steps=20"]


def config_of(*more: str) -> RunConfig:
    return resolve(compose([*SMALL, *more]), Machine(num_cpus=1))


@pytest.fixture(scope="module")
def meshes() -> Iterator[Meshes]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_meshes(parallel_dims(config_of()), "cpu")
    dist.destroy_process_group()


def stepper_of(config: RunConfig, meshes: Meshes) -> Stepper:
    engine = build_engine(config, meshes, torch.device("cpu"))
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(engine.model, engine.named_state(), config.train.seed)
    return Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)


def batch() -> Batch:
    tokens = torch.arange(2 * 17).view(2, 17) % 61
    zeros = torch.zeros(2, 16, dtype=torch.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], zeros, torch.arange(2))


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_parts_add_up_to_the_step(meshes: Meshes, monkeypatch: pytest.MonkeyPatch, recompute: str) -> None:
    config = config_of(
        f"train.activation_checkpointing={recompute}",
        "layout.first_dense_layers=1",
        "layout.num_shared_experts=1",
    )
    stepper = stepper_of(config, meshes)
    kept: list[profile] = []
    parts_of = profiling.parts_of

    def seen(found: profile, num_steps: int) -> dict[str, float]:
        kept.append(found)
        return parts_of(found, num_steps)

    monkeypatch.setattr(profiling, "parts_of", seen)
    parts = profiling.profiled(lambda: stepper.train_step(0, [batch()]), 2, stepper)
    named = {"experts", "attention", "norms", "router", "dispatch and combine", "optimizer", "clipping"}
    named |= {"embedding, head, loss", "dense and shared feed-forward", "targets counted over ranks", "rest"}
    assert set(parts) >= named
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    (whole,) = [event for event in kept[0].events() or [] if event.name == "muster: rest"]
    assert sum(parts.values()) * 2e3 == pytest.approx(whole.cpu_time_total, rel=1e-3)
    backward = "gradients kept", "backward, between nodes"
    assert sum(parts.get(name, 0.0) for name in backward) < parts["experts"] + parts["attention"], (
        "backward nodes belong to what made them"
    )


@dataclass
class Event:
    """As far as :func:`profiling.parts_of` looks at one."""

    name: str
    self_cpu_time_total: float
    cpu_parent: Event | None = None
    sequence_nr: int = -1
    thread: int = 1


def test_a_backward_node_belongs_to_the_part_that_made_it() -> None:
    node = "autograd::engine::evaluate_function: "
    rest = Event("muster: rest", 1.0)
    dispatch = Event("muster: dispatch and combine", 10.0, rest)
    experts = Event("muster: experts", 100.0, dispatch)
    count = Event("aten::bincount", 0.0, dispatch, 7)  # makes no node, so has the number of the next one
    function = Event("_ByExpert", 0.0, experts, 7)
    sent = Event("muster: exchange", 0.0, function)
    inside = Event("c10d::alltoall_base_", 1000.0, sent, 7)
    backward = Event(f"{node}_ByExpertBackward", 10_000.0, rest, 7)
    home = Event("muster: exchange", 0.5, backward)
    grad = Event(f"{node}torch::autograd::AccumulateGrad", 100_000.0, rest, 8)
    other = Event("aten::mm", 1e6, None, 9, thread=2)
    events = [rest, dispatch, count, experts, function, sent, inside, backward, home, grad, other]
    found = SimpleNamespace(events=lambda: events, activities=[])
    assert profiling.parts_of(cast("profile", found), 1) == {
        "gradients kept": 100.0,
        "experts": 10.1,
        "exchange": 1.0005,
        "dispatch and combine": 0.01,
        "rest": 0.001,
    }


def test_nothing_of_it_stays(meshes: Meshes) -> None:
    stepper = stepper_of(config_of(), meshes)
    owners = [stepper, stepper.engine, *stepper.engine.model.modules()]
    before = [set(vars(owner)) for owner in owners]
    profiling.profiled(lambda: stepper.train_step(0, [batch()]), 1, stepper)
    assert [set(vars(owner)) for owner in owners] == before
    with pytest.raises(RuntimeError, match="on purpose"):
        profiling.profiled(lambda: (_ for _ in ()).throw(RuntimeError("on purpose")), 1, stepper)
    assert [set(vars(owner)) for owner in owners] == before


def test_who_is_profiled_exchanges_with_rank_0() -> None:
    def of(world: int, **degrees: int) -> list[int]:
        dims = ParallelDims.create(world, **degrees)
        return [rank for rank in range(world) if profiling.is_profiled(rank, dims)]

    assert of(1) == [0]
    assert of(4) == [0], "no tokens travel"
    assert of(8, ep=2) == [0, 1]
    assert of(8, dp_replicate=2, ep=4) == [0, 1, 2, 3]


@pytest.mark.parametrize(("text", "steps"), [("10-12", (10, 12)), ("7", (7, 7)), ("1-20", (1, 20))])
def test_steps_are_read(text: str, steps: tuple[int, int]) -> None:
    assert profiled_steps(config_of(f"train.profile={text}")) == steps


@pytest.mark.parametrize("text", ["0-3", "4-2", "1-", "-3", "a-b", "19-21", "1,2", "1:3"])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="a step, or FIRST-LAST, of those that the run makes") as found:
        profiled_steps(config_of(f"train.profile='{text}'"))
    assert found.value.field == "train.profile" and found.value.fix == "train.profile=18-20"


def test_a_trace_can_be_opened() -> None:
    with pytest.raises(ConfigError, match="larger than its viewers take") as found:
        profiled_steps(config_of("train.steps=100", "train.profile=3-90"))
    assert "train.profile=3-5" in str(found.value)
