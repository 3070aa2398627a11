"""The DeepSpeed engine: ``deepspeed.initialize`` and a real ``DeepSpeedEngine``, ZeRO stage 0 to 3.

    dense    ZeRO over all ranks
    experts  first cut to E / ep along dim 0, then ZeRO over the ranks that hold the same experts
    masters  fp32 at every stage; the model casts them to ``train.dtype`` where it computes

What DeepSpeed does otherwise than Muster is undone here and nowhere else:

- it divides every gradient, the experts' too, by the number of ranks: the loss is multiplied by it, so that
  gradients are sums (exact where that number is a power of two, else to a rounding);
- at stage 0 it clips by an average of the ranks' norms, and at stages 1 to 3 passes over a step whose norm is
  not finite: its clipping and its norm are off, and ours are used;
- it counts micro-batches: it is told which one is the last;
- it recognises experts by the class of a module around them: a marker without parameters is put beside the
  model, which stays as it is.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.engines.base import StateSlice
from parallel.engines.deepspeed_shards import boxes, find_gradients, find_shards
from parallel.errors import ConfigError
from parallel.gradients import clip_, global_norm
from parallel.mesh import Meshes
from parallel.placement import EXPERT, expert_modules, placements

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]


class DeepSpeedEngine:
    """See :class:`parallel.engines.base.Engine`.

    Args:
        meshes: both views of the world; one replica.
        device: where parameters live.
        make_optimizer: given (name, parameter) pairs, Adam or AdamW with their groups.
        stage: of ZeRO (arXiv:1910.02054): 0 shards nothing, 1 the optimizer, 2 gradients as well, 3 weights
            as well.
        micro_batch: sequences a forward pass.
        accumulation: forward passes a step.
        settings: the rest of DeepSpeed's own configuration, already checked; with an ``optimizer`` DeepSpeed
            makes that one on the groups of ``make_optimizer``.
    """

    model: nn.Module

    def __init__(
        self,
        meshes: Meshes,
        device: torch.device,
        make_optimizer: MakeOptimizer,
        stage: int,
        micro_batch: int,
        accumulation: int,
        settings: dict[str, Any],
    ) -> None:
        assert meshes.dims.dp_replicate == 1, "the rules of the config allow one replica"
        self.meshes = meshes
        self.device = device
        self.make_optimizer = make_optimizer
        self.stage = stage
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.settings = settings
        self.rank = torch.distributed.get_rank()
        self.world_size = meshes.dims.world_size

    def prepare(self, model: nn.Module) -> None:
        deepspeed = load_deepspeed(self.device)
        self.model = model
        self._placements = placements(model)
        self._persistent = set(model.state_dict(keep_vars=True))
        ep = self.meshes.dims.ep
        if ep > 1:
            _cut_experts(model, ep)
        model.to_empty(device=self.device)
        self._named = dict(model.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._named.items()}
        taken = _Taken(model, _mark_experts(model, ep) if ep > 1 else [])
        groups = self._parameter_groups(self.make_optimizer)
        own = "optimizer" not in self.settings
        self._engine, *_ = deepspeed.initialize(
            model=taken,
            optimizer=self._own_optimizer(groups) if own else None,
            model_parameters=None if own else _with_names(groups),
            config=self._configuration(),
            dist_init_required=False,
        )
        self._optimizer: Optimizer = self._engine.basic_optimizer
        self._shards = find_shards(self.stage, self._named, self._engine.optimizer)
        if self.stage == 3:
            # Its norm costs a collective, and one that is not finite would pass over the step in silence.
            nothing = [torch.zeros((), device=self.device)]
            self._engine.optimizer._get_norm_groups = lambda: nothing
        self._make_state()
        _call_through(model, self._engine)
        hooks = getattr(self._engine.optimizer, "_grad_acc_hooks", [])
        weakref.finalize(self, _remove, hooks).atexit = False

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def clip_gradients(self, max_norm: float) -> Tensor:
        gradients = find_gradients(self.stage, self._named, self._shards, self._engine.optimizer)
        owned = [gradient for name, gradient in gradients.items() if self._owns(name)]
        norm = global_norm([*owned, torch.zeros(0, device=self.device)], self.meshes.replica)
        if max_norm > 0:
            clip_(list(gradients.values()), norm, max_norm)
        return norm

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # Its optimizers need not be fused ones, which could decide on the device: the host reads `skip`.
        with nullcontext() if skip is None or not bool(skip) else _idle(self._optimizer):
            self._engine.step()
        if self.stage == 3:
            # Overwritten by the next gradient; a parameter that gets none must not see this one again.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    def named_state(self) -> Iterator[StateSlice]:
        if self.stage == 3:
            # Whatever is gathered at the moment would not see what is written into the shards.
            self._engine.optimizer.empty_partition_cache()
        for name in self._named:
            yield from self._weight_slices(name)
        for name, buffer in self.model.named_buffers():
            if name in self._persistent:
                shape = tuple(buffer.shape)
                owner = self.rank == 0
                yield StateSlice(f"model.{name}", shape, (0,) * len(shape), buffer.detach(), owner)
        for name, shard in self._shards.items():
            slots = self._optimizer.state[shard.flat]
            for slot in sorted(slots):
                key = f"optim.{slot}.{name}"
                if slots[slot].shape == shard.flat.shape:
                    yield from self._slices(key, name, shard.start, shard.of(slots[slot]))
                else:  # the number of steps, one for all of a flat buffer
                    yield StateSlice(key, (), (), slots[slot], owner=self.rank == 0)

    def named_gradients(self) -> Iterator[StateSlice]:
        found = find_gradients(self.stage, self._named, self._shards, self._engine.optimizer)
        for name, gradient in found.items():
            yield from self._slices(name, name, self._shards[name].start, gradient)

    def _configuration(self) -> dict[str, Any]:
        numel = sum(parameter.numel() for parameter in self._named.values())
        bucket = max(2, min(50_000_000, numel + numel % 2))
        zero = {
            # All gradients pass through buffers of this size, taken whether filled or not.
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **self.settings.get("zero_optimization", {}),
            "stage": self.stage,
            # A parameter that stays gathered would not see what a checkpoint writes into its shards.
            "stage3_param_persistence_threshold": 0,
        }
        if self.stage in (1, 2):
            zero["compute_grad_norm"] = False
        return {
            **self.settings,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
        }

    def _parameter_groups(self, make: MakeOptimizer) -> list[dict[str, Any]]:
        """The groups that ``make_optimizer`` forms, without the state that it would allocate for them."""
        stand_ins = {
            name: nn.Parameter(torch.empty((0,) * parameter.dim(), device=self.device))
            for name, parameter in self._named.items()
        }
        self._prototype = make(list(stand_ins.items()))
        real = {id(stand_ins[name]): parameter for name, parameter in self._named.items()}
        return [
            {**group, "params": [real[id(p)] for p in group["params"]]}
            for group in self._prototype.param_groups
        ]

    def _own_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        optimizer = self._prototype
        optimizer.state.clear()
        for number, group in enumerate(groups):
            group["name"] = f"group{number}"
        if self.meshes.dims.ep > 1:
            groups = split_params_into_different_moe_groups_for_optimizer(groups)
        optimizer.param_groups[:] = groups
        return optimizer

    def _make_state(self) -> None:
        """Zeros, before the first step, so that a checkpoint can be loaded into them."""
        assert isinstance(self._optimizer, torch.optim.Adam), "the state below is that of Adam and AdamW"
        fused = any(group.get("fused") for group in self._optimizer.param_groups)
        for flat in {id(shard.flat): shard.flat for shard in self._shards.values()}.values():
            self._optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }

    def _weight_slices(self, name: str) -> Iterator[StateSlice]:
        """The rank's own part and, at stages 1 and 2, where every rank has all of it, the rest as replica."""
        shard, key = self._shards[name], f"model.{name}"
        yield from self._slices(key, name, shard.start, shard.of(shard.flat))
        if self.stage in (1, 2):
            values = self._named[name].detach().view(-1)
            yield from self._slices(key, name, 0, values[: shard.start], replica=True)
            yield from self._slices(key, name, shard.stop, values[shard.stop :], replica=True)

    def _slices(
        self, key: str, name: str, start: int, values: Tensor, replica: bool = False
    ) -> Iterator[StateSlice]:
        """Elements ``start …`` of the local parameter ``name`` as boxes of the whole; at least one, if empty."""
        local = self._shapes[name]
        shape, first = list(local), 0
        if self._placements[name] is EXPERT:
            at = self.meshes.dims.sparse_coordinate(self.rank)
            first = at["ep"] * local[0]
            shape[0] *= self.meshes.dims.ep
        owner = self._owns(name) and not replica
        found = list(boxes(local, start, start + values.numel()))
        if not found and not replica:  # the name is known to every rank
            found = [((0,) * len(local), (0, *local[1:]))]
        position = 0
        for offsets, size in found:
            part = values[position : position + torch.Size(size).numel()].view(size)
            position += part.numel()
            offsets = (offsets[0] + first, *offsets[1:]) if offsets else offsets
            yield StateSlice(key, tuple(shape), offsets, part, owner)

    def _owns(self, name: str) -> bool:
        """Whether this rank speaks for its shard: at stage 0 others have the same one."""
        if self.stage > 0:
            return True
        if self._placements[name] is EXPERT:
            return self.meshes.dims.sparse_coordinate(self.rank)["expert_shard"] == 0
        return self.rank == 0


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, without its extensions (it would compile them now, for minutes).

    Raises:
        ConfigError: it is not installed, or was set up for another kind of device.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    os.environ.setdefault("LOCAL_SIZE", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            "engine.name",
            "deepspeed",
            f"it cannot be imported: {error}",
            "pip install 'deepspeed>=0.19,<0.20'",
        ) from error
    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if accelerator != device.type:
        raise ConfigError(
            "device",
            device.type,
            f"DeepSpeed is set up for {accelerator} in this process",
            f"DS_ACCELERATOR={device.type} in the environment",
        )
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Its collectives go by names that newer versions of torch warn about once a rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _forget_former_engines(deepspeed)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


