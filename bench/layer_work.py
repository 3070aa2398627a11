"""What the contestants of bench/layer.py are given, and what each must answer.

Shape suffixes: T tokens, K choices a token, E experts, N = T·K rows, D model width, H expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROUTINGS = ("balanced", "zipf", "recorded")
RECORDED = Path(__file__).resolve().parent / "data" / "routing.npz"
SKEW = 2.3
"""Rows of the busiest expert / the mean, with the routing ``zipf``."""
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest error of a right answer (see :func:`error`)."""


@dataclass(frozen=True)
class Shape:
    """One MoE layer with SwiGLU experts and the tokens it is given.

    Attributes:
        of: the family of models that has such a layer; picks the block of transformers.
    """

    name: str
    tokens: int
    dim: int
    ffn_dim: int
    num_experts: int
    top_k: int
    of: str

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of the nine matrix products of a step."""
        return 9 * 2 * self.rows * self.dim * self.ffn_dim

    @property
    def recorded_as(self) -> str:
        """Where RECORDED keeps a routing among as many experts."""
        return f"E{self.num_experts}_K{self.top_k}"


# DeepSeek-V3's layer on one of 8 ep ranks, each with 8,192 tokens, when experts are used evenly: 8 · 8,192 · 8 / 8
# rows for its 32 experts. Here these are all rows of 8,192 tokens, whose 8 choices all live on the rank.
SHAPES = {
    "cpu": [
        Shape("mixtral", 4096, 512, 1024, 8, 2, "mixtral"),
        Shape("fine", 4096, 256, 256, 64, 8, "olmoe"),
        Shape("switch", 8192, 512, 1536, 8, 1, "qwen3_moe"),
    ],
    "cuda": [
        Shape("mixtral-8x7b", 8192, 4096, 14336, 8, 2, "mixtral"),
        Shape("olmoe", 16384, 2048, 1024, 64, 8, "olmoe"),
        Shape("deepseek-v3-ep8", 8192, 7168, 2048, 32, 8, "qwen3_moe"),
    ],
}


@dataclass(frozen=True)
class Weights:
    """Of all experts: ``y = (silu(x w1) · x w3) w2``; gradients of them likewise."""

    w1_EDH: Tensor
    w3_EDH: Tensor
    w2_EHD: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.w1_EDH, self.w3_EDH, self.w2_EHD))


@dataclass(frozen=True)
class Work:
    """One step's inputs, the same for all.

    Attributes:
        x_TD, dy_TD: input, and the gradient of the output.
        expert_TK: int64, no expert twice in a row.
        weight_TK: fp32, multiples of 1/256, which bf16 holds; with several choices they add up to 1, with one it
            is larger than the 1/E of an even router.
    """

    x_TD: Tensor
    dy_TD: Tensor
    expert_TK: Tensor
    weight_TK: Tensor


@dataclass(frozen=True)
class Answer:
    """Output of a step and its gradients."""

    y_TD: Tensor
    dx_TD: Tensor
    dweight_TK: Tensor
    dweights: Weights

    def parts(self) -> dict[str, Tensor]:
        named = zip(("dw1", "dw3", "dw2"), self.dweights, strict=True)
        return {"y": self.y_TD, "dx": self.dx_TD, "d combine weights": self.dweight_TK, **dict(named)}


class NoRecording(Exception):
    """No routing was recorded among so many experts."""


def make_weights(shape: Shape, dtype: torch.dtype, device: str) -> Weights:
    g = torch.Generator(device).manual_seed(1)
    E, D, H = shape.num_experts, shape.dim, shape.ffn_dim

    def draw(fan_in: int, fan_out: int) -> Tensor:
        return (torch.randn(E, fan_in, fan_out, generator=g, device=device) / fan_in**0.5).to(dtype)

    return Weights(draw(D, H), draw(D, H), draw(H, D))


def make_work(shape: Shape, dtype: torch.dtype, routing: str, index: int, device: str) -> Work:
    """Fresh inputs of a round.

    Raises:
        NoRecording: for the routing ``recorded``.
    """
    g = torch.Generator().manual_seed(1000 + index)
    expert_TK = route(shape, routing, index, g)
    weight_TK = combine_weights(shape, g)
    on_device = torch.Generator(device).manual_seed(2000 + index)
    x, dy = (
        torch.randn(shape.tokens, shape.dim, generator=on_device, device=device).to(dtype) for _ in range(2)
    )
    return Work(x, dy, expert_TK.to(device), weight_TK.to(device))


def route(shape: Shape, routing: str, index: int, g: torch.Generator) -> Tensor:
    """expert_TK of a round: the same load each time, of other experts and tokens (recorded: other layers)."""
    if routing == "recorded":
        return _recorded(shape, index, g)
    E = shape.num_experts
    expert_TK = _balanced(shape, g) if routing == "balanced" else _zipf(shape, exponent(shape), g)
    return torch.randperm(E, generator=g)[expert_TK]


def _balanced(shape: Shape, g: torch.Generator) -> Tensor:
    """In each group of E tokens, token i takes experts i + c_1 … i + c_K (mod E): every expert is taken K times."""
    T, E, K = shape.tokens, shape.num_experts, shape.top_k
    num_groups = -(-T // E)
    offset_GK = torch.rand(num_groups, E, generator=g).argsort(1)[:, :K]
    expert_GEK = (torch.arange(E)[None, :, None] + offset_GK[:, None]) % E
    return expert_GEK.flatten(0, 1)[:T][torch.randperm(T, generator=g)]


def _zipf(shape: Shape, power: float, g: torch.Generator) -> Tensor:
    """K distinct experts a token, drawn one after the other with probability ∝ rank^-power (Gumbel's trick)."""
    E = shape.num_experts
    uniform = torch.rand(shape.tokens, E, generator=g).clamp_min(1e-9)
    score_TE = -power * torch.arange(1, E + 1).log() - (-uniform.log()).log()
    return score_TE.topk(shape.top_k, 1).indices


def exponent(shape: Shape) -> float:
    """Of the law that gives the busiest expert SKEW times the mean; by bisection."""
    low, high = 0.0, 8.0
    for _ in range(20):
        middle = (low + high) / 2
        expert_TK = _zipf(shape, middle, torch.Generator().manual_seed(0))
        if max_over_mean(expert_TK, shape.num_experts) < SKEW:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _recorded(shape: Shape, index: int, g: torch.Generator) -> Tensor:
    """A layer's choices of as many tokens in a row, from anywhere in the record (round again at its end)."""
    if not RECORDED.exists():
        raise NoRecording(f"no {RECORDED.name}: python -m bench.routing makes it")
    with np.load(RECORDED) as file:
        if shape.recorded_as not in file:
            raise NoRecording(f"no run of {shape.num_experts} experts, {shape.top_k} a token, was recorded")
        layers = torch.from_numpy(file[shape.recorded_as]).long()
    layer_TK = layers[index % len(layers)]
    start = int(torch.randint(len(layer_TK), (), generator=g))
    return layer_TK[(start + torch.arange(shape.tokens)) % len(layer_TK)]


def combine_weights(shape: Shape, g: torch.Generator) -> Tensor:
    T, K, E = shape.tokens, shape.top_k, shape.num_experts
    if K == 1:
        return torch.randint(256 // E + 16, 250, (T, 1), generator=g) / 256
    share_TK = torch.randn(T, K, generator=g).softmax(1).sort(1, descending=True).values
    parts_TK = 1 + (share_TK * (256 - K)).floor()
    parts_TK[:, 0] += 256 - parts_TK.sum(1)
    return parts_TK / 256


def max_over_mean(expert_TK: Tensor, num_experts: int) -> float:
    counts = torch.bincount(expert_TK.flatten(), minlength=num_experts)
    return float(counts.max() / counts.double().mean())


def truth(work: Work, weights: Weights) -> Answer:
    """In fp64, an expert at a time."""
    x, dy, weight = work.x_TD.double(), work.dy_TD.double(), work.weight_TK.double()
    y, dx, dweight = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weight)
    grads: list[list[Tensor]] = [[], [], []]
    for e, stacked in enumerate(zip(*weights, strict=True)):
        token, k = torch.where(work.expert_TK == e)
        leaves = [leaf.detach().double().requires_grad_() for leaf in (x[token], *stacked)]
        rows, w1, w3, w2 = leaves
        out = (F.silu(rows @ w1) * (rows @ w3)) @ w2
        y.index_add_(0, token, out.detach() * weight[token, k, None])
        dweight[token, k] = (dy[token] * out.detach()).sum(1)
        drows, *dws = torch.autograd.grad(out, leaves, dy[token] * weight[token, k, None])
        dx.index_add_(0, token, drows)
        for kept, dw in zip(grads, dws, strict=True):
            kept.append(dw)
    return Answer(y, dx, dweight, Weights(*(torch.stack(kept) for kept in grads)))


def error(answer: Answer, right: Answer) -> tuple[float, str]:
    """Largest difference / largest right value, of the tensor where that is worst, and its name."""
    errors = {}
    for (name, got), wanted in zip(answer.parts().items(), right.parts().values(), strict=True):
        difference = float((got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
        errors[name] = difference if difference == difference else float("inf")
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def wrong_rows(answer: Answer, right: Answer, limit: float) -> float:
    """Share of the tokens whose output is wrong."""
    difference_TD = (answer.y_TD.double() - right.y_TD).abs()
    # Not `>`, so that NaN is wrong too.
    wrong_T = ~(difference_TD <= limit * right.y_TD.abs().max()).all(1)
    return float(wrong_T.double().mean())


def normalised(right: Answer, work: Work) -> Answer:
    """What is right where combine weights are divided by their sum, which is 1."""
    weight_TK = work.weight_TK.double()
    along_T1 = (right.dweight_TK * weight_TK).sum(1, keepdim=True)
    return replace(right, dweight_TK=right.dweight_TK - along_T1)
