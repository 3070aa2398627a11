"""What a state is beside tensors, and its way into a checkpoint or a snapshot and back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engines.base import Replayable
from parallel.errors import ConfigError
from trainer import faults
from trainer.checkpoint.memory import rank_tensors_of, set_rank_tensors
from trainer.data.loader import merge_states
from trainer.layout_rules import split_of

if TYPE_CHECKING:
    from trainer.loop import Trainer


@dataclass
class TrainState:
    """What a resumed run must know beside weights, optimizer and data (all of it in every checkpoint)."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Input tokens of those steps, over all ranks."""
    untrained_loss: float | None = None
    """Held-out loss before the first step, nats a token."""
    valid_loss: float | None = None
    """Held-out loss of the newest evaluation."""
    best_loss: float | None = None
    best_step: int | None = None


def trainer_state(trainer: Trainer) -> dict[str, Any]:
    """JSON values; the same on every rank but for the loader, whose part of the streams is this rank's own."""
    return {
        **asdict(trainer.state),
        "split": split_of(trainer.config, trainer.dims),
        "loader": trainer.loader.state_dict(),
        "health": trainer.health.state_dict(),
        "cure": {} if trainer.cure is None else trainer.cure.state_dict(),
        "guard": {} if trainer.guard is None else trainer.guard.state_dict(),
        "callbacks": [
            {"target": entry.target, "state": callback.state_dict()}
            for entry, callback in zip(trainer.config.callbacks, trainer.callbacks, strict=True)
        ],
    }


def save_checkpoint(trainer: Trainer, best: bool) -> None:
    """See :meth:`trainer.loop.Trainer.save`. Collective."""
    since = time.perf_counter()
    trainer.stepper.enter("checkpoint")
    state = trainer_state(trainer)
    told: list[Any] = [None] * dist.get_world_size(trainer.control)
    dist.all_gather_object(told, (state["loader"], trainer.failed_saves.own()), group=trainer.control)
    trainer.failed_saves.agree([failed for _, failed in told])
    state["loader"] = merge_states([loader for loader, _ in told])
    info = {
        "parallel": str(trainer.dims),
        "torch": torch.__version__,
        "name": trainer.config.run.name,
        "timeline": trainer.timelines.current,
    }
    rank_tensors = rank_tensors_of(trainer.stepper.device)
    step = trainer.state.step
    trainer.checkpoints.save(step, trainer.engine.named_state(), state, rank_tensors, info, since)
    if best:
        trainer.checkpoints.mark_best(step)


def take_snapshot(trainer: Trainer) -> None:
    """Copy this rank's state to the memory tier, where there is one. No collective."""
    if trainer.memory is None:
        return
    began, peers, peer_every = time.perf_counter(), trainer.peers, trainer.config.checkpoint.peer_every
    sent = peers is not None and (peer_every < 0 or trainer.state.step % peer_every == 0)
    if sent and peers is not None:
        trainer.memory.wait()
        peers.wait()
    engine, update = trainer.engine, None
    if isinstance(engine, Replayable) and engine.keep_updates:
        update = engine.last_update()
    trainer.memory.snapshot(
        trainer.state.step,
        engine.named_state(),
        rank_tensors_of(trainer.stepper.device),
        trainer_state(trainer),
        trainer.timelines,
        peers.send if sent and peers is not None else None,
        update,
    )
    trainer.cadence.copied(time.perf_counter() - began)


def apply_state(trainer: Trainer, saved: Mapping[str, Any], rank_tensors: Mapping[str, Tensor]) -> str:
    """Take over what was saved beside the tensors of the model.

    Args:
        saved: from :func:`trainer_state`.
        rank_tensors: this rank's own; empty if the world that saved was another.

    Returns:
        What is to be said about callbacks that found no state of theirs, or states without a callback.

    Raises:
        ConfigError: it is of other data or, where that matters, of another split of the batch.
    """
    values = dict(saved)
    _check_split(trainer, values.pop("split", None))
    trainer.loader.load_state_dict(values.pop("loader"))
    trainer.health.load_state_dict(values.pop("health", {}))
    unclaimed = _load_callbacks(trainer, list(values.pop("callbacks")))
    watched = values.pop("cure", {})
    if trainer.cure is not None:
        trainer.cure.load_state_dict(watched)
    guarded = values.pop("guard", {})
    if trainer.guard is not None:
        trainer.guard.load_state_dict(guarded)
    trainer.state = TrainState(**values)
    if rank_tensors:
        set_rank_tensors(rank_tensors, trainer.stepper.device)
    faults.reach("load", trainer.state.step)
    return unclaimed


def _check_split(trainer: Trainer, saved: list[int] | None) -> None:
    split = split_of(trainer.config, trainer.dims)
    if split is not None and saved is not None and split != saved:
        raise ConfigError(
            "layout.balance.scope",
            "micro",
            f"the balance loss counts the rows of one forward pass; the checkpoint is of {saved[0]} "
            f"data-parallel rank(s) with train.micro_batch={saved[1]}, this layout has {split[0]} with "
            f"{split[1]}, which would train another objective",
            "the layout that wrote it, or layout.balance.scope=step",
        )


def _load_callbacks(trainer: Trainer, saved: list[dict[str, Any]]) -> str:
    """Give each callback the next saved state of its own target."""
    new = []
    for entry, callback in zip(trainer.config.callbacks, trainer.callbacks, strict=True):
        mine = next((item for item in saved if item["target"] == entry.target), None)
        if mine is None:
            new.append(entry.target)
        else:
            saved.remove(mine)
            callback.load_state_dict(mine["state"])
    gone = [item["target"] for item in saved if item["state"]]
    parts = [f"begin without saved state: {', '.join(new)}"] if new else []
    parts += [f"saved state of callbacks that are gone: {', '.join(gone)}"] if gone else []
    return "; ".join(parts)
