"""Who takes part in bench/step.py: all train the same model, from the same weights, on the same batches."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.layer_contestant import Mlp
from bench.layer_peers import Absent
from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from parallel.mesh import Meshes
from trainer.build import build_dispatcher, build_engine, build_model, torch_dtype
from trainer.config import Dtype, RunConfig
from trainer.data.batch import IGNORED, Batch
from trainer.interop.families import family_for, make_pieces
from trainer.models.init import initialise
from trainer.models.transformer import Transformer
from trainer.step import Stepper

PLAIN = ["layout.balance.coefficient=0", "layout.balance.router_z=0"]
"""Without losses of the router's, so that all compute the same."""


class Training:
    """A model and its optimizer."""

    def step(self, number: int, batch: Batch) -> Tensor:
        """One optimizer step, 0-based; mean cross-entropy of the batch before it, 0-dim."""
        raise NotImplementedError


class Muster(Training):
    """The engine and the stepper of ``muster train``."""

    def __init__(self, config: RunConfig, meshes: Meshes) -> None:
        device = device_of(config)
        self.engine = build_engine(config, meshes, device)
        self.engine.prepare(build_model(config, build_dispatcher(meshes)))
        initialise(self.engine.model, self.engine.named_state(), config.train.seed)
        self.stepper = Stepper(self.engine, config, device, wants_stop=lambda: False)

    def step(self, number: int, batch: Batch) -> Tensor:
        totals = self.stepper.train_step(number, [batch]).totals
        return totals.cross_entropy / totals.num_targets


@dataclass(frozen=True)
class Way:
    """How somebody trains a model of transformers.

    Attributes:
        experts: ``experts_implementation``; None: what transformers takes where it is not told.
        fused: AdamW's kernel; None: what PyTorch takes where it is not told.
        autocast: fp32 weights and bf16 products (what ``bf16=True`` of its Trainer does); False with bf16: weights
            and optimizer in bf16.
    """

    experts: str | None
    fused: bool | None
    compiled: bool = False
    autocast: bool = False


