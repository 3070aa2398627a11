"""engine=deepspeed computes what one process would, at every ZeRO stage, and its checkpoints are everyone's."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.engines.deepspeed_shards import boxes
from parallel.errors import ConfigError
from parallel.mesh import build_meshes
from tests.command import MUSTER
from tests.distributed import cases, oracle
from tests.distributed.pool import Pool
from tests.distributed.test_parity import UNLIKE, compare
from tests.grid import some
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.checkpoint.digest import combine
from trainer.checkpoint.resume import newest_valid
from trainer.config import RunConfig, parallel_dims
from trainer.models.init import initialise
from trainer.step import Stepper

STAGES = (0, 1, 2, 3)


def engine(stage: int | None, world: int, ep: int, *more: str) -> list[str]:
    """Overrides of a layout; stage None is the native engine."""
    chosen = ["engine=native"] if stage is None else ["engine=deepspeed", f"engine.zero_stage={stage}"]
    return [*chosen, f"launcher.nproc_per_node={world}", f"parallel.ep={ep}", *more]


# (layout, world, ep) → stages. All of them where experts are both spread and repeated; elsewhere those that the
# tests below, which compare as much, do not have there.
COVERING = {
    ("dense", 2, 1): (0, 2),
    ("dense", 4, 1): (1, 3),
    ("mixtral", 1, 1): (0, 3),
    ("mixtral", 2, 1): (1,),
    ("mixtral", 2, 2): (2,),
    ("mixtral", 4, 1): (0, 2),
    ("mixtral", 4, 2): STAGES,
    ("mixtral", 4, 4): (1, 3),
    ("deepseek", 2, 2): (1,),
    ("deepseek", 4, 2): (0, 2),
}
GRID = [(*mesh, stage) for mesh, stages in COVERING.items() for stage in stages]
SHORT = [("mixtral", 1, 1, 0), ("mixtral", 4, 2, 1), ("mixtral", 4, 2, 2), ("mixtral", 4, 4, 3)]
SHORT += [("dense", 4, 1, 3), ("deepseek", 2, 2, 1), ("deepseek", 4, 2, 0)]


@pytest.mark.parametrize(("layout", "world", "ep", "stage"), some(GRID, SHORT))
def test_a_stage_computes_what_one_process_would(
    pool: Pool, layout: str, world: int, ep: int, stage: int
) -> None:
    """Losses, gradients, clip norms, routing and weights, with accumulation where a rank has several rows."""
    compare(pool, world, [f"layout={layout}"], engine(stage, world, ep, "train.micro_batch=2"))


@pytest.mark.parametrize("stage", some(STAGES, [1, 3]))
def test_recomputed_blocks_and_tied_embeddings(pool: Pool, stage: int) -> None:
    common = ["layout=mixtral", "model.tied_embeddings=true", "model.ffn_dim=44", "layout.num_experts=12"]
    compare(
        pool, 4, common, engine(stage, 4, 2, "train.activation_checkpointing=true", "train.micro_batch=1")
    )


@pytest.mark.parametrize("stage", some(STAGES, [2]))
def test_experts_of_two_sizes_and_some_that_compute_nothing(pool: Pool, stage: int) -> None:
    compare(pool, 4, UNLIKE, engine(stage, 4, 2))


def test_a_world_that_is_no_power_of_two(pool: Pool) -> None:
    """There undoing DeepSpeed's division is a rounding, and shards end anywhere."""
    common = ["layout=mixtral", "train.global_batch=6", "layout.num_experts=6"]
    for stage, ep in ((1, 3), (3, 1)):
        compare(pool, 3, common, engine(stage, 3, ep))


@pytest.mark.parametrize(("world", "stage"), some([(2, 0), (2, 2), (4, 1), (4, 3)], [(2, 2), (4, 3)]))
def test_the_loss_curve_of_twenty_steps(pool: Pool, world: int, stage: int) -> None:
    common = ["layout=deepseek", "train.steps=20"]
    expected = oracle.run_oracle(cases.small_config(*common), 20).losses
    traces = pool.run(cases.train, world, cases.small_config(*common, *engine(stage, world, 2)), 20)
    assert traces[0]["losses"] == pytest.approx(expected, rel=1e-5, abs=0.0)


# (stage, world, ep)
JOURNEYS = [
    [(None, 4, 4), (2, 4, 2), (None, 1, 1), (1, 2, 2)],
    [(3, 4, 2), (None, 4, 2), (0, 2, 2), (3, 2, 1)],
    [(1, 4, 4), (3, 2, 2), (2, 4, 1), (0, 4, 2)],
]


