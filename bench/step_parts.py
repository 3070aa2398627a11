"""Which part of a training step takes how long, from PyTorch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from bench.step_contestant import Muster

_NODE = "autograd::engine::evaluate_function: "
_OURS = "part: "


def parts_of(contestant: Muster, step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds a step of each part, forward and backward together, largest first.

    An operator belongs to the innermost part whose range it is in; a backward node to the part of the operator
    that made it, which it shares a sequence number with. ``rest`` is what is in no part.
    """
    with _ranges(contestant), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            with record_function(f"{_OURS}rest"):
                step()
    return {
        name: micros / 1000 / steps
        for name, micros in sorted(_spent(list(profiler.events())).items(), key=lambda item: -item[1])
    }


def _spent(events: list[Any]) -> dict[str, float]:
    """Microseconds of each part. The events' tree is the thread's that ran the step."""
    spent: dict[str, float] = defaultdict(float)
    maker: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(_NODE) and _node(event) is None:
            part = _part(event)
            if part is not None:
                maker[event.sequence_nr] = part
    for event in events:
        if event.name.startswith(_OURS):
            name = event.name.removeprefix(_OURS)
            spent[name] += event.time_range.elapsed_us()
            outer = None if event.cpu_parent is None else _part(event.cpu_parent)
            if outer is not None:
                spent[outer] -= event.time_range.elapsed_us()
        elif event.name.startswith(_NODE) and _node(event.cpu_parent) is None:
            inside = _part(event)
            name = maker.get(event.sequence_nr, "gradients kept")
            spent[name] += event.time_range.elapsed_us()
            if inside is not None:
                spent[inside] -= event.time_range.elapsed_us()
    return spent


def _part(event: Any) -> str | None:
    while event is not None and not event.name.startswith(_OURS):
        event = event.cpu_parent
    return None if event is None else event.name.removeprefix(_OURS)


def _node(event: Any) -> Any:
    while event is not None and not event.name.startswith(_NODE):
        event = event.cpu_parent
    return event


@contextmanager
def _ranges(contestant: Muster) -> Iterator[None]:
    """Puts a range around every part."""
    undo: list[Callable[[], object]] = []
    model, engine = contestant.engine.model, contestant.engine

    def around(owner: Any, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            with record_function(_OURS + part):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)
        undo.append(lambda: delattr(owner, method))

    around(model, "forward", "embedding, head, loss")
    for block in model.layers:
        around(block, "forward", "residuals")
        around(block.attention, "forward", "attention")
        for norm in (block.attention_norm, block.ffn_norm):
            around(norm, "forward", "norms")
        around(block.feed_forward, "forward", "dispatch and combine")
        around(block.feed_forward.router, "forward", "router")
        around(block.feed_forward.experts, "forward", "experts")
    around(engine, "backward", "backward, between nodes")
    around(engine, "clip_gradients", "clipping")
    around(engine, "step", "optimizer")
    try:
        yield
    finally:
        for one in undo:
            one()
