"""Which experts are chosen together, and which data goes to which expert: counted from the choices themselves.

Shape suffixes: L MoE layers, E experts (zero and copy experts last), G domains, B rows, S positions, K choices,
T = real tokens of a micro-batch (padding rows left out, so that the counts do not depend on the layout).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.dispatch.permute import count
from trainer.data.batch import Batch
from trainer.moe.balance import MoeStats

MAX_EXPERTS = 64
"""Up to so many experts all pairs of a layer are written, beyond them the ``MAX_PAIRS`` most frequent."""
MAX_PAIRS = 512
_MAX_ELEMENTS = 2**25


class RoutingMaps:
    """Adds up micro-batches on the device; one all-reduce at the end.

    Args:
        domains: names by number, for batches that come with domain ids; fewer than two: not counted.
    """

    def __init__(self, domains: Sequence[str] = ()) -> None:
        self.domains = list(domains) if len(domains) > 1 else []
        self.num_experts = self.top_k = 0
        self._counts_LE: Tensor | None = None
        self._pairs_LEE: Tensor | None = None
        self._domains_LGE: Tensor | None = None

    @property
    def num_layers(self) -> int:
        """MoE layers that were counted."""
        return 0 if self._counts_LE is None else len(self._counts_LE)

    @torch.no_grad()
    def add(self, moe: Sequence[MoeStats], batch: Batch, domain_BS: Tensor | None = None) -> None:
        """Count one micro-batch of this rank. No host sync.

        Args:
            domain_BS: int64, on the batch's device.
        """
        if not moe:
            return
        num_layers, num_experts = len(moe), len(moe[0].counts_E)
        top_k = moe[0].expert_BSK.shape[-1]
        real_B = batch.sample_ids >= 0
        if self._counts_LE is None:
            self.num_experts, self.top_k = num_experts, top_k
            zeros = moe[0].counts_E.new_zeros
            self._counts_LE = zeros(num_layers, num_experts)
            if top_k > 1 and num_layers * num_experts**2 <= _MAX_ELEMENTS:
                self._pairs_LEE = zeros(num_layers, num_experts, num_experts)
            if self.domains and domain_BS is not None:
                self._domains_LGE = zeros(num_layers, len(self.domains), num_experts)
        for layer, stats in enumerate(moe):
            # A padding row chooses nobody.
            expert_BSK = stats.expert_BSK.masked_fill(~real_B[:, None, None], num_experts)
            self._counts_LE[layer] += count(expert_BSK, num_experts + 1)[:num_experts]
            if self._pairs_LEE is not None:
                self._pairs_LEE[layer] += _pairs(expert_BSK.flatten(0, 1), num_experts)
            if self._domains_LGE is not None:
                assert domain_BS is not None
                bins = num_experts + 1
                key = expert_BSK + domain_BS[..., None] * bins
                found = count(key, len(self.domains) * bins).view(-1, bins)
                self._domains_LGE[layer] += found[:, :num_experts]

    def reduce(self) -> None:
        """Sum over all ranks. Collective."""
        for tensor in (self._counts_LE, self._pairs_LEE, self._domains_LGE):
            if tensor is not None:
                dist.all_reduce(tensor)

    def record(self, layers: Sequence[int]) -> dict[str, Any]:
        """What is written, JSON-able (a host sync).

        Args:
            layers: block index of each MoE layer.
        """
        if self._counts_LE is None:
            return {}
        found: dict[str, Any] = {
            "layers": list(layers),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "counts": self._counts_LE.tolist(),
        }
        if self._pairs_LEE is not None:
            if self.num_experts <= MAX_EXPERTS:
                row, column = torch.triu_indices(self.num_experts, self.num_experts, offset=1)
                found["pair_counts"] = self._pairs_LEE.cpu()[:, row, column].tolist()
            else:
                found["pairs"] = [_strongest(pairs_EE) for pairs_EE in self._pairs_LEE.cpu()]
        if self._domains_LGE is not None:
            found["domains"] = self.domains
            found["domain_counts"] = self._domains_LGE.tolist()
        return found


def _pairs(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens that chose both of two experts, int64 ``[E, E]``; E among the choices means none."""
    chosen_TE = torch.zeros(len(expert_TK), num_experts + 1, device=expert_TK.device)
    chosen_TE = chosen_TE.scatter_(1, expert_TK, 1.0)[:, :num_experts]
    return (chosen_TE.T @ chosen_TE).long()  # sums of ones: exact in fp32 up to 2^24 tokens


def _strongest(pairs_EE: Tensor) -> list[list[int]]:
    """``[i, j, tokens]`` with i < j of the most frequent pairs, most frequent first."""
    upper = torch.triu(pairs_EE, diagonal=1).flatten()
    order = upper.argsort(descending=True, stable=True)[:MAX_PAIRS]
    num_experts = len(pairs_EE)
    return [[at // num_experts, at % num_experts, int(upper[at])] for at in order.tolist() if upper[at]]
