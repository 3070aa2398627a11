"""What the ranks of the layout under proof write down, each into files of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from parallel.engines.base import StateSlice
from trainer.callbacks import Callback
from trainer.data.batch import Batch
from trainer.loop import Trainer
from trainer.proof.corpus import mask_targets


class Recorder(Callback):
    """Masks the targets as the reference does and records samples, gradients, sums and state.

    Args:
        folder: where the records go; one file a rank and moment.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.steps: list[dict[str, Any]] = []

    def on_start(self, trainer: Trainer) -> None:
        if trainer.state.step:
            self._write("resumed", trainer, trainer.engine.named_state())

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        batches[:] = [mask_targets(batch) for batch in batches]
        self.samples = [int(sample) for batch in batches for sample in batch.sample_ids]

    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.state.step == 0:
            self._write("gradients", trainer, trainer.engine.named_gradients())

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        assert trainer.result is not None
        totals = trainer.result.totals
        step = {
            "step": trainer.state.step,
            "samples": self.samples,
            "cross_entropy": float(totals.cross_entropy) / totals.num_targets,
            "num_targets": totals.num_targets,
            "balance": [float(value) / totals.num_targets for value in totals.balance_L],
            "router_z": [float(value) / totals.num_targets for value in totals.router_z_L],
            "counts": totals.counts_LE.tolist(),
            "norm": float(trainer.result.grad_norm),
        }
        with (self.folder / f"steps-{trainer.rank}.jsonl").open("a") as file:
            file.write(json.dumps(step) + "\n")

    def on_finish(self, trainer: Trainer) -> None:
        self._write(f"state-{trainer.state.step}", trainer, trainer.engine.named_state())

    def _write(self, moment: str, trainer: Trainer, slices: Iterable[StateSlice]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        index: dict[str, Any] = {}
        for piece in slices:
            key = f"{piece.name}#{len(index)}"  # a rank may hold several slices of one tensor
            tensors[key] = piece.tensor.detach().cpu().contiguous().clone()
            index[key] = {
                "name": piece.name,
                "shape": list(piece.global_shape),
                "offsets": list(piece.offsets),
                "owner": piece.owner,
            }
        stem = self.folder / f"{moment}-{trainer.rank}"
        save_file(tensors, f"{stem}.safetensors")
        stem.with_suffix(".json").write_text(json.dumps(index))
