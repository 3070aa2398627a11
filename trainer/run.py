"""One rank from its environment to the end of training."""

from __future__ import annotations

import gc
import os
import socket
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.dims import ParallelDims
from parallel.engines.base import Engine
from parallel.errors import ConfigError
from parallel.mesh import Meshes, build_meshes
from trainer import faults
from trainer.bits import mix64_int
from trainer.build import (
    build_callbacks,
    build_dispatcher,
    build_engine,
    build_exchange_check,
    build_exchange_timer,
    build_model,
    torch_dtype,
)
from trainer.checkpoint.cadence import Cadence
from trainer.checkpoint.durable import DurableCheckpointer, check_room, check_writable, remove_stale
from trainer.checkpoint.failed import FailedSaves
from trainer.checkpoint.files import storage_error, write_durably
from trainer.checkpoint.lease import Lease, clean, memory_folder
from trainer.checkpoint.memory import MemoryTier
from trainer.checkpoint.timeline import Timelines
from trainer.checkpoint.whole import contents_of
from trainer.compose import plain
from trainer.config import Device, RunConfig, parallel_dims, profiled_steps
from trainer.cure.cure import build_cure
from trainer.data.loader import build_loader, valid_batches
from trainer.data.prepare import prepare_data
from trainer.data.tokenizer import TextTokenizer
from trainer.deadlines import Deadlines, depends_on
from trainer.guard.guard import build_guard
from trainer.guard.ledger import LEDGER_FILE, Ledger
from trainer.hardware import peak_flops
from trainer.health.monitor import Health
from trainer.liveness import Pulse
from trainer.loop import Trainer
from trainer.metrics.step import Hardware
from trainer.models.cost import model_cost
from trainer.profiling import Profile, is_profiled
from trainer.resilience import StopSignal
from trainer.restoring import begin
from trainer.runlog import RunLog
from trainer.step import Stepper
from trainer.straggler import Stragglers, WaitClock, compares_ranks

