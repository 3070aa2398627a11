"""The same work under torchft: two replica groups of one process each, recovered from the living one.

torchft_lighthouse --min_replicas 1 …
REPLICA=0 torchrun --nproc-per-node 1 --max-restarts 9 -m bench.recovery.replicas --config FILE --folder DIR
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

from bench.recovery.progress import note
from bench.recovery.work import Work


def main() -> None:
    """Train until killed, or to ``train.steps``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=3.0, help="of collectives and quorums, seconds")
    args = parser.parse_args()
    replica = int(os.environ["REPLICA"])
    dist.init_process_group("gloo")  # hosts the store that the manager wants
    work = Work(args.config, replica, 2)

    def load(state: dict[str, Any]) -> None:
        work.objective.load_state_dict(state["model"])
        work.optimizer.load_state_dict(state["optimizer"])

    timeout = timedelta(seconds=args.timeout)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=load,
        state_dict=lambda: {
            "model": work.objective.state_dict(),
            "optimizer": work.optimizer.state_dict(),
        },
        min_replica_size=1,
        timeout=timeout,
        quorum_timeout=timedelta(seconds=60),
        replica_id=f"replica_{replica}",
    )
    model = DistributedDataParallel(manager, work.objective)
    optimizer = Optimizer(manager, work.optimizer)
    while manager.current_step() < work.config.train.steps:
        optimizer.zero_grad()
        for batch in work.batches():
            model(batch.tokens, batch.targets).backward()
        optimizer.step()
        note(args.folder, replica, manager.current_step())
    os._exit(0)


if __name__ == "__main__":
    main()
