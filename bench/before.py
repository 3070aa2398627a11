"""A step of the quickstart's model before and after: two versions of Muster in turn, and a picture of their parts.

    make bench-before ARGS="--rev 2950743"

Each version, from this repository's history, trains in a process of its own, as its workers wait (the newest one's
OpenMP threads spin for 0.2 ms). Writes bench/results/before.md and docs/images/step_before_after.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from bench.here import RESULTS, measured
from bench.paired import ratio

ROOT = RESULTS.parents[1]
PICTURE = ROOT / "docs" / "images" / "step_before_after.png"
COLOURS = {
    "experts": "#6f9fdc",
    "dispatch and combine": "#b7d0f0",
    "attention": "#5c9a60",
    "embedding, head, loss": "#e8a33d",
    "norms": "#b7dfb9",
    "router": "#d6336c",
    "optimizer": "#9b7fd1",
}
REST = "all else"


def step_of(tree: Path, steps: int, spin: bool) -> dict[str, Any]:
    """What bench/before_tree.py says of the version in ``tree``."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    environment.pop("GOMP_SPINCOUNT", None)
    if spin:
        environment["GOMP_SPINCOUNT"] = "10000"
    command = [sys.executable, str(ROOT / "bench" / "before_tree.py")]
    command += [str(ROOT / "trainer" / "profiling.py"), str(steps)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parts_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Median milliseconds of the parts that have a colour, and of all others together."""
    found = {name: median(one["parts_ms"].get(name, 0.0) for one in rounds) for name in COLOURS}
    others = (sum(ms for name, ms in one["parts_ms"].items() if name not in COLOURS) for one in rounds)
    return {**found, REST: median(others)}


def draw(parts: Mapping[str, Mapping[str, float]]) -> None:
    """A bar a version."""
    figure = Figure(figsize=(9, 2.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for row, found in enumerate(parts.values()):
        left = 0.0
        for name, ms in found.items():
            axes.barh(row, ms, left=left, color=COLOURS.get(name, "#c3cad2"), label="" if row else name)
            if ms > 0.04 * sum(found.values()):
                axes.text(left + ms / 2, row, f"{ms:.0f}", ha="center", va="center", fontsize=8)
            left += ms
        axes.text(left, row, f" {left:.0f} ms", va="center", fontsize=9, weight="bold")
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(sum(found.values()) for found in parts.values()))
    axes.set_xlabel("milliseconds a step under the profiler, forward and backward together")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(PICTURE, metadata={"Software": ""})


def page(head: str, rev: str, rounds: Mapping[str, list[dict[str, Any]]]) -> str:
    """All of it."""
    before, after = ([median(one["ms"]) for one in found] for found in rounds.values())
    middle, low, high = ratio(after, before)
    parts = {version: parts_of(found) for version, found in rounds.items()}
    lines = [
        "# A step before and after\n",
        head,
        f"{len(before)} processes of each version in turn, fp32, one rank; of a process the median step.",
        f"Before is commit {rev}.\n",
        "![What the parts of a step take](../../docs/images/step_before_after.png)\n",
        f"After ÷ before: {middle:.2f} [{low:.2f}, {high:.2f}] (median over pairs of processes, 95 % interval), "
        f"{median(before):.0f} ms and {median(after):.0f} ms without the profiler. Under it:\n",
        "| | before, ms | after, ms |",
        "| --- | --- | --- |",
    ]
    was, now = parts.values()
    lines += [f"| {name} | {was[name]:.1f} | {now[name]:.1f} |" for name in was]
    raw = [json.dumps({"version": version, **one}) for version, found in rounds.items() for one in found]
    return "\n".join([*lines, "", "Raw:\n", "```json", *raw, "```"]) + "\n"


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rev", required=True, help="the commit before")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(given)
    head = measured(f'make bench-before ARGS="{" ".join(given)}"')
    rounds: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "before")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, args.rev], check=True)
        try:
            for _ in range(args.rounds):
                rounds["before"].append(step_of(tree, args.steps, spin=False))
                rounds["after"].append(step_of(ROOT, args.steps, spin=True))
                print(
                    *(f"{name} {median(found[-1]['ms']):.0f} ms" for name, found in rounds.items()),
                    flush=True,
                )
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    first = [found[0]["losses"] for found in rounds.values()]
    if any(abs(a - b) > 1e-4 * abs(a) for a, b in zip(*first, strict=True)):
        sys.exit(f"the versions do not compute the same: losses {first}")
    draw({version: parts_of(found) for version, found in rounds.items()})
    (RESULTS / "before.md").write_text(page(head, args.rev, rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
