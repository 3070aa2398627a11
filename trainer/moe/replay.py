"""Routing decided elsewhere: a recorded trace takes the place of the routers' own choices.

So two precisions, engines or programs can be compared without a near tie sending a token another way, and a
policy's training can follow the routes of the rollout that it learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_given: ContextVar[Iterator[Tensor] | None] = ContextVar("given", default=None)


@contextmanager
def replaying(expert_LBSK: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the routers of one forward pass take these choices, in the order in which they are called.

    Args:
        expert_LBSK: int64 ``[B, S, K]`` a MoE layer, as ``MoeStats.expert_BSK``. Weights follow from the
            layer's own scores of the given experts, with gradient.
    """
    token = _given.set(iter(expert_LBSK))
    try:
        yield
    finally:
        _given.reset(token)


def choice_or_given(choose: Callable[[], Tensor]) -> Tensor:
    """``choose()``, or inside :func:`replaying` the next layer's given choices."""
    given = _given.get()
    if given is None:
        return choose()
    found = next(given, None)
    assert found is not None, "the trace has fewer layers than the model has routers"
    return found