@pytest.mark.parametrize("journey", some(JOURNEYS, JOURNEYS[:2]), ids=str)
def test_training_goes_on_under_another_engine(pool: Pool, tmp_path: Path, journey: list[Any]) -> None:
    configs = [cases.small_config("layout=deepseek", *engine(*leg)) for leg in journey]
    expected = oracle.run_oracle(configs[0], 2 * len(journey)).losses
    losses: dict[int, float] = {}
    for leg, config in enumerate(configs):
        args = (config, 2 * leg + 2, str(tmp_path), 2 * leg)
        answers = pool.run(cases.train_with_checkpoints, journey[leg][1], *args)
        losses |= answers[0]["losses"]
        saved = newest_valid(tmp_path)
        assert saved is not None
        assert saved.weights_digest == combine(answer["digest"] for answer in answers)
    assert [losses[step] for step in sorted(losses)] == pytest.approx(expected, rel=1e-5, abs=0.0)


def test_loading_changes_no_bit_at_any_stage(pool: Pool, tmp_path: Path) -> None:
    """Saved under the native engine, loaded and saved again under each stage, and back: all tensors alike."""
    layout = ["layout=mixtral"]
    native = cases.small_config(*layout, *engine(None, 2, 2))
    pool.run(cases.train_with_checkpoints, 2, native, 2, str(tmp_path), 0)
    before = whole_checkpoint(tmp_path)
    assert {name.split(".")[1] for name in before if name.startswith("optim.")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    for stage, world, ep in ((0, 2, 2), (1, 4, 2), (2, 2, 1), (3, 4, 4), (None, 2, 2)):
        config = cases.small_config(*layout, *engine(stage, world, ep))
        pool.run(cases.train_with_checkpoints, world, config, 2, str(tmp_path), 2)
        after = whole_checkpoint(tmp_path)
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), f"stage {stage}: {name}"


def whole_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    from parallel.engines.base import StateSlice

    found = newest_valid(directory)
    assert found is not None
    whole = {
        name: torch.full(entry.global_shape, math.nan, dtype=torch.float32)
        for name, entry in found.tensors.items()
    }
    found.load_into(StateSlice(n, tuple(t.shape), (0,) * t.dim(), t, True) for n, t in whole.items())
    return whole


def learn_one_batch(rank: int, world: int, config: RunConfig, steps: int) -> dict[str, Any]:
    """Losses of one batch seen again and again, and the dtypes of the state."""
    stepper = prepared(config)
    batch = oracle.batch_of_step(config, 0)
    share = config.train.global_batch // world
    mine = oracle.rows(batch, rank * share, (rank + 1) * share)
    losses = []
    for step in range(steps):
        totals = stepper.train_step(step, [mine]).totals
        losses.append(totals.mean(totals.cross_entropy))
    return {"losses": losses, "dtypes": {piece.tensor.dtype for piece in stepper.engine.named_state()}}


def prepared(config: RunConfig) -> Stepper:
    meshes = build_meshes(parallel_dims(config), "cpu")
    made = build_engine(config, meshes, torch.device("cpu"))
    made.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(made.model, made.named_state(), config.train.seed)
    return Stepper(made, config, torch.device("cpu"), wants_stop=lambda: False)


def test_bf16_learns_on_fp32_masters(pool: Pool) -> None:
    common = ["layout=mixtral", "train.dtype=bf16", "optim.lr=0.01", "train.steps=8"]
    native = pool.run(learn_one_batch, 2, cases.small_config(*common, *engine(None, 2, 2)), 8)[0]
    for stage in STAGES:
        found = pool.run(learn_one_batch, 2, cases.small_config(*common, *engine(stage, 2, 2)), 8)[0]
        assert found["losses"][-1] < found["losses"][0] - 0.1
        assert found["losses"] == pytest.approx(native["losses"], rel=5e-3)
        assert found["dtypes"] == {torch.float32}


def step_without_numbers(rank: int, world: int, config: RunConfig) -> tuple[float, bool]:
    """A step whose gradients are not finite: the norm, and whether the weights show it."""
    stepper = prepared(config)
    batch = oracle.batch_of_step(config, 0)
    loss = stepper.objective(stepper.forward(batch)) * math.inf
    stepper.engine.backward(loss, last=True)
    norm = float(stepper.engine.clip_gradients(1.0))
    stepper.engine.step(1e-3)
    weights = [piece.tensor for piece in stepper.engine.named_state() if piece.name.startswith("model.")]
    return norm, all(bool(torch.isfinite(weight).all()) for weight in weights)