class Transformers(Training):
    """``MixtralForCausalLM``, ``clip_grad_norm_`` and AdamW."""

    def __init__(self, config: RunConfig, way: Way) -> None:
        dtype = torch.bfloat16 if config.train.dtype is Dtype.bf16 and not way.autocast else torch.float32
        self.device = device_of(config)
        self.model = published_model(config, way.experts, dtype).to(self.device).train()
        self.forward: Callable[..., Any] = torch.compile(self.model) if way.compiled else self.model
        self.autocast, self.config = way.autocast, config
        self.optimizer = plain_adamw(self.model, config, way.fused)

    def step(self, number: int, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            out = self.forward(
                input_ids=batch.tokens, labels=batch.tokens, shift_labels=batch.targets, use_cache=False
            )
        out.loss.backward()
        clip_and_step(self.model, self.optimizer, self.config)
        return out.loss.detach()


class DeepSpeedMoe(Training):
    """Muster's transformer with ``deepspeed.moe.layer.MoE`` in it, dropping no token, in plain PyTorch."""

    def __init__(self, config: RunConfig) -> None:
        try:
            moe = importlib.import_module("deepspeed.moe.layer").MoE
        except ImportError as found:
            raise Absent(f"not installed ({found})") from found

        def feed_forward(config: RunConfig, index: int, dispatcher: object) -> nn.Module:
            return DeepSpeedLayer(config, moe)

        with torch.device("meta"):
            model = Transformer(config, LocalDispatcher(), feed_forward)
        self.model, self.config = model.to_empty(device="cpu"), config
        self._copy_weights(initial_model(config))
        self.optimizer = plain_adamw(self.model, config, fused=True)

    @torch.no_grad()
    def _copy_weights(self, source: nn.Module) -> None:
        state = dict(source.named_parameters())
        self.model.load_state_dict(
            {name: value for name, value in state.items() if ".feed_forward." not in name}, strict=False
        )
        for index, block in enumerate(self.model.layers):
            prefix, layer = f"layers.{index}.feed_forward", block.feed_forward.moe.deepspeed_moe
            layer.gate.wg.weight.copy_(state[f"{prefix}.router.weight"])
            for e, expert in enumerate(layer.experts.deepspeed_experts):
                for name in ("w1", "w2", "w3"):
                    getattr(expert, name).weight.copy_(state[f"{prefix}.experts.{name}"][e].T)

    def step(self, number: int, batch: Batch) -> Tensor:
        losses = self.model(batch.tokens, batch.targets)
        loss = losses.cross_entropy / (batch.targets != IGNORED).sum()
        loss.backward()
        clip_and_step(self.model, self.optimizer, self.config)
        return loss.detach()


class DeepSpeedLayer(nn.Module):
    """``forward(x)`` as :class:`trainer.models.transformer.Block` calls it."""

    def __init__(self, config: RunConfig, moe: Callable[..., nn.Module]) -> None:
        super().__init__()
        layout, dim = config.layout, config.model.dim
        expert = Mlp(dim, layout.expert_ffn_dim)
        self.moe = moe(
            dim, expert, layout.num_experts, k=layout.top_k, drop_tokens=False, top2_2nd_expert_sampling=False
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.moe(x_BSD)[0]


class Products(Training):
    """The step's matrix products alone, the experts' as if they were one: into memory that is there.

    In fp32 on a CPU, whatever the dtype of the others.
    """

    def __init__(self, config: RunConfig) -> None:
        sizes, device = product_sizes(config), device_of(config)
        kind = {"device": device, "dtype": torch.float32 if device.type == "cpu" else torch_dtype(config)}
        shapes = {s for rows, inner, outer in sizes for s in ((rows, inner), (rows, outer), (inner, outer))}
        self.given = {shape: torch.randn(shape, **kind) for shape in shapes}
        self.found = {shape: torch.empty(shape, **kind) for shape in shapes}
        self.sizes = sizes

    def step(self, number: int, batch: Batch) -> Tensor:
        given, found = self.given, self.found
        for rows, inner, outer in self.sizes:
            x, w, dy = given[rows, inner], given[inner, outer], given[rows, outer]
            torch.mm(x, w, out=found[rows, outer])
            torch.mm(x.T, dy, out=found[inner, outer])
            torch.mm(dy, w.T, out=found[rows, inner])
        return torch.zeros(())


def device_of(config: RunConfig) -> torch.device:
    return torch.device(config.device.value)


def product_sizes(config: RunConfig) -> list[tuple[int, int, int]]:
    """Rows, inner and outer width of every product of a forward pass; of attention's own, the causal half."""
    m, layout = config.model, config.layout
    tokens = config.train.global_batch * config.train.seq_len
    rows, q, kv = tokens * layout.top_k, m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    attention = [(tokens, m.dim, q), (tokens, m.dim, kv), (tokens, m.dim, kv), (tokens, q, m.dim)]
    inside = (tokens, q, config.train.seq_len // 2)  # as many FLOPs as queries · keys, or as weights · values
    up, down = (rows, m.dim, layout.expert_ffn_dim), (rows, layout.expert_ffn_dim, m.dim)
    layer = [*attention, inside, inside, (tokens, m.dim, layout.num_experts), up, up, down]
    return layer * m.num_layers + [(tokens, m.dim, m.vocab_size)]


def initial_model(config: RunConfig) -> nn.Module:
    """Whole, in this process, with the weights that a run begins with."""
    model = build_model(config, LocalDispatcher())
    model.to_empty(device="cpu")
    initialise(model, whole_state(model), config.train.seed)
    return model


def published_model(config: RunConfig, experts: str | None, dtype: torch.dtype) -> Any:
    """The same model and weights as transformers' own class.

    Args:
        experts: ``experts_implementation``; None: not given.
    """
    transformers = importlib.import_module("transformers")
    family, model = family_for(config), initial_model(config)
    state = {name: value.detach() for name, value in model.named_parameters()}
    values = family.write(config)
    pieces = make_pieces(family, config, values, {name: tuple(value.shape) for name, value in state.items()})
    tensors = {}
    for piece in pieces:
        box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.shape, strict=True))
        tensors[piece.hf.name] = piece.change.to_hf(state[piece.muster][box]).contiguous()
    told = {} if experts is None else {"experts_implementation": experts}
    with TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **told)


def plain_adamw(model: nn.Module, config: RunConfig, fused: bool | None) -> torch.optim.AdamW:
    """As transformers' Trainer groups parameters: vectors are not decayed."""
    o, parameters = config.optim, list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=fused)


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
