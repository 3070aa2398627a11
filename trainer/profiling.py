"""Where a step's time goes: PyTorch's profiler over some steps of a run, its times added up by part of the model.

A trace is one JSON file a rank, for https://ui.perfetto.dev; beside it a text says what the parts and the slowest
operators took. Nothing is in the way of a step that is not profiled, and none computes other bits for being so.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from parallel.collectives import EXCHANGE_RANGE
from parallel.dims import ParallelDims
from trainer.models.attention import GroupedQueryAttention, LatentAttention
from trainer.models.layers import FeedForward, RMSNorm
from trainer.models.transformer import Block, Transformer
from trainer.moe.experts import Experts, SizedExperts
from trainer.moe.layer import MoeLayer
from trainer.moe.router import Router

if TYPE_CHECKING:
    from trainer.loop import Trainer
    from trainer.runlog import RunLog
    from trainer.step import Stepper

_PREFIX = EXCHANGE_RANGE.removesuffix("exchange")
_NODE = "autograd::engine::evaluate_function: "
_REST = "rest"
_ROWS = 40
_PARTS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((Transformer,), "embedding, head, loss"),
    ((Block,), "residuals, all that is compiled"),
    ((GroupedQueryAttention, LatentAttention), "attention"),
    ((RMSNorm,), "norms"),
    ((MoeLayer,), "dispatch and combine"),
    ((Router,), "router"),
    ((Experts, SizedExperts), "experts"),
    ((FeedForward,), "dense and shared feed-forward"),
)
Owned = tuple[object, str, str]
"""An object, one of its methods, and the part that a call of it is."""


class Profile:
    """The profile of some steps of a run, written when the last of them is done.

    Args:
        steps: the first and the last one.
        run_dir: of the run; all ranks write to ``profile/steps-FIRST-LAST`` in it.
        rank: of this process.
        log: told what was written, by rank 0.
    """

    def __init__(self, steps: tuple[int, int], run_dir: Path, rank: int, log: RunLog) -> None:
        self.steps, self.rank, self.log = steps, rank, log
        self.folder = run_dir / "profile" / f"steps-{steps[0]}-{steps[1]}"
        self._open: _Recording | None = None
        self._began = 0

    def reach(self, step: int, trainer: Trainer) -> None:
        """The run comes to a step (again, if it went back): begin or end where that is due."""
        first, last = self.steps
        if self._open is not None and not self._began <= step <= last:
            self.end(step - 1)
        if self._open is None and first <= step <= last:
            self._open, self._began = _Recording(_owned(trainer)), step

    def end(self, step: int) -> None:
        """Write what there is, up to ``step``; nothing, where no step of it was made."""
        if self._open is None:
            return
        recording, self._open = self._open, None
        found, num_steps = recording.stop(), step - self._began + 1
        if num_steps < 1:
            return
        began, parts = time.perf_counter(), parts_of(found, num_steps)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"rank-{self.rank:05d}.json.gz"
            _export(found, path)
            path.with_name(f"rank-{self.rank:05d}.txt").write_text(self._text(found, parts, step))
        except OSError as error:
            text = f"rank {self.rank} could not write its profile to {self.folder}: {error.strerror or error}"
            self.log.event("alarm", step, kind="profile", message=text)
            print(text, file=sys.stderr, flush=True)  # of a rank that logs nothing
            return
        seconds = time.perf_counter() - began
        self.log.event("profile", step, path=str(self.folder), parts_ms=parts, seconds=seconds)

    def _text(self, found: profile, parts: dict[str, float], step: int) -> str:
        whole = sum(parts.values())
        kind = "of kernels on the GPU" if _on_gpu(found) else "on this rank's main thread"
        lines = [f"Steps {self._began} to {step}, rank {self.rank}: {whole:.1f} ms a step {kind}", ""]
        lines += [f"{name:<32}{ms:>10.1f} ms{ms / whole:>8.1%}" for name, ms in parts.items()]
        order = "self_device_time_total" if _on_gpu(found) else "self_cpu_time_total"
        averages = found.key_averages()
        return "\n".join([*lines, "", averages.table(sort_by=order, row_limit=_ROWS)]) + "\n"


def is_profiled(rank: int, dims: ParallelDims) -> bool:
    """Whether it exchanges tokens with rank 0, or is it: who waits for whom shows in these ranks' traces alone."""
    return all(at == 0 for axis, at in dims.sparse_coordinate(rank).items() if axis != "ep")


def profiled(step: Callable[[], object], num_steps: int, stepper: Stepper) -> dict[str, float]:
    """:func:`parts_of` ``num_steps`` calls of a function that makes a step."""
    recording = _Recording(_owned_by_stepper(stepper))
    try:
        for _ in range(num_steps):
            step()
    finally:
        found = recording.stop()
    return parts_of(found, num_steps)


