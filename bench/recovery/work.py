"""The work that all contenders do: Muster's own dense model and batches of a frozen config, as plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from trainer.build import build_model
from trainer.compose import load_frozen
from trainer.data.batch import Batch
from trainer.data.loader import build_loader
from trainer.data.prepare import prepare_data
from trainer.models.init import fill_buffers, initialise


class Objective(nn.Module):
    """The model with its loss: a scalar, mean over the targets of the batch, as DDP expects it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model(tokens, targets, None).cross_entropy / targets.numel()


class Work:
    """One process's model, optimizer and data.

    Args:
        config: a frozen config with ``layout=dense``.
    """

    def __init__(self, config: Path, rank: int, world_size: int) -> None:
        self.config = load_frozen(config)
        torch.set_num_threads(self.config.train.num_threads)
        model = build_model(self.config, LocalDispatcher())
        model.to_empty(device="cpu")
        initialise(model, list(whole_state(model)), self.config.train.seed)
        fill_buffers(model)
        self.objective = Objective(model)
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), lr=self.config.optim.lr)
        self.loader = build_loader(prepare_data(self.config), self.config, rank, world_size)

    def batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        return self.loader.next_step()

    def start_optimizer(self) -> None:
        """Give every parameter its optimizer slots, so that a checkpoint can be loaded into them."""
        for parameter in self.objective.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            lr, group["lr"] = group["lr"], 0.0
            decay, group["weight_decay"] = group["weight_decay"], 0.0
            self.optimizer.step()
            group["lr"], group["weight_decay"] = lr, decay
        self.optimizer.zero_grad()
