"""The Accelerate engine: one `accelerate.Accelerator` prepares the dense parameters, experts stay on the ep axis.

    dense    DDP: whole on every rank, gradients summed over the world; or, on CUDA, Accelerate's FSDP2 plugin
             over (dp_replicate ·) dp_shard
    experts  kept out of both: E / ep on each rank, whole on every rank with the same place on the ep axis, and
             their gradients summed over those ranks here

Both of Accelerate's ways take a mean over ranks; both are switched to sums in this file. Names, slices, the
optimizer and its step are the native engine's. ``save_state`` of Accelerate would keep one rank's experts:
checkpoints are Muster's.
"""

from __future__ import annotations

import os
import warnings
import weakref
from dataclasses import replace

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ParallelismConfig,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from parallel.engines.base import StateSlice
from parallel.engines.native import MakeOptimizer, NativeEngine, _shard_units
from parallel.errors import ConfigError
from parallel.gradients import clip_, global_norm
from parallel.mesh import Meshes
from parallel.placement import EXPERT, expert_modules

_SAID_ELSEWHERE = {
    "ACCELERATE_USE_FSDP": ("use_fsdp", "engine.sharding and engine.reshard_after_forward say how to shard"),
    "ACCELERATE_USE_DEEPSPEED": ("use_deepspeed", "DeepSpeed is an engine of its own"),
    "ACCELERATE_USE_MEGATRON_LM": ("use_megatron_lm", "Megatron-LM would take the place of this model"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", "the degrees are parallel.*"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "the model is not compiled"),
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "train.dtype is the precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps",
        "train.micro_batch and train.global_batch say how many micro-batches a step has",
    ),
}
"""Variables by which `accelerate launch` hands over settings that Muster's config has the say in."""


