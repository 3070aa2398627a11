"""Activation checkpointing that replays what must not be decided or sent twice.

Inside :func:`recomputed`, values that pass through :func:`recorded` in the first forward are kept and handed
out again, in order, when backward runs the function anew. The router's choices and whatever an exchange
brought go through it, so a token is never routed a second time and a layer under recompute costs four
all-to-alls, not six. All else is computed again.

:class:`Rerun` is the same for who does his own recomputation (:mod:`parallel.dispatch.bounded`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


class _Tape:
    def __init__(self) -> None:
        self.values: list[Any] = []
        self.position: int | None = None  # None while recording


_tape: ContextVar[_Tape | None] = ContextVar("tape", default=None)


def recorded(make: Callable[[], T]) -> T:
    """``make()``, or in a recomputation what it returned the first time. Tensors are kept without graph."""
    tape = _tape.get()
    if tape is None:
        return make()
    if tape.position is None:
        value = make()
        tape.values.append(value.detach() if isinstance(value, Tensor) else value)
        return value
    tape.position += 1
    return tape.values[tape.position - 1]


def being_taped() -> bool:
    """Whether this is inside :func:`recomputed`."""
    return _tape.get() is not None


class _Play(AbstractContextManager[None]):
    """Puts a tape in place; may be entered again, as a second backward over a kept graph does."""

    def __init__(self, tape: _Tape, replay: bool) -> None:
        self._tape, self._replay = tape, replay

    def __enter__(self) -> None:
        self._tape.position = 0 if self._replay else None
        self._token = _tape.set(self._tape)

    def __exit__(self, *error: object) -> None:
        _tape.reset(self._token)


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` keeping only its inputs and recorded values for backward (arXiv:1604.06174).

    Inside another such call it is the outer one that keeps and recomputes.
    """
    if _tape.get() is not None:
        return function(*args)

    def contexts() -> tuple[_Play, _Play]:
        tape = _Tape()
        return _Play(tape, replay=False), _Play(tape, replay=True)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


class Rerun:
    """A function's first run and its second, which decides and draws as the first did.

    What the function passes through :func:`recorded` is kept here, whatever tape is in place around it, and
    random numbers are drawn from the state that the first run began with.
    """

    def __init__(self) -> None:
        self._tape = _Tape()

    def first(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``, recorded."""
        self._cpu = torch.get_rng_state()
        self._cuda = {
            device: torch.cuda.get_rng_state(device)
            for device in {a.device for a in args if isinstance(a, Tensor) and a.is_cuda}
        }
        with _Play(self._tape, replay=False):
            return function(*args)

    def again(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` with the same values; any number of times."""
        with torch.random.fork_rng(devices=list(self._cuda)), _Play(self._tape, replay=True):
            torch.set_rng_state(self._cpu)
            for device, state in self._cuda.items():
                torch.cuda.set_rng_state(state, device)
            return function(*args)
