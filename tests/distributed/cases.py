"""Functions that run on the pool's ranks, and the small configs they run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.errors import ConfigError
from parallel.mesh import build_meshes
from tests.configs import composed
from tests.distributed import oracle
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.checkpoint.digest import weights_digest
from trainer.checkpoint.durable import DurableCheckpointer, StorageError
from trainer.checkpoint.resume import newest_valid
from trainer.checkpoint.whole import contents_of
from trainer.config import Machine, RunConfig, parallel_dims, resolve
from trainer.models.init import initialise
from trainer.rules import validate
from trainer.step import Stepper

SMALL = [
    "device=cpu",
    "model.dim=32",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_dim=48",
    "data.tokenizer.vocab_size=264",
    "train.global_batch=8",
    "train.seq_len=24",
    "train.steps=10",
    "train.num_threads=1",
    "optim.warmup_steps=2",
    "optim.max_grad_norm=0.5",
    # AdamW divides a gradient by its own size: with 1e-8, one element whose gradient was 3e-8 (median 3e-3) turned
    # rounding into 5e-6 of weight, which was nearly all of its tensor's deviation.
    "optim.eps=1e-6",
    "layout.balance.coefficient=0.05",
    "layout.balance.router_z=0.01",
    "checkpoint.memory_every=0",
]
"""Overrides given after these win."""


def small_config(*overrides: str) -> RunConfig:
    """A complete config of a few thousand parameters."""
    config = resolve(composed(*SMALL, *overrides), Machine(num_cpus=2))
    validate(config)
    return config


def train(rank: int, world: int, config: RunConfig, steps: int) -> dict[str, Any]:
    """Train through the product's engine and stepper on this rank's rows of the oracle's batches."""
    dims = parallel_dims(config)
    meshes = build_meshes(dims, "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    dispatcher = build_dispatcher(meshes, budget=config.parallel.max_tokens_in_flight)
    engine.prepare(build_model(config, dispatcher))
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)
    gradients: list[Any] = []
    clip = engine.clip_gradients

    def spy(max_norm: float) -> torch.Tensor:
        if not gradients:
            gradients.extend(_cut(piece) for piece in engine.named_gradients())
        return clip(max_norm)

    engine.clip_gradients = spy  # type: ignore[method-assign]
    trace: dict[str, Any] = {"losses": [], "norms": [], "counts": []}
    share, micro = config.train.global_batch // dims.dp, config.train.micro_batch
    first = dims.dp_rank(rank) * share
    for step in range(steps):
        batch = oracle.batch_of_step(config, step)
        batches = [oracle.rows(batch, i, i + micro) for i in range(first, first + share, micro)]
        result = stepper.train_step(step, batches)
        trace["losses"].append(result.totals.mean(result.totals.cross_entropy))
        trace["norms"].append(float(result.grad_norm))
        trace["counts"].append(result.totals.counts_LE.tolist())
    trace["gradients"] = gradients
    trace["weights"] = [_cut(piece) for piece in engine.named_state() if piece.name.startswith("model.")]
    return trace


def _cut(piece: Any) -> tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor, bool]:
    name = piece.name.removeprefix("model.")
    return name, piece.global_shape, piece.offsets, piece.tensor.clone(), piece.owner


def assemble(per_rank: list[list[Any]]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' owned slices; asserts that every element is owned exactly once."""
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for slices in per_rank:
        for name, shape, offsets, tensor, owner in slices:
            if not owner:
                continue
            target = whole.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))
            mask = seen.setdefault(name, torch.zeros(shape, dtype=torch.int64))
            window = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
            target[window] = tensor
            mask[window] += 1
    for name, mask in seen.items():
        assert bool((mask == 1).all()), f"{name}: some elements are owned by no rank or by several"
    return whole


