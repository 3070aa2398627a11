"""The README's section on speed, from the raw lines of the pages in bench/results.

python -m bench.readme       (make docs does it, too)
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.exchange import TARGETS
from bench.here import RESULTS
from bench.layer_peers import DENSE, FLOORS, MUSTER
from bench.paired import ratio

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- speed: python -m bench.readme -->\n", "<!-- speed ends -->\n"
SHAPES = {
    "mixtral": "T 4096, 8 experts, k 2",
    "fine": "T 4096, 64 experts, k 8",
    "switch": "T 8192, 8 experts, k 1",
}
FLOOR = next(iter(FLOORS.values()))


def lines_of(page: Path) -> list[dict[str, Any]]:
    """The raw lines that end a page."""
    block = page.read_text().rpartition("```json\n")[2].partition("```")[0]
    return [json.loads(line) for line in block.splitlines()]


def machine_of(page: Path) -> str:
    """Cores, processor and date of a page's head."""
    found = re.search(r"^(.+?) \(shared\), .*?(\d{4}-\d\d-\d\d):$", page.read_text(), re.MULTILINE)
    assert found is not None, f"{page.name} names no machine"
    return f"{found[1]}, {found[2]}"


def _cell(these: list[float], those: list[float]) -> str:
    middle, low, high = ratio(these, those)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def layer() -> str:
    """Multiples of the matrix products, by shape."""
    page = RESULTS / "layer.md"
    rows: dict[str, dict[str, list[float]]] = {}
    for line in lines_of(page):
        if line["dtype"] == "float32" and line["routing"] == "recorded":
            rows.setdefault(line["name"], {})[line["shape"]] = line["ms"]
    shown = [MUSTER, *(n for n in rows if not n.startswith((MUSTER, "floor")) and "capacity" not in n), DENSE]
    table = [f"| | {' | '.join(SHAPES.values())} |", "| --- | --- | --- | --- |"]
    for name in shown:
        cells = [_cell(rows[name][shape], rows[FLOOR][shape]) for shape in SHAPES]
        label = f"**{name}**" if name == MUSTER else name
        table.append(f"| {label} | {' | '.join(cells)} |")
    return f"""One MoE layer, forward and backward, fp32, as a multiple of the time of its nine matrix products
(median and 95 % interval of paired ratios), experts loaded as a small model's routers did after 120 steps:
`make bench-layer` on {machine_of(page)}, [result](bench/results/layer.md), with even and Zipf routing, bf16,
memory and errors.

{chr(10).join(table)}
"""


def exchange() -> str:
    """The layer over two ranks, by shape."""
    page = RESULTS / "exchange.md"
    rows = {
        (line["shape"], line["name"]): line["ms"]
        for line in lines_of(page)
        if line["world"] == 2 and line.get("routing") == "recorded"
    }
    table = [
        "| two ranks over gloo | ÷ (products + bytes alone) | ÷ DeepSpeed MoE, no drop |",
        "| --- | --- | --- |",
    ]
    for shape in TARGETS:
        muster, peer = rows[shape, "Muster"], rows[shape, "DeepSpeed MoE, no drop"]
        sums = zip(rows[shape, "floor: matmuls"], rows[shape, "its bytes alone"], strict=True)
        table.append(
            f"| {SHAPES[shape]} | {_cell(muster, [a + b for a, b in sums])} | {_cell(muster, peer)} |"
        )
    return f"""The same with experts on two ranks, a token sent once to each: Muster's time as a part of others',
`make bench-exchange` on {machine_of(page)}, [result](bench/results/exchange.md).

{chr(10).join(table)}
"""


def step() -> str:
    """A whole step, by dtype."""
    page = RESULTS / "step.md"
    lines = [line for line in lines_of(page) if "name" in line and line["ms"]]
    floors = {line["dtype"]: line["ms"] for line in lines if line["name"].startswith("floor")}
    table = ["| a training step of the quickstart's model | fp32 | bf16 |", "| --- | --- | --- |"]
    names = list(dict.fromkeys(line["name"] for line in lines if not line["name"].startswith("floor")))
    for name in names:
        found = {line["dtype"]: line["ms"] for line in lines if line["name"] == name}
        cells = [_cell(found[d], floors[d]) if d in found else "" for d in ("fp32", "bf16")]
        table.append(f"| {f'**{name}**' if name.startswith('Muster') else name} | {' | '.join(cells)} |")
    return f"""A whole step of one process, as a multiple of its matrix products in fp32: `make bench-step` on
{machine_of(page)}, [result](bench/results/step.md).

{chr(10).join(table)}
"""


def section() -> str:
    return "\n".join([BEGIN, layer(), exchange(), step(), END])


def main() -> int:
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest:
        sys.exit(f"README.md has no line {BEGIN.strip()}")
    README.write_text(before + section() + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
