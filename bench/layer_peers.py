"""Those whom a user could take instead of Muster, and the list of all contestants of bench/layer.py.

Each holds the same experts in its own layout, and is given the routing. None is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.layer_contestant import Contestant, Dense, Loop, Matmuls, Mlp, Muster, grad_of, leaf_of
from bench.layer_work import Shape, Weights, Work


def _transposed(stacked: Tensor) -> Tensor:
    return stacked.transpose(1, 2).contiguous()


class Absent(Exception):
    """This contestant cannot take part here; says why."""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as found:
        raise Absent(f"not installed ({found})") from found


_BLOCKS = {"mixtral": "Mixtral", "olmoe": "Olmoe", "qwen3_moe": "Qwen3Moe"}


class Transformers(Contestant):
    """The experts of transformers' Mixtral, OLMoE or Qwen3-MoE block, whichever the shape is of.

    Args:
        implementation: eager or grouped_mm (``experts_implementation`` of ``from_pretrained``).
    """

    def __init__(self, shape: Shape, weights: Weights, implementation: str) -> None:
        package = f"transformers.models.{shape.of}"
        name = _BLOCKS[shape.of]
        config = getattr(_module(f"{package}.configuration_{shape.of}"), f"{name}Config")(
            hidden_size=shape.dim,
            **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), shape.ffn_dim),
            **dict.fromkeys(("num_experts", "num_local_experts"), shape.num_experts),
            num_experts_per_tok=shape.top_k,
            hidden_act="silu",
        )
        config._experts_implementation = implementation
        experts = getattr(_module(f"{package}.modeling_{shape.of}"), f"{name}Experts")(config)
        super().__init__(experts.to(weights.w1_EDH))
        gate_up = torch.cat([_transposed(weights.w1_EDH), _transposed(weights.w3_EDH)], 1)
        experts.gate_up_proj.data.copy_(gate_up)
        experts.down_proj.data.copy_(_transposed(weights.w2_EHD))
        # Mixtral's router hands over fp32, the others the model's dtype.
        self.weight_dtype = torch.float32 if shape.of == "mixtral" else weights.w1_EDH.dtype

    def forward(self, work: Work) -> Tensor:
        x, weight = self.leaves
        return self.module(x, work.expert_TK, weight.to(self.weight_dtype))

    def dweights(self) -> Weights:
        w1, w3 = grad_of(self.module.gate_up_proj).transpose(1, 2).chunk(2, dim=2)
        return Weights(w1, w3, grad_of(self.module.down_proj).transpose(1, 2))


class _Gate(nn.Module):
    """DeepSpeed's TopKGate from its logits on; the product that gives them is not computed."""

    def __init__(self, top_k: int, capacity_factor: float, drop: bool) -> None:
        super().__init__()
        self.top_k, self.capacity_factor, self.drop = top_k, capacity_factor, drop
        self.gating = _module("deepspeed.moe.sharded_moe")
        self.logits_TE: Tensor | None = None
        self.ep_group: Any = None

    def _set_ep_group(self, group: Any) -> None:
        """Told by the layer: who must agree on a capacity."""
        self.ep_group = group

    def forward(self, x: Tensor, used: Any = None, sparse_routes: bool = False, tutel: bool = False) -> Any:
        common = {"capacity_factor": self.capacity_factor, "min_capacity": 4, "drop_tokens": self.drop}
        common |= {"sparse_routes": sparse_routes, "ep_group": self.ep_group}
        if self.top_k == 1:
            return self.gating.top1gating(self.logits_TE, used_token=used, use_rts=False, **common)
        if self.top_k == 2:
            return self.gating.top2gating(self.logits_TE, top2_2nd_expert_sampling=False, **common)
        return self.gating.topkgating(self.logits_TE, self.top_k, **common)


