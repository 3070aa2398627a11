"""What a contestant of bench/layer.py is; Muster, a plain loop and the floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.layer_work import Answer, Shape, Weights, Work
from parallel.dispatch.base import Routing
from parallel.dispatch.local import LocalDispatcher
from trainer.config import Activation
from trainer.moe.experts import Experts


def leaf_of(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def grad_of(leaf: Tensor) -> Tensor:
    """Zeros where no row came by."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class Contestant:
    """Forward and backward of one layer.

    Attributes:
        normalises: whether it divides the combine weights of a token by their sum. They add up to 1, so only their
            gradient differs: it has no part along the weights.
        module: holds the experts.
        leaves: input and combine weights of the step.
    """

    normalises = False
    module: Any
    leaves: list[Tensor]

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.leaves = []

    def prepare(self, work: Work) -> None:
        """What is no part of a step; not timed. Frees the last step's gradients."""
        self.leaves = [leaf_of(work.x_TD), leaf_of(work.weight_TK)]
        self.module.zero_grad(set_to_none=True)

    def release(self) -> None:
        self.leaves = []
        self.module.zero_grad(set_to_none=True)

    def forward(self, work: Work) -> Tensor:
        """y_TD from ``leaves`` and the routing."""
        raise NotImplementedError

    def step(self, work: Work) -> Tensor:
        """y_TD; gradients stay where the optimizer would find them. What is timed."""
        y_TD = self.forward(work)
        y_TD.backward(work.dy_TD)
        return y_TD.detach()

    def dweight(self, work: Work) -> Tensor:
        """Gradient of the combine weights, after a step."""
        return grad_of(self.leaves[1])

    def dweights(self) -> Weights:
        """Gradients of the experts' weights, after a step."""
        raise NotImplementedError

    def answer(self, work: Work) -> Answer:
        self.prepare(work)
        y_TD = self.step(work)
        return Answer(y_TD, grad_of(self.leaves[0]), self.dweight(work), self.dweights())

    def leaf_grads(self) -> list[Tensor]:
        leaves = [*self.leaves, *self.module.parameters()]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]


class Muster(Contestant):
    """The local dispatcher, which one process uses, and the experts."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        experts = Experts(shape.num_experts, shape.dim, shape.ffn_dim, Activation.swiglu)
        experts.to(weights.w1_EDH)
        super().__init__(experts)
        self.experts, self.dispatcher = experts, LocalDispatcher()
        assert experts.w3 is not None
        for own, given in zip((experts.w1, experts.w3, experts.w2), weights, strict=True):
            own.data.copy_(given)

    def forward(self, work: Work) -> Tensor:
        x, weight = self.leaves
        routing = Routing(work.expert_TK, weight, self.experts.num_stacked_experts)
        return self.dispatcher.run(x, routing, self.experts)[0]

    def dweights(self) -> Weights:
        assert self.experts.w3 is not None
        return Weights(grad_of(self.experts.w1), grad_of(self.experts.w3), grad_of(self.experts.w2))


class Mlp(nn.Module):
    """A dense SwiGLU layer; the expert that a user of DeepSpeed writes."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, ffn_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Loop(Contestant):
    """An expert after the other: index_select, three products, index_add_. Experts are modules of their own."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        stacks = (nn.ParameterList(part.clone() for part in stacked) for stacked in weights)
        self.w1, self.w3, self.w2 = stacks
        super().__init__(nn.ModuleList((self.w1, self.w3, self.w2)))

    def forward(self, work: Work) -> Tensor:
        x, weight = self.leaves
        y = torch.zeros_like(x)
        for e, (w1, w3, w2) in enumerate(zip(self.w1, self.w3, self.w2, strict=True)):
            token, k = torch.where(work.expert_TK == e)
            rows = x.index_select(0, token)
            out = (F.silu(rows @ w1) * (rows @ w3)) @ w2
            y.index_add_(0, token, (out * weight[token, k, None]).to(y.dtype))
        return y

    def dweights(self) -> Weights:
        return Weights(*(torch.stack([grad_of(w) for w in stack]) for stack in (self.w1, self.w3, self.w2)))


class Floor(Contestant):
    """The same FLOPs without routing. Nothing to check."""


class Dense(Floor):
    """One dense SwiGLU layer for all N rows, with autograd."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        mlp = Mlp(shape.dim, shape.ffn_dim).to(weights.w1_EDH)
        super().__init__(mlp)
        self.top_k = shape.top_k

    def prepare(self, work: Work) -> None:
        self.release()
        self.leaves = [leaf_of(work.x_TD.repeat(self.top_k, 1))]
        self.dy_ND = work.dy_TD.repeat(self.top_k, 1)

    def step(self, work: Work) -> Tensor:
        y_ND = self.module(self.leaves[0])
        y_ND.backward(self.dy_ND)
        return y_ND.detach()


class Matmuls(Floor):
    """The nine products of a step, each as one of N rows, written to memory that is there already."""

    def __init__(self, shape: Shape, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__(nn.Module())
        self.top_k = shape.top_k
        self.w1, self.w3, self.w2 = (stacked[0].to(dtype) for stacked in weights)
        D, H = shape.dim, shape.ffn_dim
        self.inner_NH = torch.randn(shape.rows, H, device=self.w1.device).to(dtype)
        sizes = {"NH": (shape.rows, H), "ND": (shape.rows, D), "DH": (D, H), "HD": (H, D)}
        self.out = {name: self.inner_NH.new_zeros(size) for name, size in sizes.items()}

    def prepare(self, work: Work) -> None:
        dtype = self.w1.dtype
        self.x_ND, self.dy_ND = (t.to(dtype).repeat(self.top_k, 1) for t in (work.x_TD, work.dy_TD))

    def step(self, work: Work) -> Tensor:
        x, dy, inner, out = self.x_ND, self.dy_ND, self.inner_NH, self.out
        for w in (self.w1, self.w3):
            torch.mm(x, w, out=out["NH"])
        y = torch.mm(inner, self.w2, out=out["ND"])
        torch.mm(dy, self.w2.T, out=out["NH"])
        torch.mm(inner.T, dy, out=out["HD"])
        for w in (self.w1, self.w3):
            torch.mm(inner, w.T, out=out["ND"])
            torch.mm(x.T, inner, out=out["DH"])
        return y