def _forget_former_engines(deepspeed: Any) -> None:
    """Reset what DeepSpeed keeps in globals for the life of a process.

    Else a second engine would use the process groups of a world that is gone, and stage 3, which compares its
    numbers of modules and parameters between ranks, would fail where one rank has had an engine more.
    """
    from deepspeed.runtime.zero import parameter_offload

    deepspeed.utils.groups._release_process_group_references()
    deepspeed.comm.comm.cdb = None
    deepspeed.zero.partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()


class _Taken(nn.Module):
    """What DeepSpeed is given: the model, and beside it the markers of its experts."""

    def __init__(self, model: nn.Module, markers: list[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.markers = nn.ModuleList(markers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self.model, *args, **kwargs)


def _call_through(model: nn.Module, engine: Any) -> None:
    """Let ``model(…)`` go through DeepSpeed's forward; names, attributes and type of the model stay."""
    own = type(model)
    through = {
        "__call__": lambda self, *args, **kwargs: engine(*args, **kwargs),
        "__module__": own.__module__,
    }
    model.__class__ = type(own.__name__, (own,), through)


def _remove(hooks: list[Any]) -> None:
    """Take DeepSpeed's hooks off the parameters: they make cycles that Python cannot collect, and its process
    groups, with a few threads each, would outlive the engine."""
    for hook in hooks:
        hook.remove()


@contextmanager
def _idle(optimizer: Optimizer) -> Iterator[None]:
    """Everything around the update is done, and the gradients are cleared; the update itself is not."""
    setattr(optimizer, "step", lambda closure=None: None)  # noqa: B010
    try:
        yield
    finally:
        del optimizer.step


def _with_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Only what does not come from the settings of DeepSpeed's optimizer: who is decayed."""
    return [
        {"params": group["params"], "weight_decay": group["weight_decay"], "name": f"group{number}"}
        for number, group in enumerate(groups)
    ]


def _cut_experts(model: nn.Module, ep: int) -> None:
    """Leave each rank its E / ep experts: rank r of the ep axis holds r·E/ep … (r+1)·E/ep - 1."""
    for _, module in expert_modules(model):
        for name, parameter in list(module.named_parameters()):
            owner_name, _, leaf = name.rpartition(".")
            local_shape = (parameter.shape[0] // ep, *parameter.shape[1:])
            local = torch.empty(local_shape, dtype=parameter.dtype, device="meta")
            setattr(module.get_submodule(owner_name), leaf, nn.Parameter(local))


def _mark_experts(model: nn.Module, ep: int) -> list[nn.Module]:
    """Tell DeepSpeed which parameters are experts, by what it looks at: attributes, and a class it knows.

    Its own expert layers are told apart by ``isinstance``, and without one the attributes of the parameters
    alone fail at stages 1 and 2 and are silently wrong at stage 3.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups

    class ExpertMarker(AutoEPMoELayer):
        def __init__(self, num_experts: int) -> None:
            nn.Module.__init__(self)
            self.num_experts, self.ep_size, self.ep_group_name = num_experts, ep, group_name

        def set_deepspeed_parallelism(
            self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
        ) -> None:
            if group_name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(ep)
            self.ep_group = groups._get_expert_parallel_group(group_name)

    group_name = f"ep_size_{ep}"
    markers: list[nn.Module] = []
    for _, module in expert_modules(model):
        markers.append(ExpertMarker(int(getattr(module, "num_stacked_experts"))))  # noqa: B009
        for parameter in module.parameters():
            marks = {
                "allreduce": False,
                "group_name": group_name,
                "ds_zero_placement_family": "autoep_expert",
                "ds_zero_partition_group_name": group_name,
            }
            for mark, value in marks.items():
                setattr(parameter, mark, value)
    return markers
