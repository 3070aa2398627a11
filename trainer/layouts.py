"""What each layout of ``conf/layout`` costs, for docs/layouts.md: ``python -m trainer.layouts docs/layouts.md``.

The page is written by hand but for what stands between ``<!-- cost: NAME -->`` and ``<!-- end -->``, which this
fills in; a test keeps the two equal.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

from parallel.dispatch.local import LocalDispatcher
from trainer.build import build_model
from trainer.compose import CONF_DIR, compose
from trainer.config import Machine, RunConfig, resolve
from trainer.config_moe import LayoutConfig
from trainer.models.cost import all_to_all_bytes_per_token, model_cost, places_reached

EP = 4
"""Ranks that the page spreads the experts over."""

_BLOCK = re.compile(r"<!-- cost: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
_HEADER = (
    "parameters",
    "active",
    "training FLOPs a token",
    f"all-to-all bytes a token, `ep={EP}`",
    f"ranks reached, of {EP}",
)


def layout_names() -> list[str]:
    """Every choice of ``layout=``."""
    return sorted(path.stem for path in (CONF_DIR / "layout").glob("*.yaml"))


@cache
def layout_config(name: str) -> RunConfig:
    """What ``layout=NAME model=tiny`` is on a CPU, resolved."""
    return resolve(compose([f"layout={name}", "model=tiny", "device=cpu"]), Machine(num_cpus=1))


def drawn_from(config: RunConfig) -> str:
    """All that a picture of a layout shows, as JSON: it is kept in the picture, so that an old one is found."""
    neutral, layout = asdict(LayoutConfig()), asdict(config.layout)
    own = {key: value for key, value in layout.items() if key != "balance" and value != neutral[key]}
    seen = {"layout": own, "num_layers": config.model.num_layers, "ffn_dim": config.model.ffn_dim}
    return json.dumps(seen, default=lambda choice: choice.value)


@cache
def cost_cells(name: str) -> tuple[str, ...]:
    """The cells of one layout under ``_HEADER``."""
    config = layout_config(name)
    cost = model_cost(build_model(config, LocalDispatcher()), config)
    flops = _amount(cost.flops_per_token)
    if cost.computed_flops_per_token > cost.flops_per_token:
        flops += f" ({_amount(cost.computed_flops_per_token)} with empty places)"
    if not config.layout.num_experts:
        return _amount(cost.num_parameters), _amount(cost.num_active), flops, "0", "–"
    sent = all_to_all_bytes_per_token(config, EP)
    reached = places_reached(config.layout, EP)
    return (
        _amount(cost.num_parameters),
        _amount(cost.num_active),
        flops,
        f"{sent / 1e3:.1f} k",
        f"{'up to ' if reached > 1 else ''}{reached}",
    )


def filled(page: str) -> str:
    """The page with every cost in it: a layout's in its own block, all of them in the block ``all``."""
    order = [name for name in _BLOCK.findall(page) if name != "all"]

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name == "all":
            rows = [("layout", *_HEADER), *((f"[`{n}`](#{n})", *cost_cells(n)) for n in order)]
        else:
            rows = [_HEADER, cost_cells(name)]
        lines = [" | ".join(row) for row in rows]
        lines.insert(1, " | ".join(["---"] * len(rows[0])))
        return "\n".join([f"<!-- cost: {name} -->", *(f"| {line} |" for line in lines), "<!-- end -->"])

    return _BLOCK.sub(block, page)


def _amount(number: float) -> str:
    return f"{number / 1e6:.1f} M"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text()))
