"""Where a run goes on from: at its start, and when it is rolled back in the middle."""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from parallel.engines.base import Replayable, Update, forget_gathered
from parallel.errors import ConfigError
from trainer.checkpoint.election import Election
from trainer.checkpoint.memory import Claim, check_claims, rank_tensors_of
from trainer.checkpoint.peer import Member, PeerTier, address_towards
from trainer.checkpoint.resume import Checkpoint, open_checkpoint, warn_skipped
from trainer.checkpoint.timeline import Timelines
from trainer.checkpoint.vote import Tier
from trainer.hardware import device_name
from trainer.models.init import fill_buffers, initialise
from trainer.saving import apply_state

if TYPE_CHECKING:
    from trainer.loop import Trainer

Alarm = tuple[str, str]
"""Kind and message."""


def begin(trainer: Trainer, generation: int, device: torch.device) -> None:
    """Load the newest state or initialise, and open the log of this generation. Collective.

    Raises:
        ConfigError: there are checkpoints and none is valid, or the state is of another model, optimizer or data.
    """
    mine = Timelines.read(trainer.run_dir) if trainer.rank == 0 else None
    trainer.timelines = _gather(trainer, mine)[0]
    _meet_peers(trainer)
    loaded = _load(trainer, None)
    trainer.link_best()
    alarms = loaded.alarms + _reserve(trainer)
    resume = None
    if loaded.tier is not None:
        resume = {"tier": loaded.tier.value, "path": loaded.path, "load_seconds": loaded.seconds}
    trainer.log.begin(trainer.state.step, _start_fields(trainer, generation, device), resume)
    for kind, message in alarms:
        trainer.log.event("alarm", trainer.state.step, kind=kind, message=message)


def restore(trainer: Trainer, at_most: int | None, reason: str) -> int:
    """See :meth:`trainer.loop.Trainer.restore`."""
    from_step = trainer.state.step
    trainer.stepper.enter("restore")
    trainer.checkpoints.join()  # a save of the future that is given up must not be committed later
    for parameter in trainer.engine.model.parameters():
        parameter.grad = None
    loaded = _load(trainer, at_most)
    forget_gathered(trainer.engine.model)
    trainer.num_restores += 1
    trainer.result = None
    trainer.forget_times()
    trainer.health.begin(trainer.state.step)
    fields = {
        "from_step": from_step,
        "restores": trainer.num_restores,
        "reason": reason,
        "tier": "start" if loaded.tier is None else loaded.tier.value,
        "load_seconds": loaded.seconds,
    }
    trainer.log.roll_back(trainer.state.step, fields)
    trainer.link_best()
    for kind, message in loaded.alarms:
        trainer.log.event("alarm", trainer.state.step, kind=kind, message=message)
    return trainer.state.step


@dataclass(frozen=True)
class _Loaded:
    """What was found, and where; ``tier`` None: nothing, the run begins."""

    tier: Tier | None
    path: str
    seconds: float
    alarms: list[Alarm]


def _load(trainer: Trainer, at_most: int | None) -> _Loaded:
    """Agree on a state, take it over, and begin a timeline there. Collective."""
    began = time.perf_counter()
    election = Election(
        trainer.checkpoints.directory,
        trainer.timelines,
        trainer.control,
        trainer.memory,
        trainer.peers,
        trainer.members,
    )
    slices, rank_tensors = list(trainer.engine.named_state()), rank_tensors_of(trainer.stepper.device)
    update = _example_update(trainer)
    if update is not None and trainer.memory is not None:
        trainer.memory.log.plan(update, rank_tensors)
    choice = election.run(slices, rank_tensors, at_most)
    checkpoint, path = election.checkpoint, ""
    alarms = election.alarms
    is_import = checkpoint is not None and not checkpoint.trainer  # weights alone
    if choice is None or is_import:
        checkpoint, unclaimed = _load_origin(trainer, checkpoint, alarms)
        tier = None if checkpoint is None else Tier.durable
    elif checkpoint is not None:
        fill_buffers(trainer.engine.model)  # those that no checkpoint holds
        tier, unclaimed = choice.tier, _load_checkpoint(trainer, checkpoint)
    else:
        assert trainer.memory is not None
        fill_buffers(trainer.engine.model)
        engine = trainer.engine
        again = engine.replay if isinstance(engine, Replayable) else None
        state, tensors = trainer.memory.load(choice.snapshot, slices, list(rank_tensors), again)
        tier, unclaimed = choice.tier, apply_state(trainer, state, tensors)
        path = str(trainer.memory.lease.folder)
    if checkpoint is not None:
        path = str(checkpoint.path)
    if unclaimed:
        alarms.append(("callbacks_changed", unclaimed))
    trainer.timelines.begin(trainer.state.step)
    if trainer.rank == 0:
        trainer.timelines.write(trainer.run_dir)
    dist.barrier(group=trainer.control)  # nothing of the new timeline is kept before it is on the disk
    return _Loaded(tier, path, time.perf_counter() - began, alarms)


def _load_checkpoint(trainer: Trainer, checkpoint: Checkpoint) -> str:
    """All of a checkpoint's state, whatever layout wrote it; returns as :func:`trainer.saving.apply_state`."""
    checkpoint.load_into(trainer.engine.named_state())
    same_world = checkpoint.world_size == trainer.dims.world_size
    return apply_state(
        trainer, checkpoint.trainer, checkpoint.rank_tensors(trainer.rank) if same_world else {}
    )


