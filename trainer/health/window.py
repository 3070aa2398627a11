"""What the last steps say about each MoE layer: a window of exponential means over the steps' totals.

One step is noise; a window of about n steps is a state. The totals are the same numbers on every rank, so
every rank holds the same window and may act on it without asking the others.

Shape suffixes: L MoE layers, E experts (zero and copy experts last), V values a layer.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.step import Totals

_SLOW = 8
"""The slow mean reaches this many windows back: what the window is compared with."""

# Columns before the experts' shares.
_ENTROPY, _SLOW_ENTROPY, _CONFIDENCE, _DROPPED, _UNSERVED = range(5)
_NUM_SCALARS = 5


@dataclass(frozen=True)
class Reading:
    """A window on the host. All tensors are on the CPU, fp64 unless said otherwise.

    Attributes:
        num_steps_L: steps that the window has taken in since it was made or forgot the layer, int64.
        share_LE: an expert's share of its layer's routed pairs, before drops; each row sums to 1.
        idle_LE: steps in a row in which the expert got no token, int64; 0: it got one in the last step.
        entropy_L: of the routing distribution, nats a token.
        slow_entropy_L: the same over eight windows.
        confidence_L: the largest probability of a token's routing distribution, mean.
        dropped_L: share of the routed pairs that were over capacity.
        unserved_L: share of the tokens that no expert answered.
    """

    num_steps_L: Tensor
    share_LE: Tensor
    idle_LE: Tensor
    entropy_L: Tensor
    slow_entropy_L: Tensor
    confidence_L: Tensor
    dropped_L: Tensor
    unserved_L: Tensor

    @property
    def ratio_LE(self) -> Tensor:
        """Load of each expert / mean load of its layer."""
        return self.share_LE * self.share_LE.shape[1]

    @property
    def max_over_mean_L(self) -> Tensor:
        """Load of the busiest expert / mean load."""
        return self.ratio_LE.amax(1)

    @property
    def num_effective_L(self) -> Tensor:
        """How many experts would share the load as unevenly if they shared it evenly: the exponential of the
        shares' entropy, from 1 (or k, since a token's k experts differ) to E."""
        return torch.special.entr(self.share_LE).sum(1).exp()


class Window:
    """Exponential means over the last steps, kept on the device; reading them is the only host sync.

    Args:
        num_steps: after which a step's weight has fallen to 1/e.
        num_tokens: input tokens of a step over all ranks.
    """

    def __init__(self, num_steps: int, num_tokens: int) -> None:
        self.num_steps, self.num_tokens = num_steps, num_tokens
        self._mean_LV: Tensor | None = None
        self._idle_LE: Tensor | None = None
        self._num_L: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was taken in yet (as it stays in a model without MoE layers)."""
        return self._mean_LV is None or not len(self._mean_LV)

    @torch.no_grad()
    def update(self, totals: Totals) -> None:
        """Take in a step. No host sync. A layer whose numbers are not finite is passed over."""
        value_LV = _values(totals, self.num_tokens)
        mean_LV, idle_LE, num_L = self._on(value_LV)
        # Weighted like Adam's moments (arXiv:1412.6980): `read` divides by the sum of the weights.
        decay_V = self._decay(value_LV.shape[1]).to(value_LV.device)
        known_L = value_LV.isfinite().all(1)
        moved_LV = decay_V * mean_LV + (1.0 - decay_V) * value_LV
        self._mean_LV = torch.where(known_L[:, None], moved_LV, mean_LV)
        self._idle_LE = torch.where(totals.counts_LE > 0, 0, idle_LE + 1)
        self._num_L = num_L + known_L

    def read(self) -> Reading:
        """The window on the host. Not before it took in a step."""
        assert self._mean_LV is not None and self._idle_LE is not None and self._num_L is not None
        mean_LV, num_L = self._mean_LV.cpu(), self._num_L.cpu()
        decay_V = self._decay(mean_LV.shape[1])
        weight_LV = 1.0 - decay_V ** num_L[:, None].double()
        mean_LV = torch.where(weight_LV > 0, mean_LV / weight_LV, 0.0)
        return Reading(
            num_steps_L=num_L,
            share_LE=mean_LV[:, _NUM_SCALARS:],
            idle_LE=self._idle_LE.cpu(),
            entropy_L=mean_LV[:, _ENTROPY],
            slow_entropy_L=mean_LV[:, _SLOW_ENTROPY],
            confidence_L=mean_LV[:, _CONFIDENCE],
            dropped_L=mean_LV[:, _DROPPED],
            unserved_L=mean_LV[:, _UNSERVED],
        )

    def forget(self, layer: int) -> None:
        """Begin anew for one layer (by its place among the MoE layers), as after something changed it."""
        assert self._mean_LV is not None and self._idle_LE is not None and self._num_L is not None
        for tensor in (self._mean_LV, self._idle_LE, self._num_L):
            tensor[layer] = 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        if self._mean_LV is None or self._idle_LE is None or self._num_L is None:
            return {}
        return {
            "num_experts": self._idle_LE.shape[1],
            "mean": _encode(self._mean_LV, "<f8"),
            "idle": _encode(self._idle_LE, "<i8"),
            "num": _encode(self._num_L, "<i8"),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``'s numbers."""
        if not state:
            self._mean_LV = self._idle_LE = self._num_L = None
            return
        num_experts = state["num_experts"]
        self._mean_LV = _decode(state["mean"], "<f8").view(-1, _NUM_SCALARS + num_experts)
        self._idle_LE = _decode(state["idle"], "<i8").view(-1, num_experts)
        self._num_L = _decode(state["num"], "<i8")

    def _on(self, value_LV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state where the totals are; new where it does not fit them (layers or experts were changed)."""
        mean_LV, device = self._mean_LV, value_LV.device
        if mean_LV is None or mean_LV.shape != value_LV.shape:
            num_layers, num_values = value_LV.shape
            idle_LE = torch.zeros(num_layers, num_values - _NUM_SCALARS, dtype=torch.int64, device=device)
            return torch.zeros_like(value_LV), idle_LE, idle_LE.new_zeros(num_layers)
        assert self._idle_LE is not None and self._num_L is not None
        return mean_LV.to(device), self._idle_LE.to(device), self._num_L.to(device)

    def _decay(self, num_values: int) -> Tensor:
        decay_V = torch.full((num_values,), 1.0 - 1.0 / self.num_steps, dtype=torch.float64)
        decay_V[_SLOW_ENTROPY] = 1.0 - 1.0 / (_SLOW * self.num_steps)
        return decay_V


def _values(totals: Totals, num_tokens: int) -> Tensor:
    """A step's numbers as ``[L, V]`` fp64."""
    pairs_L1 = totals.counts_LE.sum(1, keepdim=True).clamp_min(1).double()
    entropy_L1 = totals.entropy_L[:, None].double() / totals.num_targets
    return torch.cat(
        [
            entropy_L1,
            entropy_L1,
            totals.confidence_L[:, None].double() / totals.num_targets,
            totals.dropped_L[:, None].double() / pairs_L1,
            totals.unserved_L[:, None].double() / num_tokens,
            totals.counts_LE.double() / pairs_L1,
        ],
        dim=1,
    )


def _encode(tensor: Tensor, dtype: str) -> str:
    return base64.b64encode(tensor.cpu().numpy().astype(dtype).tobytes()).decode("ascii")


def _decode(text: str, dtype: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=dtype).astype(dtype[1:]))
