"""From a step's sums to the metrics that the schema names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.health.ranks import rank_shares
from trainer.metrics.schema import USER_PREFIX, load_name
from trainer.models.cost import Cost
from trainer.models.transformer import moe_layers
from trainer.step import StepResult


@dataclass(frozen=True)
class Hardware:
    """What a run's speed is measured against.

    Attributes:
        cost: of the model.
        peak_flops: of all devices together.
    """

    cost: Cost
    peak_flops: float


def step_metrics(result: StepResult, config: RunConfig, hardware: Hardware, seconds: float) -> dict[str, Any]:
    """Metrics of one step; ``seconds`` is the wall time of a step (docs/metrics.md defines each name)."""
    totals = result.totals
    tokens = config.train.global_batch * config.train.seq_len
    rate = tokens / seconds
    record: dict[str, Any] = {
        "loss/train": totals.mean(totals.cross_entropy),
        "grad_norm": float(result.grad_norm),
        "optim/lr": result.lr,
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": rate,
        "perf/mfu": rate * hardware.cost.flops_per_token / hardware.peak_flops,
    }
    num_layers = totals.counts_LE.shape[0]
    if num_layers:
        record |= {
            "loss/balance": totals.mean(totals.balance_L) / num_layers,
            "loss/router_z": totals.mean(totals.router_z_L) / num_layers,
            "moe/router_entropy": totals.mean(totals.entropy_L) / num_layers,
            "moe/router_confidence": totals.mean(totals.confidence_L) / num_layers,
            "moe/unserved_rate": int(totals.unserved_L.sum()) / (tokens * num_layers),
            "moe/a2a_bytes": int(totals.sent_L.sum()),
            **_load_metrics(totals.counts_LE, totals.dropped_L, config),
        }
    return record


def check_user_metrics(metrics: Mapping[str, object], field: str, target: str) -> None:
    """Check what a callback wants logged.

    Raises:
        ConfigError: a name that is not the user's to use, or a value that is not a number.
    """
    for name, value in metrics.items():
        if not name.startswith(USER_PREFIX):
            relation = (
                f"on_step_end returned the metric {name!r}; names of your own start with {USER_PREFIX!r}"
            )
            raise ConfigError(field, target, relation, f"{USER_PREFIX}{name}")
        if not isinstance(value, (int, float)):
            relation = f"on_step_end returned {name!r} as a {type(value).__name__}, not a number"
            raise ConfigError(field, target, relation, "return float(value)")


def moe_layer_numbers(config: RunConfig, num_layers: int) -> list[int]:
    """The model's number of each of its MoE layers; layers of the user's own are numbered as they come."""
    layers = moe_layers(config)
    return layers if len(layers) == num_layers else list(range(num_layers))


def _load_metrics(counts_LE: Tensor, dropped_L: Tensor, config: RunConfig) -> dict[str, Any]:
    layers = moe_layer_numbers(config, len(counts_LE))
    share_LE = counts_LE.double() / counts_LE.sum(1, keepdim=True).clamp_min(1)
    loads: dict[str, Any] = {load_name(i): share.tolist() for i, share in zip(layers, share_LE, strict=True)}
    share_LR = rank_shares(config, counts_LE)
    ranks = {} if share_LR is None else {"moe/rank_max_over_mean": config.parallel.ep * float(share_LR.max())}
    return {
        **loads,
        **ranks,
        "moe/max_over_mean": float(share_LE.max()) * counts_LE.shape[1],
        "moe/dead_experts": int((counts_LE == 0).sum()),
        "moe/drop_rate": int(dropped_L.sum()) / max(1, int(counts_LE.sum())),
    }