class AccelerateEngine(NativeEngine):
    """See :class:`parallel.engines.base.Engine`.

    Args:
        meshes: both views of the world.
        device: where parameters live.
        param_dtype: with ``shard``, the dtype that dense parameters are gathered in; masters stay fp32.
        make_optimizer: as for the native engine.
        reshard_after_forward: with ``shard``, free gathered parameters between forward and backward.
        shard: FSDP2 instead of DDP for the dense parameters; takes dp_shard > 1.

    Raises:
        ConfigError: `accelerate launch` was given a setting that this config contradicts.
    """

    def __init__(
        self,
        meshes: Meshes,
        device: torch.device,
        param_dtype: torch.dtype,
        make_optimizer: MakeOptimizer,
        reshard_after_forward: bool,
        shard: bool,
    ) -> None:
        super().__init__(meshes, device, param_dtype, make_optimizer, reshard_after_forward)
        self.shard = shard
        self._ddp: DistributedDataParallel | None = None
        self._all_reduced = False
        _check_launch(device, param_dtype)

    def prepare(self, model: nn.Module) -> None:
        self.accelerator = self._accelerator(model)
        super().prepare(model)
        self._number = {name: number for number, name in enumerate(self._masters)}
        if not self.shard:
            experts = [
                f"{path}.{name}" for path, m in expert_modules(model) for name, _ in m.named_parameters()
            ]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
            prepared = self.accelerator.prepare_model(model)
            if isinstance(prepared, DistributedDataParallel):
                self._ddp = prepared
                # Weakly: DDP holds its hook where Python's collector does not look, and would keep us for ever.
                prepared.register_comm_hook(
                    weakref.ref(self), lambda engine, bucket: engine()._sum_bucket(bucket)
                )
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        for name, parameter in self._masters.items():
            whole = not isinstance(parameter, DTensor)
            assert not whole or parameter.data_ptr() == self._locals[name].data_ptr(), f"{name} was moved"

    def backward(self, loss: Tensor, last: bool) -> None:
        # Forward calls the bare model, so its names stay canonical and no DDP forward rebuilds the buckets: in
        # a ring the order of a sum depends on the place in the bucket, and after a restart the first step
        # would add up otherwise than it did before. Without that forward DDP reduces nothing, as under
        # no_sync, until it is told to.
        if self._ddp is None or not last:
            self.accelerator.backward(loss)
        else:
            self._all_reduced = False
            with self.accelerator.trigger_sync_in_backward(self._ddp):
                self.accelerator.backward(loss)
            self._check_reduced()
        if last:
            self._sum_expert_gradients()

    def clip_gradients(self, max_norm: float) -> Tensor:
        gradients = list(self.named_gradients())
        once = [piece.tensor for piece in gradients if self._counts(piece.name)]
        norm = global_norm(once or [torch.zeros((), device=self.device)], self.meshes.replica)
        if max_norm > 0:
            clip_([piece.tensor for piece in gradients], norm, max_norm)
        return norm

    def _fused_optimizer(self) -> Optimizer:
        assert isinstance(self.optimizer, AcceleratedOptimizer)
        return self.optimizer.optimizer

    def _accelerator(self, model: nn.Module) -> Accelerator:
        """An accelerator over the process group that is there, with nothing left to its own defaults."""
        # Its state is global to the process and may describe a group that is gone.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        dims = self.meshes.dims
        threads = torch.get_num_threads()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
            accelerator = Accelerator(
                cpu=self.device.type == "cpu",
                device_placement=False,  # all stands where it must, and moving would part masters from slices
                mixed_precision="no",  # the model casts by itself
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=1
                ),  # it would divide the loss
                fsdp_plugin=self._fsdp_plugin(model) if self.shard else None,
                parallelism_config=(
                    ParallelismConfig(dp_replicate_size=dims.dp_replicate, dp_shard_size=dims.dp_shard)
                    if self.shard
                    else None
                ),
            )
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # a mark of its own that would pass for the launcher's
        torch.set_num_threads(threads)  # it sets a number of its own where OMP_NUM_THREADS is not set
        assert accelerator.num_processes == dims.world_size, "Accelerate sees another world: is RANK set?"
        assert accelerator.process_index == self.rank and accelerator.device.type == self.device.type
        assert accelerator.is_fsdp2 == self.shard, "Accelerate ignored its FSDP plugin"
        return accelerator

    def _fsdp_plugin(self, model: nn.Module) -> FullyShardedDataParallelPlugin:
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=self.reshard_after_forward,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=sorted({type(unit).__name__ for unit in _shard_units(model)}),
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=self.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            cpu_offload=False,
            activation_checkpointing=False,  # the model does it, with recorded routing
            cpu_ram_efficient_loading=False,
            ignored_modules=[experts for _, experts in expert_modules(model)],
        )

    def _fully_shard(self, model: nn.Module, meshes: Meshes) -> None:
        """Let the plugin shard what is dense (DDP comes later: it copies values, which must have storage)."""
        if not self.shard:
            return
        for unit in (*_shard_units(model), model):
            self._shard_fp32(unit, meshes)
        # It insists on an optimizer whose parameters it may exchange; ours is made of local slices later.
        none = torch.optim.SGD([{"params": []}])
        self.accelerator.prepare(model, none)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _sum_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """DDP's reduction of one bucket: a sum where DDP would take a mean."""
        self._all_reduced = self._all_reduced or bucket.is_last()
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        assert work is not None
        return work.get_future().then(lambda done: done.value()[0])

    def _check_reduced(self) -> None:
        """DDP waits in silence for a parameter that backward did not reach."""
        if self._all_reduced:
            return
        without = [name for name, parameter in self._masters.items() if parameter.grad is None]
        raise ConfigError(
            "engine.name",
            "accelerate",
            f"DDP reduces the gradients of all parameters at once, and this batch gave "
            f"{without[0] if without else 'some parameter'} none",
            "use every parameter in every forward pass, or engine=native",
        )

    def _sum_expert_gradients(self) -> None:
        """Over the ranks that hold the same experts; every one of them takes part, whatever it received."""
        mesh = self.meshes.expert_fsdp
        if mesh is None:
            return
        experts = [p for name, p in self._masters.items() if self._placements[name] is EXPERT]
        for parameter in experts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for axis in range(mesh.ndim):
            pending = [dist.all_reduce(p.grad, group=mesh.get_group(axis), async_op=True) for p in experts]
            for work in pending:
                assert work is not None
                work.wait()

    def _counts(self, name: str) -> bool:
        """Whether this rank is the one of its replica that adds a gradient to the norm."""
        if self._placements[name] is EXPERT:
            return self.meshes.dims.sparse_coordinate(self.rank)["expert_shard"] == 0
        return self.shard or self.meshes.dims.dense_coordinate(self.rank)["dp_shard"] == 0

    def _slice(self, key: str, name: str, parameter: nn.Parameter, local: Tensor) -> StateSlice:
        piece = super()._slice(key, name, parameter, local)
        if isinstance(parameter, DTensor):
            return piece
        # Replicas share the work of writing: each speaks for every n-th of the tensors they all hold.
        dims = self.meshes.dims
        copies, mine = dims.world_size, self.rank
        if self._placements[name] is EXPERT:
            at = dims.sparse_coordinate(self.rank)
            copies = dims.dp_replicate * dims.expert_shard
            mine = at["dp_replicate"] * dims.expert_shard + at["expert_shard"]
        return replace(piece, owner=self._number[name] % copies == mine)


def _check_launch(device: torch.device, param_dtype: torch.dtype) -> None:
    """Refuse what `accelerate launch` or its config file ask for and would not get."""
    same = {"": "", "false": "", "no": "", "1": ""}
    if param_dtype == torch.bfloat16:
        same["bf16"] = ""
    for variable, (setting, reason) in _SAID_ELSEWHERE.items():
        value = os.environ.get(variable, "")
        if value.lower() not in same:
            raise ConfigError(
                f"accelerate launch: {setting}",
                value.lower(),
                f"with engine=accelerate the launcher places processes and {reason}",
                f"leave {setting} out of the command or config file of `accelerate launch`",
            )
    if device.type != "cpu" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        raise ConfigError(
            "device", device.type, "ACCELERATE_USE_CPU asks Accelerate for the CPU", "device=cpu"
        )