_SAVE_TIMEOUT_SECONDS = 600.0
_SHARED_SECONDS = 20.0
_PART_SECONDS = 10.0
_PATIENCE = 2.0
"""A rank in a phase of unknown length is waited for so many times as long as in a collective: whoever waits there
has given up by then, and has told of it."""


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        generation: counts the launches of a run, so that nothing of a dead one is mistaken for this.
        store: rendezvous of all ranks, with a key prefix of its own for this generation.
        agent: whether ``muster`` supervises this process.
    """

    rank: int
    local_rank: int
    world_size: int
    generation: int
    store: dist.Store
    agent: bool


def run_worker(
    config: RunConfig, run_dir: Path, place: Place, stop: StopSignal, pulse: Pulse | None = None
) -> bool:
    """Build everything, load the newest state, train. Returns whether the run is finished.

    Args:
        config: resolved and validated; the same on every rank.
        stop: asks this rank to save and leave.
        pulse: where it says how it gets on; None: nobody asks.

    Raises:
        ConfigError: an input that cannot work (StorageError among them).
    """
    torch.set_num_threads(config.train.num_threads)
    # Read when CUDA starts; makes cuBLAS repeatable.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling every new tensor with NaN costs time and only shows reads of memory that was never written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(mix64_int(config.train.seed + (place.rank << 32)) >> 1)
    pulse = pulse or Pulse()
    resilience = config.resilience
    patience = _PATIENCE * resilience.collective_timeout_seconds
    pulse.expect(patience, resilience.step_deadline_seconds, resilience.deadline_factor)
    device, control = join_ranks(config, place)
    dims = parallel_dims(config)
    meshes = build_meshes(dims, device.type)
    trainer = _build_trainer(config, run_dir, place, dims, meshes, device, control, stop)
    trainer.stepper.pulse, trainer.stepper.stop_cause = pulse, stop.cause
    clock, ep_rank = WaitClock(), dims.sparse_coordinate(place.rank)["ep"]
    of = depends_on(plain(config), place.world_size)
    trainer.deadlines = Deadlines(run_dir, of, pulse, writes=place.rank == 0)
    trainer.deadlines.recall()
    if compares_ranks(config, place.world_size):
        trainer.stragglers = Stragglers(
            config, place.rank, place.world_size, ep_rank, place.store, run_dir, clock
        )
        pulse.watchers.append(trainer.stragglers.look)
    if not gc.isenabled():  # trainer/__main__.py: for the imports
        gc.freeze()  # modules stay: no later collection need go through them
        gc.enable()
    try:
        with clock.running() if trainer.stragglers is not None else nullcontext():
            finished = trainer.train()
    except BaseException:
        trainer.log.close(complain=False)
        raise
    trainer.give_memory_back()  # all is on the disk; a run that dies leaves it for its restart
    trainer.log.close()
    _part(place)
    return finished


def _part(place: Place) -> None:
    """Leave together: gloo fails a rank that wakes late from its last collective and finds a peer gone by then.

    Through the store, and not for long: a rank that died meanwhile is for others to deal with.
    """
    until = time.monotonic() + _PART_SECONDS
    with suppress(RuntimeError):  # who hosts the store may have left, having seen everyone here
        count = place.store.add("parted", 1)
        while count < place.world_size and time.monotonic() < until:
            time.sleep(0.005)
            count = place.store.add("parted", 0)


def join_ranks(config: RunConfig, place: Place) -> tuple[torch.device, dist.ProcessGroup]:
    """This rank's device, and a gloo group over all ranks beside the default group. Collective.

    Raises:
        ConfigError: there is no GPU for this rank.
    """
    device = _device(config, place)
    timeout = timedelta(seconds=config.resilience.collective_timeout_seconds)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=place.store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert control is not None
    return device, control


def _device(config: RunConfig, place: Place) -> torch.device:
    if config.device is not Device.cuda:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ConfigError(
            "launcher.nproc_per_node",
            config.launcher.nproc_per_node,
            f"this machine has {count} GPU(s), and each process needs one of its own",
            f"launcher.nproc_per_node={count}" if count else "device=cpu",
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _build_trainer(
    config: RunConfig,
    run_dir: Path,
    place: Place,
    dims: ParallelDims,
    meshes: Meshes,
    device: torch.device,
    control: dist.ProcessGroup,
    stop: StopSignal,
) -> Trainer:
    directory = run_dir / "checkpoints"
    prepared = prepare_data(config)
    check = build_exchange_check(config, meshes, place.rank, place.store)
    timer = build_exchange_timer(meshes, device)
    dispatcher = build_dispatcher(meshes, check, config.parallel.max_tokens_in_flight, timer)
    model = build_model(config, dispatcher)
    hardware = Hardware(model_cost(model, config), peak_flops(device, torch_dtype(config)) * place.world_size)
    contents = contents_of(model)  # now that it is whole
    engine = build_engine(config, meshes, device)
    engine.prepare(model)
    if place.rank == 0:
        check_writable(directory)
        remove_stale(directory, str(place.generation))
    _prove_shared(directory, place, control)
    dp_rank = dims.dp_rank(place.rank)
    log = RunLog(run_dir, config, plain(config), active=place.rank == 0, terminal=not place.agent)
    stepper = Stepper(engine, config, device, stop.requested, check)
    checkpoints = DurableCheckpointer(
        directory,
        place.rank,
        place.world_size,
        str(place.generation),
        config.checkpoint.keep_last,
        config.checkpoint.keep_every,
        _SAVE_TIMEOUT_SECONDS,
        contents,
    )
    steps = profiled_steps(config)
    ledger = Ledger(run_dir / LEDGER_FILE, prepared.fingerprint, config.train.global_batch)
    trainer = Trainer(
        config=config,
        dims=dims,
        rank=place.rank,
        run_dir=run_dir,
        engine=engine,
        stepper=stepper,
        loader=build_loader(prepared, config, dp_rank, dims.dp),
        prepared=prepared,
        valid=list(valid_batches(prepared, config, dp_rank, dims.dp)) if config.eval.every else [],
        checkpoints=checkpoints,
        failed_saves=FailedSaves(checkpoints, config.checkpoint.max_failed_saves, log),
        log=log,
        callbacks=build_callbacks(config),
        health=Health(config, place.rank, place.world_size, run_dir, prepared, device, log, timer),
        hardware=hardware,
        control=control,
        cadence=Cadence(config.checkpoint.memory_every, control),
        timelines=Timelines(),
        cure=build_cure(config, engine, stepper, control),
        guard=build_guard(config, dims, stepper, control, ledger, log),
        memory=_build_memory(config, run_dir, place, dims),
        profile=Profile(steps, run_dir, place.rank, log) if steps and is_profiled(place.rank, dims) else None,
    )
    if place.rank == 0:
        check_room(directory, _checkpoint_bytes(engine))
        _keep_tokenizer(prepared.tokenizer, run_dir / "tokenizer.json")
    faults.arm(trainer, place)
    begin(trainer, place.generation, device)
    return trainer


def _build_memory(config: RunConfig, run_dir: Path, place: Place, dims: ParallelDims) -> MemoryTier | None:
    """This rank's snapshots, those of a former process included; None where they are off."""
    checkpoint = config.checkpoint
    if checkpoint.memory_every == 0:
        return None
    folder = memory_folder(checkpoint.memory_dir, run_dir)
    lease = Lease(folder, run_dir)
    if place.local_rank == 0:
        clean(folder.parent, folder)
    all_sent = checkpoint.peer_every in (-1, 0, checkpoint.memory_every)
    num_slots = max(
        checkpoint.memory_slots, 3 if all_sent else 5
    )  # two that peers have, beside the newest three
    layout = f"{dims} of {place.world_size} ranks, {config.engine.name.value}"
    num_updates = checkpoint.memory_log if checkpoint.memory_every == 1 else 0
    return MemoryTier(lease, place.rank, place.world_size, place.generation, layout, num_slots, num_updates)


