"""engine=accelerate computes what one process would, shares checkpoints with native, and refuses the rest."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.mesh import build_meshes
from tests.command import MUSTER, REPO, SMALL, Workplace
from tests.distributed import cases
from tests.distributed.pool import Pool
from tests.distributed.test_parity import CASES, UNLIKE, compare, overrides_of
from tests.grid import some
from trainer.build import build_engine, build_model
from trainer.checkpoint.digest import combine
from trainer.checkpoint.resume import newest_valid
from trainer.config import RunConfig, Sharding, parallel_dims

ENGINE = "engine=accelerate"


class Launched:
    """The pool, with the variables on its ranks that every launcher sets and Accelerate reads."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def run(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        return self.pool.run(as_launched, world, function.__module__, function.__name__, *args)


def as_launched(rank: int, world: int, module: str, name: str, *args: Any) -> Any:
    size = str(world)
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with patch.dict(os.environ, variables):
        return getattr(importlib.import_module(module), name)(rank, world, *args)


@pytest.fixture
def ranks(pool: Pool) -> Launched:
    return Launched(pool)


VARIATIONS = {
    "accumulation": (["layout=mixtral"], ["train.micro_batch=1"]),
    "activation checkpointing": (
        ["layout=deepseek"],
        ["train.activation_checkpointing=true", "train.micro_batch=2"],
    ),
    "tied embeddings, capacity": (["model.tied_embeddings=true", "layout.capacity_factor=0.7"], []),
    "every second layer, odd sizes": (
        ["layout.moe_every=2", "model.ffn_dim=44", "layout.num_experts=12"],
        [],
    ),
    "experts of two sizes and some that compute nothing": (UNLIKE, []),
    "odd expert width": (["layout=switch", "layout.expert_ffn_dim=37"], []),
}


# (layout, world, dp_replicate, ep). What else native's full grid would show here lies in code that is native's.
COVERING = [
    ("dense", 1, 1, 1),
    ("dense", 2, 1, 1),
    ("dense", 4, 2, 1),
    ("deepseek", 1, 1, 1),
    ("switch", 2, 1, 1),
    ("mixtral", 2, 1, 2),
    ("deepseek", 2, 2, 1),
    ("mixtral", 4, 1, 1),
    ("switch", 4, 1, 2),
    ("deepseek", 4, 1, 2),
    ("switch", 4, 1, 4),
    ("mixtral", 4, 2, 1),
    ("mixtral", 4, 2, 2),
    ("deepseek", 4, 2, 2),
    ("switch", 4, 4, 1),
]


def test_every_mesh_and_every_layout_with_and_without_ep_is_tried() -> None:
    assert {case[1:] for case in COVERING} == {case[1:] for case in CASES}
    assert {(layout, ep > 1) for layout, *_, ep in COVERING} == {(layout, ep > 1) for layout, *_, ep in CASES}


SHORT = [("dense", 2, 1, 1), ("deepseek", 2, 2, 1), ("mixtral", 4, 2, 2), ("switch", 4, 1, 4)]


@pytest.mark.parametrize(("layout", "world", "dp_replicate", "ep"), some(COVERING, SHORT))
def test_computes_what_one_process_would(
    ranks: Launched, layout: str, world: int, dp_replicate: int, ep: int
) -> None:
    compare(ranks, world, [f"layout={layout}"], [ENGINE, *overrides_of(world, dp_replicate, ep)])


@pytest.mark.parametrize(
    ("variation", "dp_replicate", "ep"),
    [
        pytest.param("accumulation", 1, 1, marks=pytest.mark.long),
        ("accumulation", 2, 2),
        pytest.param("activation checkpointing", 1, 2, marks=pytest.mark.long),
        ("tied embeddings, capacity", 2, 2),
        pytest.param("every second layer, odd sizes", 1, 2, marks=pytest.mark.long),
        ("odd expert width", 1, 1),
    ],
)
def test_variation_computes_what_one_process_would(
    ranks: Launched, variation: str, dp_replicate: int, ep: int
) -> None:
    common, own = VARIATIONS[variation]
    if not any(o.startswith("layout=") for o in common):
        common = ["layout=mixtral", *common]
    compare(ranks, 4, common, [ENGINE, *own, *overrides_of(4, dp_replicate, ep)])


