"""One process, plain PyTorch, no engine: what every layout must compute.

It shares the model's modules and initial weights with the product, and nothing of how gradients are reduced,
divided, clipped or stepped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from trainer.build import build_model
from trainer.config import RunConfig
from trainer.config_moe import BiasUpdate
from trainer.data.batch import Batch
from trainer.models.init import initialise
from trainer.optim import learning_rate


@dataclass
class Trace:
    """What is compared, by step (gradients of the first step only)."""

    losses: list[float]
    norms: list[float]
    counts: list[list[list[int]]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def batch_of_step(config: RunConfig, step: int) -> Batch:
    """The global batch of a step: random tokens, unevenly masked targets, several documents a row."""
    g = torch.Generator().manual_seed(1000 + step)
    shape = (config.train.global_batch, config.train.seq_len)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=g)
    targets = torch.randint(0, config.model.vocab_size, shape, generator=g)
    masked = torch.rand(shape, generator=g) < torch.linspace(0.05, 0.9, shape[0])[:, None]
    documents = (torch.rand(shape, generator=g) < 0.1).cumsum(1).int()
    return Batch(tokens, targets.masked_fill(masked, -100), documents, torch.arange(shape[0]))


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(
        batch.tokens[start:stop],
        batch.targets[start:stop],
        batch.document_ids[start:stop],
        batch.sample_ids[start:stop],
    )


def run_oracle(config: RunConfig, steps: int) -> Trace:
    model = build_model(config, LocalDispatcher())
    model.to_empty(device="cpu")
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    initialise(model, whole_state(model), config.train.seed)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    o, weights = config.optim, config.layout.balance
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        foreach=False,
    )
    trace = Trace([], [], [], {}, {})
    for step in range(steps):
        batch = batch_of_step(config, step)
        documents = batch.document_ids if config.data.respect_documents else None
        noisy = config.layout.jitter or config.layout.sample_second
        losses = model(batch.tokens, batch.targets, documents, *([batch.sample_ids] if noisy else []))
        num_targets = int((batch.targets != -100).sum())
        total = losses.cross_entropy / num_targets
        for stats in losses.moe:
            total = total + weights.coefficient * stats.balance / num_targets
            total = total + weights.router_z * stats.router_z / num_targets
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            trace.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step, config.train.steps)
        optimizer.step()
        counts = [stats.counts_E for stats in losses.moe]
        for kind in ("bias_E", "load_E"):
            buffers = [buffer for name, buffer in model.named_buffers() if name.endswith(kind)]
            for buffer, counts_E in zip(buffers, counts, strict=bool(buffers)):
                if kind == "load_E":
                    buffer.copy_(counts_E)
                    continue
                deviation = counts_E.double().mean() - counts_E
                if weights.bias_update is BiasUpdate.sign:
                    deviation = deviation.sign()
                else:
                    deviation = deviation / counts_E.double().mean()
                buffer += weights.bias_update_rate * deviation.float()
        trace.losses.append(float(losses.cross_entropy.detach()) / num_targets)
        trace.counts.append([c.tolist() for c in counts])
    trace.weights = {n: t.detach().clone() for n, t in state.items()}
    return trace
