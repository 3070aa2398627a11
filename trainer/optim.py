"""AdamW and the learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainer.config import OptimConfig, Schedule


def make_adamw(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (arXiv:1711.05101); matrices are decayed, vectors are not.

    Its state exists from the start (zeros), so that it has one form before and after the first step.
    """
    decayed = [p for _, p in named if p.dim() > 1]
    others = [p for _, p in named if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in decayed + others:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of step ``step`` (0-based) of ``num_steps``.

    Linear warm-up over ``warmup_steps``, then constant; or a cosine to ``min_lr_ratio`` at the last step
    (arXiv:1608.03983); or wsd: constant, and linear to ``min_lr_ratio`` over the last ``decay_steps``
    (arXiv:2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.min_lr_ratio
    if config.schedule is Schedule.cosine:
        progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
        return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if config.schedule is Schedule.wsd:
        left = max(0, num_steps - 1 - step)
        return config.lr * (low + (1 - low) * min(1.0, left / config.decay_steps))
    return config.lr