def sharded(rank: int, world: int, config: RunConfig, steps: int) -> dict[str, Any]:
    """Train through Accelerate's FSDP2 plugin, which it only takes for GPUs: gloo passes for their backend."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    config.engine.sharding = Sharding.fsdp2
    kind = ("gloo", DistributedType.MULTI_GPU)
    with (
        patch.object(PartialState, "_prepare_backend", lambda *_: kind),
        patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "cpu"}),
    ):
        return cases.train(rank, world, config, steps)


class Sharded(Launched):
    def run(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        return super().run(sharded, world, *args)


@pytest.mark.parametrize(
    ("layout", "world", "dp_replicate", "ep"),
    [
        pytest.param("dense", 4, 2, 1, marks=pytest.mark.long),
        pytest.param("mixtral", 2, 1, 2, marks=pytest.mark.long),
        ("mixtral", 4, 1, 2),
        ("deepseek", 4, 2, 2),
        pytest.param("switch", 4, 1, 1, marks=pytest.mark.long),
    ],
)
def test_the_fsdp2_plugin_computes_what_one_process_would(
    pool: Pool, layout: str, world: int, dp_replicate: int, ep: int
) -> None:
    own = [ENGINE, "train.micro_batch=1", *overrides_of(world, dp_replicate, ep)]
    compare(Sharded(pool), world, [f"layout={layout}"], own)


def config_of(engine: str, world: int, dp_replicate: int, ep: int, *more: str) -> RunConfig:
    mesh = overrides_of(world, dp_replicate, ep)
    return cases.small_config("layout=deepseek", f"engine={engine}", *mesh, *more)


@pytest.mark.parametrize(("world", "ep"), some([(2, 2), (4, 2)], [(4, 2)]))
def test_the_loss_curve_is_that_of_native(ranks: Launched, world: int, ep: int) -> None:
    curves = [
        ranks.run(cases.train, world, config_of(engine, world, 1, ep, "train.steps=20"), 20)[0]["losses"]
        for engine in ("native", "accelerate")
    ]
    assert len(curves[0]) == 20
    assert curves[1] == pytest.approx(curves[0], rel=1e-5, abs=0.0)
    assert min(curves[0]) < curves[0][0]


def test_a_checkpoint_goes_from_engine_to_engine_without_a_changed_bit(
    ranks: Launched, tmp_path: Path
) -> None:
    def visit(engine: str, mesh: tuple[int, int, int], steps: int, start: int) -> str:
        config = config_of(engine, *mesh)
        answers = ranks.run(cases.train_with_checkpoints, mesh[0], config, steps, str(tmp_path), start)
        return combine(answer["digest"] for answer in answers)

    trained = visit("accelerate", (4, 2, 2), 3, 0)
    first = newest_valid(tmp_path)
    assert first is not None and first.weights_digest == trained
    for engine, mesh in (("native", (4, 1, 4)), ("accelerate", (4, 1, 2)), ("native", (1, 1, 1))):
        assert visit(engine, mesh, 3, 3) == trained
    on_native = visit("native", (2, 1, 2), 6, 3)
    for engine, mesh in (("accelerate", (2, 1, 1)), ("accelerate", (4, 4, 1)), ("native", (4, 1, 4))):
        assert visit(engine, mesh, 6, 6) == on_native
    again = newest_valid(tmp_path)
    assert again is not None and again.tensors.keys() == first.tensors.keys()


def test_every_optimizer_slot_survives_the_way_back(ranks: Launched, tmp_path: Path) -> None:
    """The same steps with and without a stay under native in between."""
    there = str(tmp_path / "there")
    mesh = (4, 2, 2)
    ranks.run(cases.train_with_checkpoints, 4, config_of("accelerate", *mesh), 3, there, 0)
    ranks.run(cases.train_with_checkpoints, 2, config_of("native", 2, 1, 2), 3, there, 3)
    back = ranks.run(cases.train_with_checkpoints, 4, config_of("accelerate", *mesh), 6, there, 3)
    straight = str(tmp_path / "straight")
    stayed = ranks.run(cases.train_with_checkpoints, 4, config_of("accelerate", *mesh), 6, straight, 0)
    assert combine(a["digest"] for a in back) == combine(a["digest"] for a in stayed)
    saved = [newest_valid(Path(folder)) for folder in (there, straight)]
    assert saved[0] is not None and saved[1] is not None
    assert saved[0].trainer == saved[1].trainer


def test_in_bf16_the_fsdp2_plugin_rounds_where_native_does(pool: Pool) -> None:
    config = config_of("native", 4, 1, 2, "train.dtype=bf16")
    native = pool.run(cases.train, 4, config, 5)[0]
    config = config_of("accelerate", 4, 1, 2, "train.dtype=bf16")
    found = Sharded(pool).run(cases.train, 4, config, 5)[0]
    assert found["losses"] == pytest.approx(native["losses"], rel=1e-3, abs=0.0)
    assert found["norms"] == pytest.approx(native["norms"], rel=1e-2, abs=0.0)


def settle(rank: int, world: int, config: RunConfig, variables: dict[str, str]) -> int:
    """Prepare the engine where a launcher set these variables; the CPU threads that it leaves, of 3."""
    with patch.dict(os.environ, variables):
        os.environ.pop("OMP_NUM_THREADS", None)
        torch.set_num_threads(3)
        meshes = build_meshes(parallel_dims(config), "cpu")
        engine = build_engine(config, meshes, torch.device("cpu"))
        engine.prepare(build_model(config, cases.build_dispatcher(meshes)))
        threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads


def test_accelerate_does_not_choose_the_number_of_threads(ranks: Launched) -> None:
    quiet = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    assert ranks.run(settle, 2, config_of("accelerate", 2, 1, 2), quiet) == [3, 3]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "accelerate launch: use_fsdp=true: .* engine.sharding"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "use_deepspeed=true: .* an engine of its own"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision=bf16: .* train.dtype is the precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend=inductor: .* not compiled"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "gradient_accumulation_steps=4: .* train.micro_batch",
        ),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", r"parallelism_config=true: .* parallel\.\*"),
    ],
)
def test_what_the_launcher_asks_for_and_would_not_get_is_refused(
    ranks: Launched, variable: str, value: str, message: str
) -> None:
    with pytest.raises(AssertionError, match=f"ConfigError: .*{message}.* Fix: leave .* out of the command"):
        ranks.run(settle, 1, config_of("accelerate", 1, 1, 1), {variable: value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [ENGINE, "engine.sharding=fsdp2"],
            "engine.sharding=fsdp2: on the CPU Accelerate ignores its FSDP plugin .* Fix: engine.sharding=ddp, or",
        ),
        (
            ["engine.sharding=ddp"],
            "engine.sharding=ddp: a choice that engine=accelerate has, not engine=native",
        ),
        (
            [ENGINE, "engine.sharding=fsdp2", "device=cuda", "parallel.dp_replicate=2"],
            "engine.sharding=fsdp2: there is nothing to shard over: parallel.dp_shard = 1. Fix: engine.shard",
        ),
    ],
)
def test_impossible_sharding_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cases.small_config("launcher.nproc_per_node=2", *overrides)


class Spare(nn.Module):
    """A feed-forward layer with a weight that no token passes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.used = nn.Linear(dim, dim, bias=False)
        self.spare = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def make_spare(config: RunConfig, index: int, dispatcher: object) -> nn.Module:
    return Spare(config.model.dim)


