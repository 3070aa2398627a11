"""What a deviation from the reference usually comes from. A lead, named as such; the figures stand beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parallel.dims import ParallelDims
from trainer.config import RunConfig

_CLOSE = 1e-3


def ratios(found: Tensor | None, wanted: Tensor) -> dict[str, Any]:
    """min, median and max of ``found / wanted`` where the gradient is not noise."""
    if found is None:
        return {"missing": True}
    a, b = found.double().flatten(), wanted.double().flatten()
    counts = b.abs() > 1e-3 * b.abs().max()
    if not bool(counts.any()):
        return {"zero": not bool(a.any())}
    ratio = a[counts] / b[counts]
    low, middle, high = (float(v) for v in (ratio.min(), ratio.median(), ratio.max()))
    return {"min": low, "median": middle, "max": high}


def factors(config: RunConfig, dims: ParallelDims) -> Iterator[tuple[str, float]]:
    """Numbers of this layout that have no business in a gradient, and their inverses."""
    accumulation = config.train.global_batch // (config.train.micro_batch * dims.dp)
    numbers = {
        "ep": dims.ep,
        "expert_shard": dims.expert_shard,
        "dp_replicate": dims.dp_replicate,
        "dp_shard": dims.dp_shard,
        "dp": dims.dp,
        "the number of micro-batches": accumulation,
        "dp · micro-batches": dims.dp * accumulation,
        "top_k": config.layout.top_k,
    }
    for name, number in numbers.items():
        if number > 1:
            yield f"× {name} ({number})", float(number)
            yield f"÷ {name} ({number})", 1.0 / number


def _named_factor(ratio: float, config: RunConfig, dims: ParallelDims) -> str:
    hits = [name for name, value in factors(config, dims) if abs(ratio - value) <= _CLOSE * value]
    return " or ".join(hits)


def gradients(
    failed: list[str],
    found: dict[str, Tensor],
    reference: dict[str, Tensor],
    config: RunConfig,
    dims: ParallelDims,
) -> str:
    """What the gradients that deviate have in common.

    Args:
        failed: names of parameters, first the first of the model.
        found: the layout's gradients.
        reference: of the whole objective (``all:NAME``) and of each term alone (``balance:NAME``, …).
    """
    missing = [name for name in failed if name not in found]
    if missing:
        return f"{missing[0]} has no gradient"
    total = {name: reference[f"all:{name}"] for name in failed}
    spread = [ratios(found[name], total[name]) for name in failed]
    constant = {
        _named_factor(r["median"], config, dims)
        for r in spread
        if "median" in r and abs(r["max"] - r["min"]) <= _CLOSE * abs(r["median"])
    }
    only_experts = all(".experts." in name for name in failed)
    which = "expert gradients" if only_experts else "gradients"
    if len(constant) == 1 and (hit := constant.pop()):
        return f"{which} {hit}"
    for term in ("balance", "router_z"):
        if (share := _share_of_term(term, failed, found, total, reference)) is not None:
            if abs(share) <= _CLOSE:
                return f"the {term} loss does not reach the weights (detached)"
            return f"the {term} loss counts {_named_factor(share, config, dims) or f'× {share:.4g}'}"
    if only_experts:
        return "only expert gradients deviate: their reduction, or the rows they were given"
    if all(".router." in name for name in failed):
        return "only router gradients deviate: combine weights or auxiliary losses"
    return "no constant factor: tokens are weighted unevenly (a mean over ranks?), routed or masked otherwise"


def _share_of_term(
    term: str,
    failed: list[str],
    found: dict[str, Tensor],
    total: dict[str, Tensor],
    reference: dict[str, Tensor],
) -> float | None:
    """With which factor a term is in the found gradients, if its factor alone explains the difference."""
    if f"{term}:{failed[0]}" not in reference:
        return None
    off = torch.cat([(found[n].double() - total[n].double()).flatten() for n in failed])
    part = torch.cat([reference[f"{term}:{n}"].double().flatten() for n in failed])
    if not bool(part.any()):
        return None
    factor = float((off @ part) / (part @ part))
    explained = torch.linalg.vector_norm(off - factor * part) <= 0.01 * torch.linalg.vector_norm(off)
    return 1.0 + factor if bool(explained) else None


def norm(found: float, wanted: dict[str, Tensor], dims: ParallelDims) -> str:
    """Which gradients a wrong global norm has missed or counted several times."""
    squares = {name: float(g.double().square().sum()) for name, g in wanted.items()}
    experts = sum(value for name, value in squares.items() if ".experts." in name)
    dense = sum(squares.values()) - experts
    hypotheses = {"experts are left out": math.sqrt(dense)}
    for name, number in (("ep", dims.ep), ("dp_replicate", dims.dp_replicate), ("dp_shard", dims.dp_shard)):
        if number > 1:
            hypotheses |= {
                f"every gradient counts {name} ({number}) times": math.sqrt(number * (dense + experts)),
                f"experts count {name} ({number}) times": math.sqrt(dense + number * experts),
                f"dense gradients count {name} ({number}) times": math.sqrt(number * dense + experts),
            }
    hits = [what for what, value in hypotheses.items() if abs(found - value) <= _CLOSE * value]
    if hits:
        return " or ".join(hits)
    whole = math.sqrt(dense + experts)
    if found < whole:
        return f"shards are left out: {found:.6g} of {whole:.6g} (a rank's own part, or some experts)"
    return f"something counts more than once: {found:.6g} instead of {whole:.6g}"