@pytest.mark.parametrize("stage", some([None, *STAGES], [None, 2]))
def test_a_step_that_is_not_finite_is_not_passed_over_in_silence(pool: Pool, stage: int | None) -> None:
    config = cases.small_config("layout=mixtral", *engine(stage, 2, 2))
    for norm, finite in pool.run(step_without_numbers, 2, config):
        assert not math.isfinite(norm)
        assert not finite


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeeds_own_optimizer(pool: Pool, tmp_path: Path, stage: int) -> None:
    settings = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2000},
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1, "torch_adam": True}},
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    more = ["train.micro_batch=2", f"engine.ds_config={path}", "optim.weight_decay=0.1"]
    compare(pool, 2, ["layout=mixtral", "optim.weight_decay=0.1"], engine(stage, 2, 2, *more))


CONTRADICTIONS = {
    "train_batch_size": ({"train_batch_size": 16}, "it says train_batch_size=16, but train.global_batch=8"),
    "micro batch": (
        {"train_micro_batch_size_per_gpu": 1},
        "it says train_micro_batch_size_per_gpu=1, but train.micro_batch=4",
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 4},
        r"but train.global_batch / \(train.micro_batch · dp 2\)=1. Fix: gradient_accumulation_steps=1",
    ),
    "clipping": (
        {"gradient_clipping": 1.0},
        "gradient_clipping=1.0, but optim.max_grad_norm=0.5. Fix: gradient",
    ),
    "stage": (
        {"zero_optimization": {"stage": 3}},
        "zero_optimization.stage=3, but engine.zero_stage=2. Fix: .* or engine.zero_stage=3",
    ),
    "bf16": (
        {"bf16": {"enabled": True}},
        "bf16.enabled=true, but train.dtype is not bf16. Fix: train.dtype=bf16",
    ),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled=true, but train.dtype is fp32 or bf16"),
    "lr": (
        {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}},
        "it says optimizer.params.lr=0.1, but optim.lr=0.001. Fix: .* or optim.lr=0.1",
    ),
    "optimizer": (
        {"optimizer": {"type": "Lion"}},
        'optimizer.type="Lion"; checkpoints know the state of Adam',
    ),
    "fused": (
        {"optimizer": {"type": "Adam", "params": {"torch_adam": False}}},
        "torch_adam=false: DeepSpeed's fused Adam is compiled",
    ),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "its key scheduler.type is not one that is proven"),
    "offload": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "its key zero_optimization.offload_optimizer.device is not one",
    ),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_a_ds_config_that_contradicts_the_run_is_refused(tmp_path: Path, contradiction: str) -> None:
    settings, message = CONTRADICTIONS[contradiction]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        cases.small_config(*engine(2, 2, 1, f"engine.ds_config={path}", "optim.lr=0.001"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["engine=deepspeed", "engine.zero_stage=4"],
            "engine.zero_stage=4: ZeRO has the stages 0, 1, 2 and 3",
        ),
        (["engine.zero_stage=1"], "engine.zero_stage=1: only engine=deepspeed reads it"),
        (
            ["engine=deepspeed", "launcher.nproc_per_node=2", "parallel.dp_replicate=2"],
            "parallel.dp_replicate=2: DeepSpeed shards over all .* Fix: parallel.dp_replicate=1",
        ),
        (["engine=deepspeed", "engine.reshard_after_forward=false"], "belongs to engine=native"),
        (["engine=deepspeed", "engine.ds_config=/nowhere/ds.json"], "cannot be read as JSON: .*No such file"),
    ],
)
def test_fields_that_do_not_fit_the_engine_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cases.small_config(*overrides)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (2, 3, 4), (3, 1, 2), (2, 2, 2, 2)])
def test_a_flat_range_is_its_boxes_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = list(boxes(shape, start, stop))
        assert len(found) <= 2 * len(shape) - 1
        parts = [
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, size, strict=True))].flatten()
            for offsets, size in found
        ]
        values = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
        assert torch.equal(values, torch.arange(start, stop))


@pytest.mark.long
def test_verify_proves_a_run_with_a_ds_config(tmp_path: Path) -> None:
    """The real command: its batch and clipping are shrunk, and the file that repeats them still serves."""
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 1, "overlap_comm": False}})
    )
    overrides = [*engine(1, 2, 2), f"engine.ds_config={path}", f"run.root={tmp_path}"]
    result = subprocess.run([MUSTER, "verify", *overrides], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
