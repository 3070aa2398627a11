"""The same work in plain PyTorch: DDP, and DCP's asynchronous checkpoints with staging.

torchrun --nproc-per-node 2 --max-restarts 9 -m bench.recovery.plain --config FILE --folder DIR --every 10
ft_launcher … -m bench.recovery.plain … --nvrx        (heartbeats to NVRx's rank monitors)
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from bench.recovery.progress import note
from bench.recovery.work import Work


def stager() -> DefaultStager:
    """DCP's own asynchronous staging, as far as it goes without CUDA."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )


def newest(folder: Path) -> tuple[int, Path] | None:
    """The newest complete DCP checkpoint: DCP writes ``.metadata`` last."""
    found = [
        (int(path.name.split("-")[1]), path)
        for path in folder.glob("step-*")
        if re.fullmatch(r"step-\d+", path.name) and (path / ".metadata").exists()
    ]
    return max(found, default=None)


def heartbeats(nvrx: bool) -> Callable[[], None]:
    """What is called once a step."""
    if not nvrx:
        return lambda: None
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    return client.send_heartbeat


def main() -> None:
    """Train until killed, or to ``train.steps``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=3.0, help="of collectives, seconds")
    parser.add_argument("--nvrx", action="store_true")
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    compute = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.timeout))
    saving = dist.new_group(backend="gloo")  # on the group that trains, async_save hangs
    work = Work(args.config, rank, world_size)
    model = DistributedDataParallel(work.objective, process_group=compute)
    beat = heartbeats(args.nvrx)
    step, checkpoints = 0, args.folder / "checkpoints"
    if found := newest(checkpoints):
        work.start_optimizer()
        step, path = found
        weights, slots = get_state_dict(work.objective, work.optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": slots}
        dcp.load(state, checkpoint_id=str(path))
        set_state_dict(
            work.objective,
            work.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        for _ in range(step):
            work.batches()
    pending, staging = None, stager()
    while step < work.config.train.steps:
        for batch in work.batches():
            model(batch.tokens, batch.targets).backward()
        work.optimizer.step()
        work.optimizer.zero_grad()
        step += 1
        beat()
        note(args.folder, rank, step)
        if step % args.every == 0:
            if pending is not None:
                pending.result()
            weights, slots = get_state_dict(work.objective, work.optimizer)
            made = dcp.async_save(
                {"model": weights, "optimizer": slots},
                checkpoint_id=str(checkpoints / f"step-{step}"),
                process_group=saving,
                async_stager=staging,
            )
            pending = getattr(made, "upload_completion", made)
    if pending is not None:
        pending.result()
    staging.close()
    os._exit(0)


if __name__ == "__main__":
    main()
