"""Where each parameter lives: declared here, outside the model, which does not know.

    ==========  ======  =======================================  ==================================
    parameters  view    sharded                                  reduced (a sum) over
    ==========  ======  =======================================  ==================================
    experts     sparse  dim 0 on ep, dim 1 on expert_shard       dp_replicate, expert_shard
    all others  dense   dim 0 on dp_shard                        dp_replicate, dp_shard
    buffers     dense   replicated                               by their owner (router bias: world)
    ==========  ======  =======================================  ==================================

An expert's own gradient needs no reduction over ep: its rows came from all ep ranks already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn


class ExpertModule(Protocol):
    """A module whose every parameter stacks the experts along dim 0.

    It is built with all E experts; an engine may leave it ``E / ep`` of them, so its forward reads the
    number from its weights: ``forward(rows_ND, counts_E) -> rows_ND`` for whichever experts are there.
    """

    num_stacked_experts: int


@dataclass(frozen=True)
class Placement:
    """A mesh view and, for each mesh axis that shards, the tensor dim it cuts."""

    view: str
    shard_dims: dict[str, int]


EXPERT = Placement("sparse", {"ep": 0, "expert_shard": 1})
DENSE = Placement("dense", {"dp_shard": 0})


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module) that holds stacked experts."""
    for name, module in model.named_modules():
        if hasattr(module, "num_stacked_experts"):
            yield name, module


def placements(model: nn.Module) -> dict[str, Placement]:
    """Placement of every parameter, by canonical name."""
    experts = tuple(f"{name}." if name else "" for name, _ in expert_modules(model))
    return {
        name: EXPERT if experts and name.startswith(experts) else DENSE
        for name, _ in model.named_parameters()
    }