def test_a_parameter_without_gradient_is_named_before_a_step_is_taken(ranks: Launched) -> None:
    target = f"layout.target={__name__}:make_spare"
    config = cases.small_config("layout=dense", ENGINE, target, *overrides_of(2, 1, 1))
    with pytest.raises(AssertionError, match=r"this batch gave layers\.0\.feed_forward\.spare\.weight none"):
        ranks.run(cases.train, 2, config, 1)


RUN = [
    ENGINE,
    "layout=deepseek",
    "parallel.ep=2",
    "train.micro_batch=2",
    "checkpoint.every=4",
    "train.steps=12",
]
DOCS = REPO / "docs" / "engines.md"
BLOCK = re.compile(r"^```(bash|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Two processes of `muster train` that nothing disturbs."""
    workplace = Workplace(tmp_path_factory.mktemp("calm"))
    workplace.train(*RUN, "launcher.nproc_per_node=2")
    return workplace


@pytest.mark.long
def test_kills_leave_the_same_bits(workplace: Workplace, calm: Workplace) -> None:
    kwargs = f"folder: {json.dumps(str(workplace.path / 'marks'))}, at: [[5, 1], [9, 0]]"
    killer = f'{{target: "tests.chaos.plugins:KillAt", kwargs: {{{kwargs}}}}}'
    workplace.train(*RUN, "launcher.nproc_per_node=2", f"callbacks=[{killer}]")
    assert [event["rank"] for event in workplace.events("failure")] == [1, 0]
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()


def documented(language: str) -> list[str]:
    """The blocks of docs/engines.md's section on Accelerate."""
    section = DOCS.read_text().partition("\n## Accelerate\n")[2].partition("\n## ")[0]
    return [body for kind, body in BLOCK.findall(section) if kind == language]


def accelerate_launch(workplace: Workplace, line: str, *overrides: str, expect: int = 0) -> str:
    """Run a documented command line on the small model."""
    words = shlex.split(line.replace("\\\n", " "))
    variables = [word for word in words[: words.index("accelerate")] if "=" in word]
    workplace.env.update(dict(variable.split("=") for variable in variables))
    workplace.env["OMP_NUM_THREADS"] = "1"
    command = words[len(variables) : words.index("trainer") + 1]
    command[0] = str(Path(sys.executable).parent / command[0])
    data = f"data.path={workplace.path / 'corpus'}"
    return workplace.run(*command, *SMALL, data, *overrides, expect=expect)


@pytest.mark.parametrize("form", some(["flags", "config file"], ["config file"]))
def test_accelerate_launch_trains_the_same_bits(workplace: Workplace, calm: Workplace, form: str) -> None:
    by_form = {("--config_file" in line): line for line in documented("bash")}
    (workplace.path / "accelerate.yaml").write_text(documented("yaml")[0])
    accelerate_launch(workplace, by_form[form == "config file"], *RUN)
    assert workplace.events("start")[0]["world_size"] == 2
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()


@pytest.mark.long
def test_a_contradiction_in_the_launcher_is_one_message(workplace: Workplace) -> None:
    line = next(line for line in documented("bash") if "--config_file" not in line)
    line = line.replace("--mixed_precision no", "--mixed_precision bf16")
    output = accelerate_launch(workplace, line, *RUN, expect=1)
    said = [line for line in output.splitlines() if line.startswith("muster: ")]
    assert len(said) == 1 and "mixed_precision=bf16" in said[0] and "train.dtype" in said[0], output


@pytest.mark.long
def test_verify_passes(workplace: Workplace) -> None:
    overrides = [ENGINE, "layout=deepseek", "launcher.nproc_per_node=4", "parallel.ep=2"]
    output = workplace.run(
        MUSTER, "verify", "device=cpu", *overrides, "train.global_batch=16", "train.micro_batch=2"
    )
    assert "passed in" in output