class _Recording:
    def __init__(self, owned: Iterable[Owned]) -> None:
        self._ranges = _ranges(owned)
        self._ranges.__enter__()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._whole = record_function(_PREFIX + _REST)
        self._whole.__enter__()

    def stop(self) -> profile:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._whole.__exit__(None, None, None)
        self._profile.stop()
        self._ranges.__exit__(None, None, None)
        return self._profile


def parts_of(found: profile, num_steps: int) -> dict[str, float]:
    """Milliseconds a step of each part, forward and backward together, largest first.

    An operator belongs to the innermost part that it is in; a backward node to the part of the operator that made
    it, which it shares a sequence number with. ``rest`` is what is in no part. On a GPU it is the time of kernels
    that counts, else that of the thread that made the step.
    """
    events, on_gpu = found.events() or [], _on_gpu(found)
    whole = next(event for event in events if event.name == _PREFIX + _REST)
    owners = _Owners()
    maker: dict[int, str] = {}
    for event in events:
        owner = owners.of(event)
        # Who makes no node carries the number of the next one: the last of them is its maker, not what is inside.
        if event.sequence_nr >= 0 and isinstance(owner, str) and not _inside_its_like(event):
            maker[event.sequence_nr] = owner
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        owner = owners.of(event)
        part = owner if isinstance(owner, str) else maker.get(owner, "gradients kept")
        if on_gpu:
            spent[part] += event.self_device_time_total
        elif event.thread == whole.thread:
            spent[part] += event.self_cpu_time_total
    per_step = {name: micros / 1e3 / num_steps for name, micros in spent.items() if micros > 0}
    return dict(sorted(per_step.items(), key=lambda item: -item[1]))


def _inside_its_like(event: Any) -> bool:
    """Whether an event around it has the same sequence number."""
    outer = event.cpu_parent
    while outer is not None and outer.sequence_nr != event.sequence_nr:
        outer = outer.cpu_parent
    return outer is not None


class _Owners:
    """The innermost range or backward node around each event: the part's name, or the node's sequence number."""

    def __init__(self) -> None:
        self._known: dict[int, str | int] = {}

    def of(self, event: Any) -> str | int:
        if event is None:
            return _REST
        found = self._known.get(id(event))
        if found is None:
            found = self._known[id(event)] = self._own(event)
        return found

    def _own(self, event: Any) -> str | int:
        name: str = event.name
        if name.startswith(_PREFIX):
            return name.removeprefix(_PREFIX)
        if name.startswith("FSDP::"):
            return "weights and gradients over ranks"
        if name.startswith(_NODE):
            return int(event.sequence_nr)
        return self.of(event.cpu_parent)


def _on_gpu(found: profile) -> bool:
    return ProfilerActivity.CUDA in found.activities


def _export(found: profile, path: Path) -> None:
    """Under its name only when it is whole."""
    aside = path.with_name(f".{path.name}")  # ends as before: that is how the profiler knows what to write
    try:
        found.export_chrome_trace(str(aside))
        aside.replace(path)
    except RuntimeError as error:
        raise OSError(None, str(error), str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def _owned(trainer: Trainer) -> Iterator[Owned]:
    yield from _owned_by_stepper(trainer.stepper)
    yield trainer.loader, "next_step", "data"
    yield trainer, "evaluate", "evaluation"
    yield trainer, "save", "checkpoints and snapshots"
    if trainer.memory is not None:
        yield trainer.memory, "snapshot", "checkpoints and snapshots"
    for method in ("_end_step", "_write"):
        yield trainer, method, "metrics, hooks, logs"
    if trainer.guard is not None:
        for method in ("corrupt", "judge", "updated"):
            yield trainer.guard, method, "guard"


def _owned_by_stepper(stepper: Stepper) -> Iterator[Owned]:
    engine = stepper.engine
    compiled = _compiled(engine.model)
    for module in engine.model.modules():
        part = next((part for kinds, part in _PARTS if isinstance(module, kinds)), None)
        if part is not None and module not in compiled:
            yield module, "forward", part
    yield engine, "backward", "backward, between nodes"
    yield engine, "clip_gradients", "clipping"
    yield engine, "step", "optimizer"
    yield stepper, "_agree", "targets counted over ranks"


def _compiled(model: nn.Module) -> set[nn.Module]:
    """What is one with its block, and would be compiled anew to have a range."""
    blocks = [module for module in model.modules() if isinstance(module, Block) and module.compiled]
    inside = (part for block in blocks for part in (block.attention, block.attention_norm, block.ffn_norm))
    return {module for part in inside for module in part.modules()}


@contextmanager
def _ranges(owned: Iterable[Owned]) -> Iterator[None]:
    """A range around every call."""
    undo: list[Callable[[], None]] = []

    def around(owner: Any, method: str, part: str) -> None:
        inner, had = getattr(owner, method), vars(owner).get(method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            with record_function(_PREFIX + part):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)
        undo.append(lambda: delattr(owner, method) if had is None else setattr(owner, method, had))

    for call in owned:
        around(*call)
    try:
        yield
    finally:
        for restore in reversed(undo):
            restore()
