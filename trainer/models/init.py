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

    Weights are normal with the standard deviation of :func:`initial_std`. Buffers and optimizer slots become
    zeros (:func:`fill_buffers` may change the buffers).

    Args:
        slices: from ``Engine.named_state``.
        seed: ``train.seed``.
    """
    parameters = {f"model.{name}" for name, _ in model.named_parameters()}
    for piece in slices:
        if piece.name not in parameters:
            piece.tensor.zero_()
            continue
        name = piece.name.removeprefix("model.")
        std = initial_std(model, name, len(piece.global_shape))
        if std is None:
            piece.tensor.fill_(1.0)
        else:
            key = name_key(name, seed=mix64_int(seed))
            normal_(piece.tensor, key, piece.global_shape, piece.offsets, std=std)


def initial_std(model: nn.Module, name: str, num_dims: int) -> float | None:
    """Standard deviation of a parameter's first values; None: ones.

    The innermost module around the parameter that has a method ``init_std(name)`` decides, given the name
    as that module knows it. Vectors of a norm (of a class named ``…Norm…``, or with ``norm`` in their path)
    need no such method: weights are ones there, biases zeros. Without a method at all, matrices get 0.02
    and vectors zeros.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if num_dims == 1 and ("norm" in name.lower() or "Norm" in type(owner).__name__):
        return 0.0 if leaf == "bias" else None
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        init_std = getattr(model.get_submodule(".".join(parts[:depth])), "init_std", None)
        if init_std is not None:
            std = init_std(".".join(parts[depth:]))
            assert std is None or isinstance(std, (int, float)), f"init_std({name!r}) gave {std!r}"
            return std
    return 0.02 if num_dims > 1 else 0.0


@torch.no_grad()
def fill_buffers(model: nn.Module) -> None:
    """Let every module with a method ``init_buffers()`` write its buffers, which were made without values."""
    for module in model.modules():
        init_buffers = getattr(module, "init_buffers", None)
        if init_buffers is not None:
            init_buffers()
