"""The native engine: FSDP2 for dense parameters, expert parallelism and FSDP2 for experts.

    dense    fully_shard over (dp_replicate ·) dp_shard, a unit a block and one for the rest
    experts  first cut to E / ep along dim 0, then fully_shard over (dp_replicate ·) expert_shard along dim 1;
             where nothing is left of the world after ep they are plain tensors, reduced by nobody
    1 rank   nothing is wrapped at all

Every reduction is a sum. The optimizer works on the local slices (plain tensors sharing FSDP's storage), so a
fused kernel serves all of them at once whatever mesh they are on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from parallel.engines.base import Shardable, StateSlice, Update
from parallel.gradients import clip_, global_norm
from parallel.mesh import Meshes
from parallel.placement import EXPERT, expert_modules, placements

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]


class NativeEngine:
    """See :class:`parallel.engines.base.Engine`.

    Args:
        meshes: both views of the world.
        device: where parameters live.
        param_dtype: dtype that dense and expert parameters are gathered in; masters stay fp32.
        make_optimizer: given (name, local parameter) pairs, an optimizer whose state exists already
            (zeros), so that a checkpoint can be loaded into it.
        reshard_after_forward: free gathered parameters between forward and backward.
    """

    model: nn.Module
    optimizer: Optimizer
    keep_updates = False

    def __init__(
        self,
        meshes: Meshes,
        device: torch.device,
        param_dtype: torch.dtype,
        make_optimizer: MakeOptimizer,
        reshard_after_forward: bool = True,
    ) -> None:
        self.meshes = meshes
        self.device = device
        self.param_dtype = param_dtype
        self.make_optimizer = make_optimizer
        self.reshard_after_forward = reshard_after_forward
        self.rank = torch.distributed.get_rank()
        self._locals: dict[str, nn.Parameter] = {}
        # Of each parameter, by name: they depend on the layout alone, and take DTensor 0.1 ms to find.
        self._boxes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._kept: tuple[float, Tensor | None, dict[str, Tensor | None]] | None = None
        self._num_kept = 0
        self._speaks = meshes.dims.sparse_coordinate(self.rank)["dp_replicate"] == 0

    def prepare(self, model: nn.Module) -> None:
        self.model = model
        self._placements = placements(model)
        self._persistent = set(model.state_dict(keep_vars=True))
        if self.meshes.dims.world_size > 1:
            self._cut_experts(model, self.meshes)
            self._fully_shard(model, self.meshes)
        model.to_empty(device=self.device)
        # Kept, since FSDP swaps a module's parameters for gathered ones while it computes (or after an
        # evaluation, until the next backward); these stay the sharded masters.
        self._masters = dict(model.named_parameters())
        self._boxes.clear()
        for name, parameter in self._masters.items():
            self._locals[name] = nn.Parameter(_local(parameter.detach()), requires_grad=True)
        # Empty slices too: their slots must be there for a checkpoint of another layout to fill.
        self.optimizer = self.make_optimizer(list(self._locals.items()))

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def clip_gradients(self, max_norm: float) -> Tensor:
        gradients = [piece.tensor for piece in self.named_gradients()]
        norm = global_norm(gradients, self.meshes.replica)
        if max_norm > 0:
            clip_(gradients, norm, max_norm)
        return norm

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        for name, parameter in self._masters.items():
            local = self._locals[name]
            if parameter.grad is not None:
                local.grad = _local(parameter.grad)
            elif local.numel() == 0:
                local.grad = torch.zeros_like(local)  # so that its step count keeps up with the other ranks'
        self._update(lr, skip)
        if self.keep_updates:
            gradients = {name: local.grad for name, local in self._locals.items()}
            self._kept, self._num_kept = (lr, skip, gradients), self._num_kept + 1
        for name, parameter in self._masters.items():
            parameter.grad = self._locals[name].grad = None

    def _update(self, lr: float, skip: Tensor | None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # A fused kernel reads it on the device, as for torch.amp.GradScaler: nobody waits for the host.
        setattr(self._fused_optimizer(), "found_inf", skip)  # noqa: B010
        self.optimizer.step()

    @property
    def can_replay(self) -> bool:
        return type(self._fused_optimizer()) is torch.optim.AdamW

    def last_update(self) -> Update | None:
        kept, alone = self._kept, self._num_kept == 1
        self._kept, self._num_kept = None, 0
        return self._as_update(*kept) if kept is not None and alone else None

    def example_update(self) -> Update:
        return self._as_update(0.0, None, {})

    def _as_update(self, lr: float, skip: Tensor | None, gradients: Mapping[str, Tensor | None]) -> Update:
        found = {name: gradients.get(name) for name in self._masters}
        slices = [
            self._slice(
                f"grad.{name}", name, self._masters[name], self._locals[name].detach() if g is None else g
            )
            for name, g in found.items()
        ]
        missing = frozenset(name for name, g in found.items() if g is None)
        settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        recipe = f"{torch.__version__} {self.device.type} {type(self._fused_optimizer()).__name__} {settings}"
        return Update(lr, skip, slices, missing, list(self._buffers()), recipe)

    @torch.no_grad()
    def replay(self, lr: float, skip: Tensor | None, gradients: Mapping[str, Tensor]) -> None:
        for name, local in self._locals.items():
            gradient = gradients.get(name)
            local.grad = None if gradient is None else gradient.to(local.device)
        self._update(lr, None if skip is None else skip.to(self.device))
        for local in self._locals.values():
            local.grad = None

    def _fused_optimizer(self) -> Optimizer:
        """The one that computes, whatever stands around it."""
        return self.optimizer

    def named_state(self) -> Iterator[StateSlice]:
        for name, parameter in self._masters.items():
            yield self._slice(f"model.{name}", name, parameter, self._locals[name].detach())
        yield from self._buffers()
        for name, parameter in self._masters.items():
            slots = self.optimizer.state.get(self._locals[name], {})
            for slot in sorted(slots):
                value = slots[slot]
                if value.shape == self._locals[name].shape:
                    yield self._slice(f"optim.{slot}.{name}", name, parameter, value)
                else:
                    yield _replicated(f"optim.{slot}.{name}", value, self.rank)

    def _buffers(self) -> Iterator[StateSlice]:
        for name, buffer in self.model.named_buffers():
            if name in self._persistent:
                yield _replicated(f"model.{name}", buffer, self.rank)

    def named_gradients(self) -> Iterator[StateSlice]:
        for name, parameter in self._masters.items():
            if parameter.grad is not None:
                yield self._slice(name, name, parameter, _local(parameter.grad))

    def _cut_experts(self, model: nn.Module, meshes: Meshes) -> None:
        """Leave each rank its E / ep experts: rank r of the ep axis holds r·E/ep … (r+1)·E/ep - 1."""
        for _, module in expert_modules(model):
            for name, parameter in list(module.named_parameters()):
                owner_name, _, leaf = name.rpartition(".")
                local_shape = (parameter.shape[0] // meshes.dims.ep, *parameter.shape[1:])
                local = torch.empty(local_shape, dtype=parameter.dtype, device="meta")
                setattr(module.get_submodule(owner_name), leaf, nn.Parameter(local))

    def _fully_shard(self, model: nn.Module, meshes: Meshes) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=self.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        ignored: set[nn.Parameter] = set()
        for _, experts in expert_modules(model):
            if meshes.expert_fsdp is None:
                ignored.update(experts.parameters())
                continue
            fully_shard(
                experts,
                mesh=meshes.expert_fsdp,
                mp_policy=policy,
                reshard_after_forward=self.reshard_after_forward,
                shard_placement_fn=lambda _: Shard(EXPERT.shard_dims["expert_shard"]),
            )
        for unit in _shard_units(model):
            self._shard_fp32(unit, meshes)
            fully_shard(
                unit,
                mesh=meshes.fsdp,
                mp_policy=policy,
                reshard_after_forward=self.reshard_after_forward,
                ignored_params=ignored,
            )
        self._shard_fp32(model, meshes)
        fully_shard(model, mesh=meshes.fsdp, mp_policy=policy, ignored_params=ignored)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # FSDP2 averages by default; gloo knows no pre-multiplied sum, hence the second call.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _shard_fp32(self, unit: nn.Module, meshes: Meshes) -> None:
        """Gather what must not be rounded (norms, routers) in fp32: one more collective a unit."""
        exact = [
            module
            for module in unit.modules()
            if getattr(module, "keep_fp32", False) and not isinstance(module, FSDPModule)
        ]
        if self.param_dtype != torch.float32 and exact:
            policy = MixedPrecisionPolicy(
                param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            reshard = self.reshard_after_forward
            fully_shard(exact, mesh=meshes.fsdp, mp_policy=policy, reshard_after_forward=reshard)

    def _slice(self, key: str, name: str, parameter: nn.Parameter, local: Tensor) -> StateSlice:
        """A tensor laid out like ``parameter``: where this rank's part stands in the whole."""
        box = self._boxes.get(name)
        if box is None:
            box = self._boxes[name] = self._box(name, parameter)
        shape, offsets = box
        return StateSlice(key, shape, offsets, local, owner=self._speaks)

    def _box(self, name: str, parameter: nn.Parameter) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of a whole parameter, and where this rank's part of it starts."""
        shape, offsets = list(parameter.shape), [0] * parameter.dim()
        if isinstance(parameter, DTensor):
            _, found = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            offsets = list(found)
        if self._placements[name] is EXPERT:
            offsets[0] += self.meshes.dims.sparse_coordinate(self.rank)["ep"] * shape[0]
            shape[0] *= self.meshes.dims.ep
        return tuple(shape), tuple(offsets)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _replicated(name: str, tensor: Tensor, rank: int) -> StateSlice:
    shape = tuple(tensor.shape)
    return StateSlice(name, shape, (0,) * len(shape), tensor.detach(), owner=rank == 0)


def _shard_units(model: nn.Module) -> list[nn.Module]:
    """What the model names as its units, else the children of its ModuleLists."""
    if isinstance(model, Shardable):
        return model.shard_units()
    return [child for m in model.modules() if isinstance(m, nn.ModuleList) for child in m]