class DeepSpeed(Contestant):
    """``deepspeed.moe.layer.MoE`` on one process (which needs no process group), its gate given its logits.

    They are made so that its softmax gives the combine weights; making them is not timed, the gate's softmax,
    choice and slots are. Random token selection and sampling of the second expert, which would change the routing,
    are off.

    Args:
        drop: whether an expert takes only 1.25 times the mean.
        ep_size, ep_rank: how many ranks share the experts, and which of them this is; more than one need a group.
    """

    FACTOR = 1.25

    def __init__(
        self, shape: Shape, weights: Weights, drop: bool, ep_size: int = 1, ep_rank: int = 0
    ) -> None:
        layer = _module("deepspeed.moe.layer")
        expert = Mlp(shape.dim, shape.ffn_dim).to(weights.w1_EDH)
        moe = layer.MoE(
            shape.dim,
            expert,
            shape.num_experts,
            ep_size,
            k=shape.top_k,
            capacity_factor=self.FACTOR,
            drop_tokens=drop,
        )
        self.gate = moe.deepspeed_moe.gate = _Gate(shape.top_k, self.FACTOR, drop)
        super().__init__(moe.to(weights.w1_EDH.device))
        self.num_experts, self.normalises = shape.num_experts, shape.top_k > 1
        self.experts = list(moe.deepspeed_moe.experts.deepspeed_experts)
        for index, own in enumerate(self.experts):
            for name, given in zip(("w1", "w3", "w2"), weights, strict=True):
                getattr(own, name).weight.data.copy_(given[ep_rank * len(self.experts) + index].T)

    def prepare(self, work: Work) -> None:
        super().prepare(work)
        self.logits = self._logits(self.leaves[1], work.expert_TK)
        self.gate.logits_TE = leaf_of(self.logits)
        self.leaves.append(self.gate.logits_TE)

    def _logits(self, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """Whose softmax is the weights; the rest is next to nothing, or with one choice spread evenly."""
        T, E = len(weight_TK), self.num_experts
        if weight_TK.shape[1] == 1:
            others = ((1 - weight_TK) / (E - 1)).log().expand(T, E)
        else:
            others = weight_TK.new_full((T, E), -30.0)
        return others.scatter(1, expert_TK, weight_TK.log())

    def forward(self, work: Work) -> Tensor:
        return self.module(self.leaves[0])[0]

    def dweight(self, work: Work) -> Tensor:
        return torch.autograd.grad(self.logits, self.leaves[1], grad_of(self.leaves[2]))[0]

    def dweights(self) -> Weights:
        def stacked(name: str) -> Tensor:
            return torch.stack([grad_of(getattr(expert, name).weight).T for expert in self.experts])

        return Weights(stacked("w1"), stacked("w3"), stacked("w2"))


class AutoEP(Contestant):
    """What DeepSpeed's AutoEPMoELayer does on one process after its router: its experts, its permutations."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.layer = _module("deepspeed.module_inject.auto_ep_layer")
        grouped = _module("deepspeed.moe.ep_experts").GroupedExperts
        experts = grouped(shape.dim, shape.ffn_dim, shape.num_experts).to(weights.w1_EDH)
        super().__init__(experts)
        self.num_experts = shape.num_experts
        for own, given in zip((experts.w1, experts.w3, experts.w2), weights, strict=True):
            own.data.copy_(_transposed(given))

    def forward(self, work: Work) -> Tensor:
        x, weight = self.leaves
        (T, K), layer = weight.shape, self.layer
        counts_E = torch.bincount(work.expert_TK.flatten(), minlength=self.num_experts)
        order_N = torch.argsort(work.expert_TK.view(-1), stable=True)
        rows, index, aligned_E, num_rows = layer.permute_by_local_expert(x[order_N // K], counts_E)
        out = layer.unpermute_by_local_expert(self.module(rows, aligned_E), index, num_rows)
        y = layer.combine_from_routed(
            out,
            weight,
            order_N,
            top_k=K,
            score_apply="post",
            combine_impl="weighted_sum",
            shape=(1, T, x.shape[1]),
        )
        return y.view(T, -1)

    def dweights(self) -> Weights:
        return Weights(
            *(grad_of(w).transpose(1, 2) for w in (self.module.w1, self.module.w3, self.module.w2))
        )


MUSTER, GROUPED = "Muster", "transformers, grouped_mm"
BALANCED = "Muster, balanced routing"
"""Timed beside a skewed routing, so that what the skew costs is a ratio within rounds."""
FLOORS = {torch.float32: "floor: matmuls, fp32", torch.bfloat16: "floor: matmuls, bf16"}
DENSE = "floor: dense SwiGLU"
Build = Callable[[Shape, Weights], Contestant]


def _unwritten(package: str) -> Build:
    def build(shape: Shape, weights: Weights) -> Contestant:
        _module(package)
        raise Absent("installed, but nobody has written how to call it")

    return build


def contestants(device: str, dtype: torch.dtype) -> dict[str, Build]:
    """Who takes part, in the order of the tables; building one may raise :class:`Absent`."""
    found: dict[str, Build] = {
        MUSTER: Muster,
        GROUPED: partial(Transformers, implementation="grouped_mm"),
        "transformers, eager": partial(Transformers, implementation="eager"),
        "DeepSpeed MoE, no drop": partial(DeepSpeed, drop=False),
        f"DeepSpeed MoE, capacity {DeepSpeed.FACTOR}": partial(DeepSpeed, drop=True),
        "DeepSpeed AutoEP": AutoEP,
        "loop over experts": Loop,
    }
    if device != "cpu":
        found |= {package: _unwritten(package) for package in ("torchtitan", "megablocks", "sonicmoe")}
    found[DENSE] = Dense
    for kind in dict.fromkeys((dtype, torch.float32)):
        found[FLOORS[kind]] = partial(Matmuls, dtype=kind)
    return found
