"""One process, plain PyTorch: what the layout must compute.

It shares the model's modules, the initial weights and the data with the layout under proof, and nothing of how
gradients are reduced, divided, clipped or stepped. ``python -m trainer.proof.reference CONFIG FOLDER``.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from trainer.build import build_model
from trainer.compose import load_frozen
from trainer.config import RunConfig
from trainer.config_moe import BiasUpdate
from trainer.data.batch import Batch
from trainer.data.loader import build_loader
from trainer.data.prepare import prepare_data
from trainer.models.init import fill_buffers, initialise
from trainer.models.transformer import Losses
from trainer.process import die_with_parent
from trainer.proof.corpus import mask_targets


def run_reference(config: RunConfig, folder: Path) -> None:
    """Train ``config.train.steps`` steps and write steps, gradients and state into ``folder``."""
    torch.set_num_threads(config.train.num_threads)
    alone = _alone(config)
    prepared = prepare_data(alone)
    loader = build_loader(prepared, alone, 0, 1)
    model = build_model(alone, LocalDispatcher()).to_empty(device="cpu")
    initialise(model, whole_state(model), alone.train.seed)
    fill_buffers(model)
    optimizer = _adamw(model, alone)
    steps = []
    for step in range(config.train.steps):
        (batch,) = (mask_targets(batch) for batch in loader.next_step())
        if step == 0:
            save_file(_terms(model, alone, batch), folder / "gradients.safetensors")
        steps.append({"step": step + 1, **_step(model, optimizer, alone, batch)})
    (folder / "steps.json").write_text(json.dumps(steps))
    save_file(_state(model, optimizer), folder / "state.safetensors")


def _alone(config: RunConfig) -> RunConfig:
    """The same run with all rows in one micro-batch of one process, nothing recomputed."""
    alone = copy.deepcopy(config)
    alone.train.micro_batch = alone.train.global_batch
    alone.train.activation_checkpointing = False
    return alone


def _adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    o = config.optim
    return torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=o.lr,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        foreach=False,
    )


def _forward(model: nn.Module, config: RunConfig, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
    """Sums, and the terms of the objective: each a sum over target tokens divided by their number."""
    layout = config.layout
    noise = (batch.sample_ids,) if layout.jitter or layout.sample_second else ()
    documents = batch.document_ids if config.data.respect_documents else None
    losses = model(batch.tokens, batch.targets, documents, *noise)
    if not isinstance(losses, Losses):
        losses = Losses(losses, ())
    weights, num_targets = config.layout.balance, int(batch.num_targets)
    terms = {"cross_entropy": losses.cross_entropy / num_targets}
    if losses.moe:
        for term in ("balance", "router_z"):
            weight = weights.coefficient if term == "balance" else weights.router_z
            layers = torch.stack([getattr(stats, term) for stats in losses.moe])
            terms[term] = weight * layers.sum() / num_targets
    return losses, terms


def _terms(model: nn.Module, config: RunConfig, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the objective, and of each term alone, so that a deviation can be told apart."""
    named = dict(model.named_parameters())
    _, terms = _forward(model, config, batch)
    found: dict[str, Tensor] = {}
    for term, value in terms.items():
        if not value.requires_grad:  # a layout whose router learns nothing
            found |= {f"{term}:{name}": torch.zeros_like(parameter) for name, parameter in named.items()}
            continue
        gradients = torch.autograd.grad(value, list(named.values()), retain_graph=True, allow_unused=True)
        for name, parameter, gradient in zip(named, named.values(), gradients, strict=True):
            found[f"{term}:{name}"] = torch.zeros_like(parameter) if gradient is None else gradient
    for name in named:
        found[f"all:{name}"] = sum((found[f"{term}:{name}"] for term in terms), torch.zeros(()))
    return {name: value.contiguous() for name, value in found.items()}


def _step(model: nn.Module, optimizer: torch.optim.AdamW, config: RunConfig, batch: Batch) -> dict[str, Any]:
    losses, terms = _forward(model, config, batch)
    optimizer.zero_grad()
    sum(terms.values(), torch.zeros(())).backward()
    limit = config.optim.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit if limit > 0 else float("inf"))
    optimizer.step()
    _update_buffers(model, [stats.counts_E for stats in losses.moe], config)
    num_targets = int(batch.num_targets)
    return {
        "samples": batch.sample_ids.tolist(),
        "cross_entropy": losses.cross_entropy.item() / num_targets,
        "num_targets": num_targets,
        "balance": [stats.balance.item() / num_targets for stats in losses.moe],
        "router_z": [stats.router_z.item() / num_targets for stats in losses.moe],
        "counts": [stats.counts_E.tolist() for stats in losses.moe],
        "norm": float(norm),
    }


def _update_buffers(model: nn.Module, counts_LE: list[Tensor], config: RunConfig) -> None:
    """The router's bias and the load that a balance loss of scope step knows, as their formulas say."""
    balance = config.layout.balance
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("bias_E")]
    for bias, counts_E in zip(biases, counts_LE, strict=bool(biases)):
        deviation = counts_E.double().mean() - counts_E.double()
        if balance.bias_update is BiasUpdate.sign:
            bias += balance.bias_update_rate * deviation.sign().float()
        else:
            bias += balance.bias_update_rate * (deviation / counts_E.double().mean()).float()
    loads = [buffer for name, buffer in model.named_buffers() if name.endswith("load_E")]
    for load, counts_E in zip(loads, counts_LE, strict=bool(loads)):
        load.copy_(counts_E)


def _state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    state = {piece.name: piece.tensor.contiguous() for piece in whole_state(model)}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state[parameter].items():
            state[f"optim.{slot}.{name}"] = value.contiguous()
    return state


if __name__ == "__main__":
    die_with_parent(int(sys.argv[3]))
    run_reference(load_frozen(Path(sys.argv[1])), Path(sys.argv[2]))
