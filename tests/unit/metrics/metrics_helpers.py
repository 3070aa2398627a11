"""Small run directories, written through the real writers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.metrics.jsonl import JsonlWriter, events_writer, metrics_writer
from trainer.metrics.schema import HEALTH_FILE, Record

T0 = 1_700_000_000.0


def start(time: float, generation: int = 0, steps: int = 10) -> Record:
    """A start event ``time`` seconds after the beginning."""
    return {
        "time": T0 + time, "step": 0, "event": "start", "generation": generation, "world_size": 2,
        "parallel": "dp_shard=2 ep=2", "device": "cpu", "num_parameters": 9_240_000,
        "num_active_parameters": 4_120_000, "run_dir": "runs/quick/a1", "steps": steps, "train_rows": 100,
        "tokens_per_step": 512, "config": {"layout": "mixtral"},
    }  # fmt: skip


def event(name: str, time: float, step: int, **values: Any) -> Record:
    """Any other event."""
    return {"time": T0 + time, "step": step, "event": name, **values}


def failure(time: float, step: int, kind: str = "crash") -> Record:
    """Rank 1 failed."""
    return event("failure", time, step, kind=kind, rank=1, host="node-0", cause="SIGKILL <1>")


def restart(time: float, step: int, generation: int, seconds: float, lost_steps: int) -> Record:
    """The group came back."""
    return event("restart", time, step, generation=generation, restart_seconds=seconds, lost_steps=lost_steps)


def resume(time: float, step: int) -> Record:
    """State was loaded."""
    return event("resume", time, step, tier="durable", path=f"checkpoints/step-{step:08d}")


def recovered(time: float, step: int, generation: int, kind: str = "crash", **parts: float) -> Record:
    """The step reached before the fault was done again; ``parts`` in seconds."""
    total = sum(parts.values())
    return event(
        "recovered", time, step, kind=kind, generation=generation, failures=1, seconds=total, **parts
    )


def checkpoint(time: float, step: int, stall: float) -> Record:
    """State was saved."""
    path = f"checkpoints/step-{step:08d}"
    return event("checkpoint", time, step, path=path, bytes=1.1e8, stall_seconds=stall, write_seconds=1.0)


def finish(time: float, step: int, **values: Any) -> Record:
    """The run ended."""
    found = {
        "weights_digest": "5f0c", "goodput": 0.75, "seconds": time, "loss_valid": 3.5,
        "loss_valid_untrained": 8.3, "unigram_loss": 6.0, "best_step": step, "best_loss": 3.25,
        "sample": {"prompt": "def ", "text": "f(x): return <x> & y"},
    }  # fmt: skip
    return event("finish", time, step, **(found | values))


def step(number: int, time: float, seconds: float = 1.0, **values: Any) -> Record:
    """A metrics record of a dense step, further metrics with ``/`` written as ``__``."""
    return {
        "step": number, "tokens": 512 * number, "time": T0 + time, "loss/train": 8.0 / number + 3.0,
        "grad_norm": 1.5, "optim/lr": 1e-3, "perf/tokens_per_second": 512 / seconds, "perf/mfu": 0.41,
        "perf/step_seconds": seconds,
    } | {name.replace("__", "/"): value for name, value in values.items()}  # fmt: skip


def moe(layers: int = 2, experts: int = 4) -> Record:
    """MoE metrics to add to a step: expert 0 takes twice its share, the last one nothing."""
    load = [2.0 / experts, *[1.0 / experts] * (experts - 2), 0.0]
    load = [share / sum(load) for share in load]
    loads = {f"moe/L{layer}/load": load for layer in range(layers)}
    return loads | {
        "moe/max_over_mean": max(load) * experts,
        "moe/dead_experts": layers,
        "moe/drop_rate": 0.0,
    }


def alarm(time: float, step: int, kind: str, state: str, layers: list[int], still: list[int]) -> Record:
    """The routing got into trouble in these layers, or out of it; ``still`` are in it now."""
    remedy = "raise layout.balance.coefficient (now 0)" if state == "raised" else ""
    return event(
        "alarm", time, step, kind=kind, state=state, layers=still, since=step - 2, remedy=remedy,
        message=f"trouble in {layers} <i>", evidence=[{"layer": layer, "experts": [0]} for layer in layers],
    )  # fmt: skip


def maps(step: int, layers: int = 2, experts: int = 4) -> Record:
    """Counts of pairs and domains of held-out rows, for health.jsonl: expert 0 keeps to itself."""
    numbers = list(range(1, layers + 1))
    found = {
        "step": step, "time": T0 + step, "kind": "maps", "split": "valid", "layers": numbers,
        "num_experts": experts, "top_k": 2, "counts": [[20] * experts] * layers,
        "domains": ["other", "web", "code"],
        "domain_counts": [[[0] * experts, [step] + [10] * (experts - 1), [10] * experts]] * layers,
    }  # fmt: skip
    if experts <= 64:
        pairs = [[0] * (experts - 1) + [10] * ((experts - 1) * (experts - 2) // 2)] * layers
        return found | {"pair_counts": pairs}
    return found | {"pairs": [[[1, 2, 10], [3, 4, 5]]] * layers}


def window(step: int, layers: int = 2, ranks: int = 2) -> Record:
    """A look at the window, for health.jsonl: rank 0 has three quarters."""
    share = [0.75, *[0.25 / (ranks - 1)] * (ranks - 1)]
    numbers = list(range(1, layers + 1))
    return {
        "step": step,
        "time": T0 + step,
        "kind": "window",
        "layers": numbers,
        "rank_share": [share] * layers,
    }


def write_health(run_dir: Path, records: list[Record]) -> Path:
    """The health.jsonl of a run directory."""
    with JsonlWriter(run_dir / HEALTH_FILE) as writer:
        for item in records:
            writer.write(item)
    return run_dir


def write(run_dir: Path, events: list[Record], records: list[Record]) -> Path:
    """A run directory of these."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with events_writer(run_dir) as writer:
        for item in events:
            writer.write(item)
    with metrics_writer(run_dir) as writer:
        for item in records:
            writer.write(item)
    return run_dir