def train_with_checkpoints(
    rank: int, world: int, config: RunConfig, steps: int, directory: str, start: int
) -> dict[str, Any]:
    """Load the newest checkpoint of ``directory`` if there is one (it must be of step ``start``), train to
    ``steps``, save there. Returns losses by step, and the digest."""
    dims = parallel_dims(config)
    meshes = build_meshes(dims, "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    model = build_model(config, build_dispatcher(meshes))
    contents = contents_of(model)
    engine.prepare(model)
    initialise(engine.model, engine.named_state(), config.train.seed)
    attempt = f"{start}-{world}-{dims.ep}"
    saver = DurableCheckpointer(Path(directory), rank, world, attempt, 2, 0, 60.0, contents)
    found = newest_valid(Path(directory))
    assert (found.step if found else 0) == start
    if found:
        found.load_into(engine.named_state())
    stepper = Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)
    share, micro = config.train.global_batch // dims.dp, config.train.micro_batch
    first, losses = dims.dp_rank(rank) * share, {}
    for step in range(start, steps):
        batch = oracle.batch_of_step(config, step)
        batches = [oracle.rows(batch, i, i + micro) for i in range(first, first + share, micro)]
        result = stepper.train_step(step, batches)
        losses[step] = result.totals.mean(result.totals.cross_entropy)
    saver.save(steps, engine.named_state(), {"step": steps}, {}, {})
    saver.wait()
    own = weights_digest(piece for piece in engine.named_state() if piece.name.startswith("model."))
    return {"losses": losses, "digest": own}


def save_without_rank_1(rank: int, world: int, config: RunConfig, directory: str) -> None:
    """A checkpoint to which rank 1 brings its biggest expert tensor as if somebody else owned it."""
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(engine.model, engine.named_state(), 0)
    slices = [
        replace(piece, owner=piece.owner and not (rank == 1 and piece.name.endswith("experts.w1")))
        for piece in engine.named_state()
    ]
    saver = DurableCheckpointer(Path(directory), rank, world, "a", 1, 0, 30.0)
    saver.save(1, slices, {}, {}, {})
    saver.wait()


def save_without_a_parameter(rank: int, world: int, config: RunConfig, directory: str, lost: str) -> str:
    """A checkpoint of step 1 of all that the engine names, then one of step 2 without what is named so.

    Returns what the second save was refused for.
    """
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    model = build_model(config, build_dispatcher(meshes))
    contents = contents_of(model)
    engine.prepare(model)
    initialise(engine.model, engine.named_state(), 0)
    saver = DurableCheckpointer(Path(directory), rank, world, "a", 1, 0, 30.0, contents)
    saver.save(1, engine.named_state(), {}, {}, {})
    saver.wait()
    slices = [piece for piece in engine.named_state() if not fnmatch(piece.name, lost)]
    saver.save(2, slices, {}, {}, {})
    try:
        saver.wait()
    except StorageError as error:
        return str(error)
    return ""


def see_directory(rank: int, world: int, directories: list[str]) -> str:
    """Each rank looks at a directory of its own; what it is told."""
    from trainer import run

    run._SHARED_SECONDS = 0.1
    control = dist.new_group(backend="gloo")
    place = run.Place(rank, rank, world, generation=0, store=dist.HashStore(), agent=False)
    try:
        run._prove_shared(Path(directories[rank]), place, control)
    except ConfigError as error:
        return str(error)
    return "seen"


def prove_layout(
    rank: int,
    world: int,
    store: dist.Store,
    config: RunConfig,
    run_dir: str,
    generation: int,
    mutation: str | None,
) -> None:
    """A worker of `muster verify` in this process, with a bug injected."""
    from tests.distributed.mutations import MUTATIONS
    from trainer.resilience import StopSignal
    from trainer.run import Place, run_worker

    place = Place(rank, rank, world, generation, store, agent=True)
    with MUTATIONS[mutation](config, rank) if mutation else nullcontext():
        run_worker(config, Path(run_dir), place, StopSignal())


def dtypes_in_forward(rank: int, world: int, config: RunConfig) -> dict[str, str]:
    """The dtype in which each kind of weight takes part in a forward pass, and that of masters and gradients."""
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(engine.model, engine.named_state(), 0)
    seen: dict[str, str] = {}

    def look(name: str) -> Any:
        def hook(module: torch.nn.Module, *_: Any) -> None:
            for leaf, parameter in module.named_parameters(recurse=False):
                seen[f"{name}.{leaf}"] = str(parameter.dtype)

        return hook

    for name, module in engine.model.named_modules():
        module.register_forward_pre_hook(look(name))
    stepper = Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)
    share = config.train.global_batch // world
    stepper.train_step(0, [oracle.rows(oracle.batch_of_step(config, 0), rank * share, (rank + 1) * share)])
    masters = {str(piece.tensor.dtype) for piece in engine.named_state()}
    return {**seen, "masters": ",".join(sorted(masters))}