def _load_origin(
    trainer: Trainer, imported: Checkpoint | None, alarms: list[Alarm]
) -> tuple[Checkpoint | None, str]:
    """What a run begins with that has no state of its own. Collective.

    Args:
        imported: the weights in its own directory; None: ``checkpoint.load_from``, or new weights.

    Raises:
        RuntimeError: this process went on from a state that is gone meanwhile; only a restart can begin anew.
    """
    config, again = trainer.config, trainer.has_begun
    if again and trainer.first_state is None:
        raise RuntimeError("no state is left that the run could go back to")
    found = imported
    if found is None and config.checkpoint.load_from is not None:
        found = _open_origin(trainer, alarms)
    weights_only = found is not None and (config.checkpoint.load_weights_only or not found.trainer)
    if found is None or weights_only:
        initialise(trainer.engine.model, trainer.engine.named_state(), config.train.seed)
    fill_buffers(trainer.engine.model)  # before the load: what is in a checkpoint comes from there
    unclaimed = ""
    if found is not None and weights_only:
        weights = (piece for piece in trainer.engine.named_state() if piece.name.startswith("model."))
        found.load_into(weights, prefix="model.")
    elif found is not None:
        unclaimed = _load_checkpoint(trainer, found)
    if again and trainer.first_state is not None:
        apply_state(trainer, *trainer.first_state)
    trainer.began_anew = True
    return found, unclaimed


def _open_origin(trainer: Trainer, alarms: list[Alarm]) -> Checkpoint:
    """What ``checkpoint.load_from`` names. Rank 0 verifies it; where it raises, its exit ends the others."""

    def skip(path: Path, reason: str) -> None:
        warn_skipped(path, reason)
        alarms.append(("corrupt_checkpoint", f"skipped a damaged checkpoint: {path} {reason}"))

    load_from = Path(str(trainer.config.checkpoint.load_from))
    found = open_checkpoint(load_from, on_skip=skip) if trainer.rank == 0 else None
    path = _gather(trainer, None if found is None else str(found.path))[0]
    return found or open_checkpoint(Path(path), verify=False)


def _meet_peers(trainer: Trainer) -> None:
    """Where the ranks are on several hosts: everyone learns where the others listen. Collective."""
    memory = trainer.memory
    if memory is None or trainer.config.checkpoint.peer_every == 0:
        return
    host = socket.gethostname()
    told = _gather(trainer, (host, secrets.token_hex(16)))
    if len({name for name, _ in told}) == 1:
        return
    plan = memory.plan(list(trainer.engine.named_state()), rank_tensors_of(trainer.stepper.device))
    address = address_towards(os.environ["MASTER_ADDR"])
    trainer.peers = PeerTier(memory, address, token=told[0][1])
    trainer.members = _gather(trainer, Member(host, address, trainer.peers.port, plan.room))


def _reserve(trainer: Trainer) -> list[Alarm]:
    """Reserve the memory of all slots, or do without where they were not asked for. Collective.

    Raises:
        ConfigError: there is no room, and ``checkpoint.memory_every`` asks for them.
    """
    memory = trainer.memory
    if memory is None:
        return []
    slices, rank_tensors = list(trainer.engine.named_state()), rank_tensors_of(trainer.stepper.device)
    peers, engine = trainer.peers, trainer.engine
    all_sent = peers is not None and trainer.config.checkpoint.peer_every in (-1, 1)
    update = None if all_sent else _example_update(trainer)
    claim = memory.claim(socket.gethostname(), slices, rank_tensors, update)
    if peers is not None:
        claim = replace(claim, missing=claim.missing + peers.missing(trainer.rank, trainer.members))
    claims: list[Claim] = _gather(trainer, claim)
    error = check_claims(claims)
    if error is None:
        try:
            memory.prepare(trainer.stepper.device)
            if peers is not None:
                peers.join(trainer.rank, trainer.members)
        except ConfigError as mine:
            error = mine
        told = _gather(
            trainer, None if error is None else (error.field, str(error.value), error.relation, error.fix)
        )
        error = next((ConfigError(*other) for other in told if other is not None), None)
    if error is None:
        if update is not None and isinstance(engine, Replayable):
            engine.keep_updates = True
        return []
    if trainer.config.checkpoint.memory_every > 0:
        raise error
    trainer.give_memory_back()
    trainer.cadence.every, trainer.cadence.automatic = 0, False
    return [("memory_tier", f"no snapshots in memory: {error}")]


def _example_update(trainer: Trainer) -> Update | None:
    """One of the form that snapshots may be given; None: they are all of everything."""
    engine, memory = trainer.engine, trainer.memory
    if memory is None or not memory.log.length or not isinstance(engine, Replayable) or not engine.can_replay:
        return None
    return engine.example_update()


def _start_fields(trainer: Trainer, generation: int, device: torch.device) -> dict[str, Any]:
    config, cost = trainer.config, trainer.hardware.cost
    return {
        "generation": generation,
        "world_size": trainer.dims.world_size,
        "parallel": str(trainer.dims),
        "device": device_name(device),
        "num_parameters": cost.num_parameters,
        "num_active_parameters": cost.num_active,
        "run_dir": str(trainer.run_dir),
        "steps": config.train.steps,
        "train_rows": trainer.prepared.num_train_rows,
        "tokens_per_step": config.train.global_batch * config.train.seq_len,
        "config": {
            "model": config.model.name,
            "layout": config.layout.name,
            "data": config.data.source.value,
            "dtype": config.train.dtype.value,
            "engine": config.engine.name.value,
            "unigram_loss": round(trainer.prepared.unigram_loss, 3),
        },
    }


def _gather(trainer: Trainer, mine: Any) -> list[Any]:
    found: list[Any] = [None] * trainer.dims.world_size
    dist.all_gather_object(found, mine, group=trainer.control)
    return found
