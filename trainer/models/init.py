"""Initial weights: a function of (seed, parameter name, global index), so the same under any layout.

The expert index is part of the global index, so an expert's weights do not depend on which rank holds it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from parallel.engines.base import StateSlice
from trainer.bits import mix64_int, name_key, normal_


@torch.no_grad()
def initialise(model: nn.Module, slices: Iterable[StateSlice], seed: int) -> None:
    """Write initial values into this rank's slices of weights and persistent buffers.

    Weights are normal with the standard deviation that ``model.init_std(name)`` gives (None: ones). A model
    without that method gets 0.02 for matrices, ones for vectors named ``…norm…`` and zeros for other
    vectors. Buffers and optimizer slots become zeros.

    Args:
        slices: from ``Engine.named_state``.
        seed: ``train.seed``.
    """
    parameters = {f"model.{name}" for name, _ in model.named_parameters()}
    init_std = getattr(model, "init_std", None)
    for piece in slices:
        if piece.name not in parameters:
            piece.tensor.zero_()
            continue
        name = piece.name.removeprefix("model.")
        if init_std is not None:
            std = init_std(name)
        elif len(piece.global_shape) > 1:
            std = 0.02
        else:
            std = None if "norm" in name else 0.0
        if std is None:
            piece.tensor.fill_(1.0)
        else:
            key = name_key(name, seed=mix64_int(seed))
            normal_(piece.tensor, key, piece.global_shape, piece.offsets, std=std)
