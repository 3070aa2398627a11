"""Stacked feed-forward experts, each applied to its own run of rows.

Shape suffixes: N rows, E experts that live here, D model width, F expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.dispatch.permute import Permutation
from trainer.config import Activation, RunConfig
from trainer.config_moe import ExpertSize
from trainer.models.layers import activate
from trainer.moe.by_expert import swiglu_by_expert, swiglu_of_tokens


def grouped_linear(x_ND: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ``ends[e-1] … ends[e]-1`` of x times ``weight[e]``: ``[N, D] → [N, F]``.

    Through ``torch.nn.functional.grouped_mm`` where it serves (row strides of 16 bytes, at most 32-bit
    floats, at least one row), else a loop over the unbound experts.

    Args:
        ends_E: int32, ascending; the last one is N (rows past it would be undefined).
    """
    aligned = all(size * x_ND.element_size() % 16 == 0 for size in weight_EDF.shape[1:])
    if aligned and x_ND.shape[0] and x_ND.dtype in (torch.float32, torch.bfloat16, torch.float16):
        y_NF = F.grouped_mm(x_ND, weight_EDF, offs=ends_E)
        if y_NF.requires_grad:
            # Its backward reads strides that an expanded gradient (of .sum(), say) does not have.
            y_NF.register_hook(torch.Tensor.contiguous)
        return y_NF
    sizes = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    return torch.cat([x @ w for x, w in zip(x_ND.split(sizes), weight_EDF.unbind(), strict=True)])


def build_experts(config: RunConfig) -> nn.Module:
    """The routed experts of a layer: one stack, or one a size where they differ."""
    model, layout = config.model, config.layout
    if layout.expert_sizes:
        return SizedExperts(model.dim, layout.expert_sizes, model.activation)
    return Experts(layout.num_experts, model.dim, layout.expert_ffn_dim, model.activation)


class Experts(nn.Module):
    """``num_experts`` feed-forward layers of one shape: ``w2(silu(w1 x) · w3 x)``, or without the gate.

    The number of experts is read from the weights, since expert parallelism leaves a rank its share.
    """

    def __init__(self, num_experts: int, dim: int, ffn_dim: int, activation: Activation) -> None:
        super().__init__()
        self.num_stacked_experts = num_experts
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, ffn_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))
        self.w3 = (
            nn.Parameter(torch.empty(num_experts, dim, ffn_dim)) if activation is Activation.swiglu else None
        )

    @property
    def takes_tokens(self) -> bool:
        """Whether ``forward`` takes tokens and brings the answers home by itself."""
        return self.w3 is not None and self.w1.device.type == "cpu"

    def forward(
        self,
        rows_ND: Tensor,
        counts_E: Tensor,
        home: Permutation | None = None,
        weight_TK: Tensor | None = None,
    ) -> Tensor:
        """Rows sorted by expert, ``counts_E`` (int64) of each, to outputs in the same order.

        Where it :attr:`takes_tokens` it may be given ``[T, D]`` instead, with the permutation of their pairs to
        rows and the combine weights; the weighted sums of their answers come back.
        """
        assert counts_E.shape[0] == self.w1.shape[0], "one count an expert"
        if self.takes_tokens:
            assert self.w3 is not None
            stacks = [w.to(rows_ND.dtype) for w in (self.w1, self.w3, self.w2)]
            if home is None or weight_TK is None:
                return swiglu_by_expert(rows_ND, counts_E.tolist(), *stacks)
            return swiglu_of_tokens(rows_ND, weight_TK, home, counts_E.tolist(), *stacks)
        assert home is None, "tokens where rows are taken"
        ends_E = counts_E.cumsum(0).to(torch.int32)
        gate = grouped_linear(rows_ND, self.w1.to(rows_ND.dtype), ends_E)
        up = None if self.w3 is None else grouped_linear(rows_ND, self.w3.to(rows_ND.dtype), ends_E)
        return grouped_linear(activate(gate, up, self.activation), self.w2.to(rows_ND.dtype), ends_E)


class SizedExperts(nn.Module):
    """Experts of several widths: a stack a size, each of which expert parallelism divides.

    Wide experts for what is hard and narrow ones for the rest (HMoE, arXiv:2408.10681), or for a modality that
    needs less (ERNIE 4.5's heterogeneous experts).
    """

    def __init__(self, dim: int, sizes: list[ExpertSize], activation: Activation) -> None:
        super().__init__()
        self.num_of_size = [size.num for size in sizes]
        self.sizes = nn.ModuleList(Experts(size.num, dim, size.ffn_dim, activation) for size in sizes)

    @property
    def takes_tokens(self) -> bool:
        """As :attr:`Experts.takes_tokens`."""
        return all(stack.takes_tokens for stack in self.sizes)

    def forward(
        self,
        rows_ND: Tensor,
        counts_E: Tensor,
        home: Permutation | None = None,
        weight_TK: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`Experts.forward`, experts in the order of the sizes. One host sync."""
        # Not from the weights: outside of its own forward a stack's may not be gathered (ZeRO-3).
        share = sum(self.num_of_size) // counts_E.shape[0]
        counts = counts_E.split([num // share for num in self.num_of_size])
        num_rows = torch.stack([part.sum() for part in counts]).tolist()
        if home is None:
            parts = zip(self.sizes, rows_ND.split(num_rows), counts, strict=True)
            return torch.cat([stack(rows, count) for stack, rows, count in parts])
        homes = home.split(num_rows)
        answers = [
            stack(rows_ND, count, own, weight_TK)
            for stack, count, own in zip(self.sizes, counts, homes, strict=True)
        ]
        return torch.stack(answers).sum(0)
