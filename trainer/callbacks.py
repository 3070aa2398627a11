"""Hooks of the user's own, named in the config as ``callbacks: [{target: package.module:Class, kwargs: …}]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data.batch import Batch
    from trainer.loop import Trainer


class Callback:
    """Subclass and override what you need. Hooks run on every rank, at the same point of the run.

    A hook may write weights or optimizer state in :meth:`on_start` and :meth:`on_step_end`; anywhere else the
    guard takes that for silent corruption. A hook that issues collectives must do so on every rank. An exception
    in a hook fails the run like any other error. Metrics of your own: return numbers from :meth:`on_step_end`
    under names ``user/…``; rank 0's are logged.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process, with state loaded."""

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        """This rank's micro-batches of the step that begins (``trainer.state.step`` steps are done)."""

    def on_gradients(self, trainer: Trainer) -> None:
        """After the last backward of a step, before clipping (``trainer.engine.named_gradients()``)."""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> dict[str, float] | None:
        """After each optimizer step; ``metrics`` is what rank 0 logs, empty on other ranks and on steps that
        are not logged (``logger.every``), where what is returned is dropped."""
        return None

    def on_evaluation(self, trainer: Trainer, loss: float) -> None:
        """After an evaluation, with the held-out loss in nats a token."""

    def on_finish(self, trainer: Trainer) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state saved with every checkpoint (rank 0's is kept)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called on every rank before ``on_start`` of a resumed run."""
