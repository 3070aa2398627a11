"""The page that bench/layer.py writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

from bench.layer_peers import BALANCED, FLOORS, GROUPED, MUSTER
from bench.layer_work import LIMITS, SKEW, Shape
from bench.paired import ratio


@dataclass
class Row:
    """One contestant on one shape, dtype and routing.

    Attributes:
        ms: of each round; empty where it took no part, and ``note`` says why.
        error, where: largest error against fp64, and of which tensor; None: not checked.
        wrong_rows: share of the tokens whose output is wrong, where it was called WRONG.
    """

    name: str
    ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: float | None = None
    where: str = ""
    wrong_rows: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Block:
    """All contestants on one shape, dtype and routing.

    Attributes:
        floor: the contestant whose multiples are given.
        max_over_mean: rows of the busiest expert / the mean; the most of any round.
        note: why nothing was measured.
    """

    shape: str
    dtype: str
    routing: str
    floor: str
    rows: list[Row] = field(default_factory=list)
    max_over_mean: float = 1.0
    note: str = ""

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def best_peer(self) -> Row | None:
        """The fastest that is right and no floor."""
        peers = [r for r in self.rows if r.ms and r.error is not None and r.wrong_rows is None]
        return min((r for r in peers if r.name != MUSTER), key=lambda r: median(r.ms), default=None)

    def lines(self) -> Iterable[dict[str, Any]]:
        """What was measured, a line a contestant."""
        about = {"shape": self.shape, "dtype": self.dtype, "routing": self.routing}
        if self.note:
            yield {**about, "note": self.note}
        for row in self.rows:
            yield {**about, "max_over_mean": round(self.max_over_mean, 3), **vars(row)}


def page(head: str, shapes: Sequence[Shape], blocks: Sequence[Block], rounds: int, raw: Sequence[str]) -> str:
    """All of it.

    Args:
        raw: JSON lines for its end; empty: they are in a file.
    """
    parts = [
        "# One MoE layer, forward and backward\n",
        head,
        _explained(rounds),
        _shapes(shapes),
        _summary(blocks),
    ]
    parts += [table(block) for block in blocks]
    if raw:
        parts.append("\n".join(["Raw, milliseconds of each round:\n", "```json", *raw, "```"]))
    return "\n".join(parts) + "\n"


def _explained(rounds: int) -> str:
    limits = ", ".join(f"{limit:g} in {str(dtype).removeprefix('torch.')}" for dtype, limit in LIMITS.items())
    return f"""{rounds} rounds after a first that is not counted, torch with {torch.get_num_threads()} threads. Each
round has new inputs, all contestants see the same, and another one begins. The routing is given: no router is
computed, except that DeepSpeed's MoE turns the logits it is handed into weights and slots, which is part of it.

- **× floor**, **Muster ÷ it**: median over rounds of the ratio of two times of one round, and its 95 % interval
  (bootstrap). Muster is ahead where the interval is below 1.
- **floor: matmuls**: the step's nine matrix products, each as one of N = tokens · choices rows, into memory that
  is there already. **floor: dense SwiGLU**: one dense layer for N rows under autograd, in the layer's dtype.
- **peak**: bytes live at the peak of a step on one thread beside inputs, weights and their gradients; what an
  operator takes and gives back while it runs is not seen. **÷ grouped_mm**: of {GROUPED}.
- **error**: largest difference from a loop in fp64 / the largest right value, of the worst of output and
  gradients. Above {limits} it is WRONG.
- Routing: *balanced* gives all experts as many rows; *zipf* the busiest {SKEW} times the mean; *recorded* is what
  the routers of a small model chose after 120 steps (bench/routing.py), another layer each round.
"""


def _shapes(shapes: Sequence[Shape]) -> str:
    lines = ["| shape | tokens | width | expert width | experts | choices | GFLOP a step |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for s in shapes:
        sizes = f"{s.tokens} | {s.dim} | {s.ffn_dim} | {s.num_experts} | {s.top_k} | {s.flops / 1e9:.0f}"
        lines.append(f"| {s.name} | {sizes} |")
    return "\n".join(lines) + "\n"


def _summary(blocks: Sequence[Block]) -> str:
    lines = [
        "| shape | dtype | routing | Muster × floor | best peer | Muster ÷ it | peak ÷ grouped_mm | ÷ balanced |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for block in blocks:
        start = f"| {block.shape} | {block.dtype} | {block.routing} |"
        if block.note:
            lines.append(f"{start} {block.note} | | | | |")
            continue
        muster, best = block.row(MUSTER), block.best_peer()
        against = [best.name, _ratio(muster, best)] if best else ["none", ""]
        even = [_ratio(muster, row) for row in block.rows if row.name == BALANCED]
        cells = [
            _ratio(muster, block.row(block.floor)),
            *against,
            _peak_ratio(block, muster),
            *(even or [""]),
        ]
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(block: Block) -> str:
    """One block, and how much the floor itself varied."""
    title = f"## {block.shape}, {block.dtype}, {block.routing}\n"
    if block.note:
        return f"{title}\nNot measured: {block.note}.\n"
    floor, muster = block.row(block.floor), block.row(MUSTER)
    lines = [
        f"{title}\nBusiest expert / mean: {block.max_over_mean:.2f}. {_noise(floor)}\n",
        "| | ms | × floor | Muster ÷ it | peak, MB | ÷ grouped_mm | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in block.rows:
        if not row.ms:
            lines.append(f"| {row.name} | {row.note} | | | | | |")
            continue
        kept = "" if row.peak_bytes is None or row.name in FLOORS.values() else f"{row.peak_bytes / 1e6:.0f}"
        cells = [f"{median(row.ms):.0f}", _ratio(row, floor)]
        cells += ["" if row is muster else _ratio(muster, row), kept, _peak_ratio(block, row) if kept else ""]
        cells.append(row.note or ("" if row.error is None else f"{row.error:.1g}"))
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratio(these: Row, those: Row) -> str:
    middle, low, high = ratio(these.ms, those.ms)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _peak_ratio(block: Block, row: Row) -> str:
    of = next((r.peak_bytes for r in block.rows if r.name == GROUPED), None)
    return f"{row.peak_bytes / of:.2f}" if of and row.peak_bytes is not None else ""


def _noise(floor: Row) -> str:
    middle = median(floor.ms)
    if len(floor.ms) < 2:
        return f"The floor took {middle:.0f} ms, once."
    low, _, high = quantiles(floor.ms, n=4, method="inclusive")
    spread = f"{100 * (low / middle - 1):+.0f} % to {100 * (high / middle - 1):+.0f} %"
    return f"The floor's own noise: median {middle:.0f} ms, quartiles {low:.0f} to {high:.0f} ms ({spread})."
