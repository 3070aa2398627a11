"""The layout's records beside the reference's: what agrees, by how much, and what a deviation points at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel.dims import ParallelDims
from parallel.engines.base import StateSlice
from parallel.errors import ConfigError
from trainer.checkpoint.resume import open_checkpoint
from trainer.config import RunConfig, parallel_dims
from trainer.proof import suspect
from trainer.proof.shrink import STEPS

LOSS_TOLERANCE = 1e-6
TENSOR_TOLERANCE = 1e-5
"""‖a − b‖ / ‖b‖ of a tensor, and |a − b| / |b| of a norm or auxiliary loss."""


@dataclass
class Check:
    """One line of the certificate.

    Attributes:
        name: what was compared.
        passed: whether every comparison kept its tolerance.
        worst: the largest deviation.
        tolerance: it had to keep; 0: equal bits.
        where: the first thing that failed, else the one that deviated most.
        suspicion: what a deviation of this form usually comes from.
        values: figures by name.
        when: place of the first failure in the order of computation: causes come before effects.
    """

    name: str
    passed: bool
    worst: float
    tolerance: float
    where: str = ""
    suspicion: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    when: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As JSON values (JSON knows no infinity)."""
        values = asdict(self)
        return {**values, "worst": values["worst"] if math.isfinite(self.worst) else str(self.worst)}


