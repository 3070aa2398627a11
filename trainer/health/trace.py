"""Routing traces: who chose which experts, written while a run trains and replayed in another.

    traces/train-00000010.rank-0001.safetensors    what rank 1's samples of step 10 chose
    traces/valid-00000040.rank-0001.safetensors    the same of the evaluation after step 40

A file holds ``sample_ids`` ``[N]`` int64 (the samples' places in the order of training, or in the evaluation) and
``experts`` ``[L, N, S, K]``: in MoE layer l, position s of sample n chose these K experts, in the smallest of
uint8, int16 and int32 that holds them; the number of experts means none. Its metadata names format, split, step,
rank, world, block index of each layer, number of experts, and fingerprint of the data. Since a sample is named by
its place in the order of training, a trace may be replayed on any number of ranks.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.errors import ConfigError
from trainer.checkpoint.files import storage_error
from trainer.moe.balance import MoeStats

FOLDER = "traces"
_FORMAT = "muster-trace-1"
_NAME = re.compile(r"(train|valid)-(\d{8})\.rank-(\d+)\.safetensors")
_QUEUE = 4


@dataclass(frozen=True)
class TraceFacts:
    """What a trace and the run that replays it must agree on."""

    fingerprint: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    seq_len: int


@dataclass(frozen=True)
class _Job:
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    copied: torch.cuda.Event | None


class TraceWriter:
    """Writes this rank's choices from a thread, behind the step. At most four steps wait for the disk.

    Args:
        folder: made if missing.
        fingerprint: of the data.

    Raises:
        StorageError: from ``save`` and ``close``, for a file that could not be written.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, fingerprint: str) -> None:
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._fingerprint = fingerprint
        self._parts: list[tuple[Tensor, Tensor]] = []
        self.num_layers = self._num_experts = 0
        self._jobs: queue.Queue[_Job | None] = queue.Queue(_QUEUE)
        self._error: OSError | None = None
        self._failed = folder
        self._thread: threading.Thread | None = None

    def add(self, moe: Sequence[MoeStats], sample_ids: Tensor) -> None:
        """Keep one micro-batch's choices."""
        self.num_layers, self._num_experts = len(moe), len(moe[0].counts_E)
        small = _small_dtype(self._num_experts)
        experts = torch.stack([stats.expert_BSK.to(small) for stats in moe])
        self._parts.append((sample_ids, experts))

    def drop(self) -> None:
        """Forget what was kept since the last save."""
        self._parts = []

    def save(self, split: str, step: int, layers: Sequence[int]) -> None:
        """Hand what was kept over to the thread; returns before it is on the disk."""
        self._raise()
        if not self._parts:
            return
        experts = torch.cat([part for _, part in self._parts], dim=1)
        sample_ids = torch.cat([ids for ids, _ in self._parts])
        self._parts = []
        copied = None
        if experts.is_cuda:
            experts, sample_ids = _pinned(experts), _pinned(sample_ids)
            copied = torch.cuda.Event()
            copied.record()
        metadata = {
            "format": _FORMAT,
            "split": split,
            "step": str(step),
            "rank": str(self._rank),
            "world": str(self._world_size),
            "layers": json.dumps(list(layers)),
            "num_experts": str(self._num_experts),
            "fingerprint": self._fingerprint,
        }
        if self._thread is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._write, name="muster-trace", daemon=True)
            self._thread.start()
        name = f"{split}-{step:08d}.rank-{self._rank:04d}.safetensors"
        tensors = {"sample_ids": sample_ids, "experts": experts}
        self._jobs.put(_Job(self._folder / name, tensors, metadata, copied))

    def _write(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.copied is not None:
                job.copied.synchronize()
            keep = job.tensors["sample_ids"] >= 0  # rows that only fill up a batch
            tensors = {
                "sample_ids": job.tensors["sample_ids"][keep],
                "experts": job.tensors["experts"][:, keep].contiguous(),
            }
            aside = job.path.with_name(f".{job.path.name}")
            try:
                save_file(tensors, aside, job.metadata)
                aside.replace(job.path)
            except (OSError, SafetensorError) as error:
                self._failed = job.path
                self._error = error if isinstance(error, OSError) else OSError(str(error))

    def _raise(self) -> None:
        if self._error is not None:
            raise storage_error(self._error, self._failed, 0, field="run.root") from self._error

    def close(self) -> None:
        """Wait until everything is on the disk."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self._raise()


def forget_later(folder: Path, step: int) -> None:
    """Remove the traces of later steps, which a resume at ``step`` will make again."""
    for path in folder.glob("*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match and int(match.group(2)) > step:
            path.unlink(missing_ok=True)


class Trace:
    """A recorded trace, read a step at a time.

    Args:
        path: a run directory or its ``traces`` folder.
        facts: of the run that replays it.

    Attributes:
        has_evaluations: whether evaluations were recorded.

    Raises:
        ConfigError: nothing recorded there, or of another model or data. From ``choices``: not of this step.
    """

    def __init__(self, path: Path, facts: TraceFacts) -> None:
        self._path, self._facts = path, facts
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        self._files: dict[tuple[str, int], list[Path]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            match = _NAME.fullmatch(file.name)
            if match:
                self._files.setdefault((match.group(1), int(match.group(2))), []).append(file)
        if not self._files:
            raise self._wrong(
                "holds no routing trace", "a run that was trained with health.trace_every=1, or null"
            )
        self.has_evaluations = any(split == "valid" for split, _ in self._files)
        self._at: tuple[str, int] | None = None
        self._row: dict[int, int] = {}
        self._experts_LNSK = torch.empty(0)

    def require(self, split: str, steps: Sequence[int]) -> None:
        """Raise ConfigError unless all these steps were recorded."""
        missing = [step for step in steps if (split, step) not in self._files]
        if missing:
            known = sorted(step for kind, step in self._files if kind == split)
            have = f"{len(known)} steps from {known[0]} to {known[-1]}" if known else "no step"
            raise self._wrong(
                f"has the routes of {have} ({split}), not of step {missing[0]}",
                f"train.steps={known[-1]} or less" if split == "train" and known == list(range(1, len(known) + 1))
                else "record every step (health.trace_every=1)",
            )  # fmt: skip

    def choices(self, split: str, step: int, sample_ids: Tensor, device: torch.device) -> list[Tensor]:
        """The choices of these samples: int64 ``[B, S, K]`` a MoE layer. Padding rows take the first sample's."""
        if self._at != (split, step):
            self._load(split, step)
        ids = sample_ids.tolist()
        missing = [number for number in ids if number >= 0 and number not in self._row]
        if missing:
            raise self._wrong(
                f"step {step} ({split}) was recorded without sample {missing[0]}",
                "train.global_batch and eval.max_rows as in the recorded run",
            )
        rows = torch.tensor([self._row.get(number, 0) for number in ids])
        return list(self._experts_LNSK[:, rows].to(device=device, dtype=torch.int64).unbind(0))

    def _load(self, split: str, step: int) -> None:
        self.require(split, [step])
        parts = []
        for file in self._files[split, step]:
            try:
                with safe_open(file, framework="pt") as opened:
                    metadata = opened.metadata() or {}
                    parts.append((opened.get_tensor("sample_ids"), opened.get_tensor("experts")))
            except (OSError, SafetensorError) as error:
                raise self._wrong(f"{file.name} cannot be read ({error})", "record it again") from error
            self._check(file.name, metadata, parts[-1][1])
        if len(parts) != int(metadata["world"]):
            raise self._wrong(
                f"step {step} ({split}) has {len(parts)} of {metadata['world']} ranks' files", "copy them all"
            )
        ids = torch.cat([part for part, _ in parts]).tolist()
        self._row = {number: row for row, number in enumerate(ids)}
        self._experts_LNSK = torch.cat([part for _, part in parts], dim=1)
        self._at = (split, step)

    def _check(self, name: str, metadata: dict[str, str], experts: Tensor) -> None:
        facts = self._facts
        if metadata.get("format") != _FORMAT:
            raise self._wrong(
                f"{name} is in the form {metadata.get('format')}, not {_FORMAT}", "record it again"
            )
        pairs = {
            "data (fingerprint)": (metadata["fingerprint"], facts.fingerprint),
            "MoE layers": (metadata["layers"], json.dumps(list(facts.layers))),
            "layout.num_experts, zero and copy experts counted": (
                int(metadata["num_experts"]),
                facts.num_experts,
            ),
            "train.seq_len": (experts.shape[2], facts.seq_len),
            "choices a token": (experts.shape[3], facts.top_k),
        }
        for what, (recorded, here) in pairs.items():
            if recorded != here:
                raise self._wrong(
                    f"was recorded with {what}: {recorded}; this run has {here}",
                    "the recorded run's data, model and layout",
                )

    def _wrong(self, relation: str, fix: str) -> ConfigError:
        return ConfigError("health.replay", self._path, relation, fix)


def _small_dtype(largest: int) -> torch.dtype:
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
