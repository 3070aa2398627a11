"""Totals of steps that were never run."""

from __future__ import annotations

import torch

from trainer.config import RunConfig
from trainer.health.window import Window
from trainer.step import Totals


def totals(
    counts: list[list[int]], entropy: list[float] | None = None, targets: int = 8, dropped: bool = False
) -> Totals:
    """A step with these routed pairs ``[L][E]`` and this mean entropy of each layer; on request half of expert 0's
    pairs are dropped."""
    counts_LE = torch.tensor(counts)
    num_layers = len(counts)
    zero = torch.zeros(num_layers, dtype=torch.float64)
    return Totals(
        num_targets=targets,
        cross_entropy=torch.zeros((), dtype=torch.float64),
        balance_L=zero,
        router_z_L=zero,
        entropy_L=targets * torch.tensor(entropy or [1.0] * num_layers, dtype=torch.float64),
        confidence_L=0.5 * targets + zero,
        dropped_L=counts_LE[:, 0] // 2 * int(dropped),
        unserved_L=torch.full((num_layers,), 2),
        sent_L=zero.long(),
        counts_LE=counts_LE,
    )


def moe_config(num_experts: int = 4, top_k: int = 1) -> RunConfig:
    """Two layers of experts, watched over a window of two steps."""
    config = RunConfig()
    config.model.num_layers = 2
    config.layout.num_experts, config.layout.top_k = num_experts, top_k
    config.health.window, config.health.dead_steps = 2, 5
    return config


def filled(
    config: RunConfig, counts: list[list[int]], entropy: list[float] | None = None, dropped: bool = False
) -> Window:
    """A window that saw nothing else for long."""
    window = Window(config.health.window, 8)
    for _ in range(60):
        window.update(totals(counts, entropy, dropped=dropped))
    return window