class Records:
    """What one proof left on disk.

    Args:
        folder: with ``layout/`` and ``reference/``.
        run_dir: of the layout's run.
        config: that was run.
    """

    def __init__(self, folder: Path, run_dir: Path, config: RunConfig) -> None:
        self.folder, self.run_dir, self.config = folder, run_dir, config
        self.dims: ParallelDims = parallel_dims(config)
        self.reference_steps: list[dict[str, Any]] = json.loads(
            (folder / "reference" / "steps.json").read_text()
        )
        self.rank_steps = [self._lines(rank) for rank in range(self.dims.world_size)]

    def _lines(self, rank: int) -> list[dict[str, Any]]:
        text = (self.folder / "layout" / f"steps-{rank}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def reference(self, name: str) -> dict[str, Tensor]:
        """Tensors that the reference wrote."""
        return load_file(self.folder / "reference" / f"{name}.safetensors")

    def slices(self, moment: str) -> list[list[StateSlice]]:
        """What each rank held at a moment."""
        ranks = []
        for rank in range(self.dims.world_size):
            stem = self.folder / "layout" / f"{moment}-{rank}"
            tensors = load_file(f"{stem}.safetensors")
            index = json.loads(stem.with_suffix(".json").read_text())
            ranks.append(
                [
                    StateSlice(i["name"], tuple(i["shape"]), tuple(i["offsets"]), tensors[key], i["owner"])
                    for key, i in index.items()
                ]
            )
        return ranks

    def whole(self, moment: str) -> dict[str, Tensor]:
        """Whole tensors out of all ranks' owned slices, NaN (integers: the least) where nobody owns one."""
        whole: dict[str, Tensor] = {}
        for slices in self.slices(moment):
            for piece in slices:
                if piece.owner:
                    blank = _nothing(piece.global_shape, piece.tensor.dtype)
                    whole.setdefault(piece.name, blank)[_window(piece)] = piece.tensor
        return whole


def _nothing(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of values that nothing computes: NaN, or the least integer."""
    value = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(tuple(shape), value, dtype=dtype)


def _window(piece: StateSlice) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))


def deviation(found: Tensor | None, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in fp64; infinite where something is missing or not finite."""
    if found is None or found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return math.inf
    distance = float(torch.linalg.vector_norm(found.double() - wanted.double()))
    size = float(torch.linalg.vector_norm(wanted.double()))
    return distance / size if size else (0.0 if distance == 0 else math.inf)


class _When:
    """Positions within a step (see ``Check.when``): a step is worth 1."""

    samples, loss, gradients, norm = 0.0, 0.4, 0.5, 0.6
    layer, router, balance, counts = 1e-3, 0.1, 0.1001, 0.1002  # layer by layer: logits, scores, choice
    resume = STEPS - 0.1  # before the last step
    weights, optimizer, checkpoint = STEPS + 0.7, STEPS + 0.8, STEPS + 0.9


def first_failure(checks: list[Check]) -> Check | None:
    """The failed check that nothing else explains."""
    return min((check for check in checks if not check.passed), key=lambda check: check.when, default=None)


def compare(records: Records) -> list[Check]:
    """All checks, in the order in which they are shown."""
    checks: list[Callable[[Records], Check]] = [
        check_samples,
        lambda r: check_scalar(r, "cross_entropy", "loss", LOSS_TOLERANCE, _When.loss),
        check_counts,
        lambda r: check_layers(r, "balance", _When.balance),
        lambda r: check_layers(r, "router_z", _When.router),
        check_gradients,
        check_norm,
        lambda r: check_state(r, "model.", f"weights after {STEPS} steps"),
        lambda r: check_state(r, "optim.", f"optimizer after {STEPS} steps"),
        check_round_trip,
        check_resume,
    ]
    return [check(records) for check in checks]


def check_samples(records: Records) -> Check:
    """Every step reads the reference's samples, each on one rank, before and after the resume."""
    for number, wanted in enumerate(records.reference_steps):
        found = sorted(s for rank in records.rank_steps for s in rank[number]["samples"])
        if found != sorted(wanted["samples"]):
            where = f"step {number + 1}"
            suspicion = "samples are read twice or left out"
            if number + 1 == STEPS and found == sorted(records.reference_steps[number - 1]["samples"]):
                suspicion = "after the resume the data of the step before it is repeated"
            return Check("samples", False, math.inf, 0.0, where, suspicion, when=number + 1)
        counted = {rank[number]["num_targets"] for rank in records.rank_steps}
        if counted != {wanted["num_targets"]}:
            return Check("samples", False, math.inf, 0.0, f"targets of step {number + 1}", when=number + 1)
    return Check("samples", True, 0.0, 0.0)


def check_scalar(records: Records, key: str, name: str, tolerance: float, position: float) -> Check:
    """A figure of every step, on every rank."""
    check = Check(name, True, 0.0, tolerance)
    for number, wanted in enumerate(records.reference_steps):
        found = [rank[number][key] for rank in records.rank_steps]
        check.values[f"step {number + 1}"] = {"layout": found[0], "reference": wanted[key]}
        for value in found:
            _note(check, _relative(value, wanted[key]), f"step {number + 1}", number + 1 + position)
    return check


def _note(check: Check, off: float, where: str, when: float) -> None:
    """Count a deviation: the first failure is kept as the place, until then the largest."""
    if check.passed and (off > check.worst or off > check.tolerance):
        check.where, check.when = where, when
    check.worst = max(check.worst, off)
    check.passed = check.passed and off <= check.tolerance


def _relative(found: float, wanted: float) -> float:
    if not math.isfinite(found):
        return math.inf
    return abs(found - wanted) / abs(wanted) if wanted else (0.0 if found == 0 else math.inf)


def check_layers(records: Records, key: str, position: float) -> Check:
    """An auxiliary loss of every MoE layer and step."""
    check = Check(f"{key} loss", True, 0.0, TENSOR_TOLERANCE)
    for number, wanted in enumerate(records.reference_steps):
        for layer, value in enumerate(wanted[key]):
            when = number + 1 + position + layer * _When.layer
            for rank in records.rank_steps:
                found = rank[number][key]
                off = _relative(found[layer], value) if layer < len(found) else math.inf
                _note(check, off, f"step {number + 1}, MoE layer {layer}", when)
    if not check.passed:
        layer = int(check.where.rpartition(" ")[2])
        check.suspicion = (
            f"what MoE layer {layer - 1} returned: dispatch, experts, combine, or the residual of dropped tokens"
            if layer
            else "the router of the first MoE layer: precision, scores or its bias"
        )
    return check


def check_counts(records: Records) -> Check:
    """Routed pairs of every expert, exactly."""
    for number, wanted in enumerate(records.reference_steps):
        for rank, lines in enumerate(records.rank_steps):
            found = lines[number]["counts"]
            if found != wanted["counts"]:
                layer = next(i for i, c in enumerate(wanted["counts"]) if i >= len(found) or found[i] != c)
                off = sum(abs(a - b) for a, b in zip(found[layer], wanted["counts"][layer], strict=True))
                where = f"step {number + 1}, MoE layer {layer}, rank {rank}"
                suspicion = f"{off // 2} of {sum(wanted['counts'][layer])} choices differ: router precision"
                when = number + 1 + _When.counts + layer * _When.layer
                return Check("routed counts", False, float(off), 0.0, where, suspicion, when=when)
    return Check("routed counts", True, 0.0, 0.0)


def check_gradients(records: Records) -> Check:
    """Gradients of the first step, by parameter, before clipping."""
    reference = records.reference("gradients")
    wanted = {n.removeprefix("all:"): g for n, g in reference.items() if n.startswith("all:")}
    found = records.whole("gradients")
    off = {name: deviation(found.get(name), gradient) for name, gradient in wanted.items()}
    values = {name: suspect.ratios(found.get(name), gradient) for name, gradient in wanted.items()}
    failed = [name for name, value in off.items() if value > TENSOR_TOLERANCE]
    worst = max(off.values())
    where = failed[0] if failed else max(off, key=lambda name: off[name])
    why = suspect.gradients(failed, found, reference, records.config, records.dims) if failed else ""
    when = 1 + _When.gradients
    return Check("gradients", not failed, worst, TENSOR_TOLERANCE, where, why, values, when)


def check_norm(records: Records) -> Check:
    """The global norm that clipping uses."""
    check = check_scalar(records, "norm", "clip norm", TENSOR_TOLERANCE, _When.norm)
    if not check.passed:
        reference = records.reference("gradients")
        wanted = {n.removeprefix("all:"): g for n, g in reference.items() if n.startswith("all:")}
        check.suspicion = suspect.norm(records.rank_steps[0][0]["norm"], wanted, records.dims)
    return check


def check_state(records: Records, prefix: str, name: str) -> Check:
    """Weights and buffers, or optimizer slots, after the last step."""
    wanted = {n: t for n, t in records.reference("state").items() if n.startswith(prefix)}
    found = records.whole(f"state-{STEPS}")
    off = {key: deviation(found.get(key), tensor) for key, tensor in wanted.items()}
    failed = [key for key, value in off.items() if value > TENSOR_TOLERANCE]
    extra = [key for key in found if key.startswith(prefix) and key not in wanted]
    worst = max(off.values())
    where = (failed + extra)[0] if failed or extra else max(off, key=lambda key: off[key])
    when = _When.weights if prefix == "model." else _When.optimizer
    return Check(name, not failed and not extra, worst, TENSOR_TOLERANCE, where, when=when)


def check_round_trip(records: Records) -> Check:
    """The last checkpoint, loaded in one process, holds every tensor and slot bit for bit."""
    live = records.whole(f"state-{STEPS}")
    blank = [
        StateSlice(name, tuple(t.shape), (0,) * t.dim(), _nothing(t.shape, t.dtype), True)
        for name, t in live.items()
    ]
    name = "checkpoint round trip"
    try:
        open_checkpoint(records.run_dir / "checkpoints").load_into(blank)
    except ConfigError as error:
        return Check(name, False, math.inf, 0.0, str(error), when=_When.checkpoint)
    pairs = [(piece.name, piece.tensor, live[piece.name]) for piece in blank]
    return _same_bits(name, pairs, _When.checkpoint)


def check_resume(records: Records) -> Check:
    """What the ranks held after the resume is what they held before it, bit for bit."""
    before, after = records.slices(f"state-{STEPS - 1}"), records.slices("resumed")
    pairs = []
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        held = {(p.name, p.offsets, p.tensor.shape): p.tensor for p in new}
        same = [held.get((p.name, p.offsets, p.tensor.shape)) for p in old]
        pairs += [(f"{p.name} on rank {rank}", found, p.tensor) for p, found in zip(old, same, strict=True)]
    return _same_bits("state after resume", pairs, _When.resume)


def _same_bits(name: str, pairs: Sequence[tuple[str, Tensor | None, Tensor]], when: float) -> Check:
    for key, found, wanted in pairs:
        if found is None or not torch.equal(found, wanted):
            suspicion = ""
            if found is not None and found.shape == wanted.shape and found.numel():
                off = deviation(found, wanted)
                if torch.equal(found.flatten().sort().values, wanted.flatten().sort().values):
                    suspicion = "the same values in another order: permuted"
            else:
                off = math.inf
            return Check(name, False, off, 0.0, key, suspicion, when=when)
    return Check(name, True, 0.0, 0.0)
