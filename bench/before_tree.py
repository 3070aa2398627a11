"""The step of one version of Muster, in a process of its own: ``before_tree.py PROFILING_PY STEPS``.

``trainer`` and ``parallel`` are those of the version (PYTHONPATH); the profile is taken by the newest one's
trainer/profiling.py, with the names that an older version lacks. Prints a JSON line.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time

import torch
import torch.distributed as dist

from parallel import collectives
from parallel.mesh import build_meshes
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.compose import compose
from trainer.config import Machine, RunConfig, parallel_dims, resolve
from trainer.data.batch import Batch
from trainer.models.init import initialise
from trainer.models.transformer import Block
from trainer.step import Stepper

CONFIG = ["experiment=quickstart", "launcher.nproc_per_node=1", "parallel.ep=1", "model.vocab_size=4096"]
CONFIG += ["data.respect_documents=false", "device=cpu", "train.dtype=fp32"]


def batch_of(config: RunConfig, number: int) -> Batch:
    """As bench/step.py's."""
    g = torch.Generator().manual_seed(number)
    B, S, V = config.train.global_batch, config.train.seq_len, config.model.vocab_size
    share = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    tokens = torch.multinomial(share, B * (S + 1), replacement=True, generator=g).view(B, S + 1)
    documents = torch.zeros(B, S, dtype=torch.int32)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents, torch.arange(B))


def main(profiling_py: str, steps: int) -> None:
    for owner, name, value in (
        (collectives, "EXCHANGE_RANGE", "muster: exchange"),
        (Block, "compiled", False),
    ):
        if not hasattr(owner, name):
            setattr(owner, name, value)
    spec = importlib.util.spec_from_file_location("newest_profiling", profiling_py)
    assert spec is not None and spec.loader is not None
    profiling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(profiling)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config, device = resolve(compose(CONFIG), Machine.here()), torch.device("cpu")
    torch.set_num_threads(config.train.num_threads)
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, device)
    engine.prepare(build_model(config, build_dispatcher(meshes)))
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, device, wants_stop=lambda: False)
    batches, ms, losses = [batch_of(config, n) for n in range(3)], [], []
    for step in range(3 + steps):
        began = time.perf_counter()
        totals = stepper.train_step(step, [batches[step % 3]]).totals
        ms.append(1000 * (time.perf_counter() - began))
        losses.append(float(totals.cross_entropy) / totals.num_targets)
    parts = profiling.profiled(lambda: stepper.train_step(3 + steps, [batches[0]]), 5, stepper)
    print(json.dumps({"ms": ms[3:], "losses": losses[:3], "parts_ms": parts}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