def _prove_shared(directory: Path, place: Place, control: dist.ProcessGroup) -> None:
    """Every rank shows that it sees the directory that rank 0 sees: a checkpoint is written by all of them.

    Raises (on every rank):
        ConfigError: some do not; the message names their hosts.
    """
    probe = directory / f".seen-{place.generation}"
    if place.rank == 0:
        probe.touch()
    dist.barrier(group=control)
    until = time.monotonic() + _SHARED_SECONDS  # network file systems cache directories for a while
    while not probe.exists() and time.monotonic() < until:
        next(iter(directory.glob("*")), None)  # a listing makes the client look again
        time.sleep(0.5)
    blind: list[str | None] = [None] * place.world_size
    dist.all_gather_object(blind, None if probe.exists() else socket.gethostname(), group=control)
    if place.rank == 0:
        probe.unlink()
    if any(blind):
        hosts = ", ".join(sorted({host for host in blind if host is not None}))
        raise ConfigError(
            "run.root",
            directory,
            f"every node must see the same run directory; {hosts} cannot see what rank 0 wrote there",
            "run.root=DIRECTORY on a file system that all nodes share",
        )


def _keep_tokenizer(tokenizer: TextTokenizer, path: Path) -> None:
    """Beside the checkpoints, for generation."""
    content = tokenizer.to_json().encode()
    try:
        if not path.is_file() or path.read_bytes() != content:
            write_durably(path, content)
    except OSError as error:
        raise storage_error(error, path, len(content), field="run.root") from error


def _checkpoint_bytes(engine: Engine) -> int:
    """What one checkpoint of the whole run takes, as if this rank's share were everyone's."""
    owned = (piece.tensor for piece in engine.named_state() if piece.owner)
    return sum(tensor.numel() * tensor.element_size() for tensor in owned) * dist.get_world_size()
