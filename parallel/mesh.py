"""ParallelDims → the dense and the sparse DeviceMesh, two views of one world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.dims import DENSE_AXES, SPARSE_AXES, ParallelDims


@dataclass(frozen=True)
class Meshes:
    """Both views and what is cut from them. Built by :func:`build_meshes`; passed, never global.

    Attributes:
        fsdp: where dense parameters are sharded: ``(dp_shard,)``, or ``(dp_replicate, dp_shard)`` for HSDP.
        expert_fsdp: the same for experts over ``expert_shard``; None where ep alone spreads them.
        ep: ranks that hold one full set of experts between them.
        replica: ranks that hold one full copy of the model between them (the dp_shard axis, which is
            also expert_shard × ep): a sum over it counts every parameter element exactly once.
    """

    dims: ParallelDims
    fsdp: DeviceMesh
    expert_fsdp: DeviceMesh | None
    ep: dist.ProcessGroup
    replica: dist.ProcessGroup


def build_meshes(dims: ParallelDims, device_type: str) -> Meshes:
    """Make both meshes. Collective: every rank of the world calls it in the same order.

    Args:
        dims: degrees whose product is the size of the default process group.
        device_type: ``cpu`` or ``cuda``.
    """
    dense = _mesh(device_type, DENSE_AXES, dims.dense_shape, ("dp_shard",))
    sparse = _mesh(device_type, SPARSE_AXES, dims.sparse_shape, ("expert_shard", "ep"))
    replicated = dims.dp_replicate > 1
    expert_fsdp = None
    if dims.dp_replicate * dims.expert_shard > 1:
        expert_fsdp = sparse["dp_replicate", "expert_shard"] if replicated else sparse["expert_shard"]
    return Meshes(
        dims=dims,
        fsdp=dense["dp_replicate", "dp_shard"] if replicated else dense["dp_shard"],
        expert_fsdp=expert_fsdp,
        ep=sparse["ep"].get_group(),
        replica=dense["dp_shard"].get_group(),
    )


def _mesh(device_type: str, axes: Sequence[str], shape: Sequence[int], kept: Sequence[str]) -> DeviceMesh:
    """A mesh of the axes whose degree is above 1, and of those that are asked for whatever theirs is.

    An axis of degree 1 is as many groups as there are ranks. Every rank calls for each of them in turn, and each
    is threads (gloo) or a communicator (NCCL) of its own.
    """
    used = {axis: degree for axis, degree in zip(axes, shape, strict=True) if degree > 1 or axis in kept}
    return init_device_mesh(device_type, tuple(used.values()), mesh_dim_names=tuple(used))
