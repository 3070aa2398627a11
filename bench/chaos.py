"""Do Llama 3's 419 interruptions, in one run, change a bit? `make chaos` [ARGS="--faults 20 --nodes 2 --gone 2"].

Trains a small Mixture-of-Experts on two ranks, once in peace and once under the faults that stand for the table in
conf/cluster/llama3.yaml, and writes the verdict to bench/results/chaos_llama3.md. It takes hours, and can be
stopped: started again with the same arguments, it goes on where it was.

`--nodes 2` (as root) has each rank on a node of its own, a network namespace, so that lost nodes and links are
not stood in for. With `--gone 2` beside it there are two nodes more at the beginning, and the first two that are
lost do not come back: the run shrinks to two ranks, and must end equal up to rounding. Every token then goes to
every expert: no tie between experts is left for rounding to decide (docs/chaos.md).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.here import RESULTS, measured

REPO = Path(__file__).resolve().parent.parent
STEPS_A_FAULT = 5
MODEL = [
    *(
        "device=cpu",
        "model.dim=64",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.ffn_dim=128",
        "data=stdlib",
    ),
    *("data.tokenizer.vocab_size=1024", "train.seq_len=64", "train.num_threads=1"),
    *("optim.schedule=constant", "parallel.ep=2", "logger.wandb.mode=disabled", "checkpoint.every=4"),
    *("resilience.collective_timeout_seconds=20", "run.name=chaos"),
]
ONE_MACHINE = ["train.global_batch=8", "launcher.nproc_per_node=2"]
SHRINKING = ["train.global_batch=12", "layout=mixtral", "layout.num_experts=4", "layout.top_k=4"]
SHRINKING += ["parallel.dp_shard=2", "parallel.dp_replicate=2"]  # 3 divides no dimension of the model
WAITS = [
    "resilience.node_timeout_seconds=5",
    "launcher.rejoin_seconds=10",
    "launcher.join_timeout_seconds=20",
]


def command(name: str, faults: int, seed: int, nodes: int, gone: int) -> list[str]:
    """The `muster chaos` of so many interruptions; 0: all 419."""
    own = ["cluster=llama3", f"chaos.faults={faults}", f"chaos.seed={seed}"]
    if nodes:
        own += [
            "launcher.nproc_per_node=1",
            f"chaos.nodes={nodes + gone}",
            f"chaos.nodes_gone={gone}",
            *WAITS,
        ]
        own += SHRINKING if gone else ["train.global_batch=8"]
    else:
        own += ONE_MACHINE
    steps = f"train.steps={max(40, STEPS_A_FAULT * (faults or 419) + 10)}"
    return ["muster", "chaos", *MODEL, *own, steps, f"run.id={name}-{seed}", "run.resume=true"]


def page(verdict: dict[str, Any], head: str, line: str, output: str) -> str:
    """The result as Markdown."""
    total = verdict["recovery_seconds"]
    cells = {"faults": f"{verdict['survived']} of {verdict['planned']} survived"}
    same = "yes" if verdict["equal"] else f"NO: {verdict['first_difference']}"
    if verdict["tolerance"]:
        largest = f"losses differ by {verdict['largest_difference']} at the most, relatively"
        cells |= {f"equal within {verdict['tolerance']:g}": f"{same}: {largest}"}
    else:
        cells |= {"bit-identical": same}
    cells |= {"steps computed again": str(verdict["lost_steps"]), "goodput": f"{verdict['goodput'] or 0:.1%}"}
    cells |= {
        "recovery, median": f"{total['median'] or 0:.2f} s",
        "recovery, p99": f"{total['p99'] or 0:.2f} s",
    }
    # A run that was stopped is gone on with by the same call.
    cells |= {
        "commands, last call": str(verdict["commands"]),
        "seconds, last call": f"{verdict['seconds']:.0f}",
    }
    components: dict[str, list[dict[str, Any]]] = {}
    for fault in verdict["faults"]:
        components.setdefault(fault["component"], []).append(fault)
    rows = [
        f"| {name} | {len(faults)} | {sum(f['survived'] for f in faults)} | "
        f"{', '.join(sorted({f['instead_of'] or f['kind'] for f in faults}))} |"
        for name, faults in sorted(components.items(), key=lambda item: -len(item[1]))
    ]
    return "\n".join(
        [
            "# Llama 3's interruptions in one run\n",
            head,
            f"CPU and gloo. It ran\n\n```text\n{line}\n```\n",
            "| | |\n| --- | --- |",
            *(f"| {name} | {value} |" for name, value in cells.items()),
            "\nWhat each kind is, and what is not real about it: docs/chaos.md.\n",
            "| component | faults | survived | kinds |\n| --- | --- | --- | --- |",
            *rows,
            f"\nRaw output:\n\n```text\n{output.strip()}\n```\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--faults", type=int, default=0, help="0: all 419")
    parser.add_argument("--nodes", type=int, default=0, help="network namespaces (root); 0: one machine")
    parser.add_argument(
        "--gone", type=int, default=0, help="more nodes at the beginning, which do not come back"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=REPO, help="where runs/ is")
    given = parser.parse_args()
    if given.gone and not given.nodes:
        parser.error("--gone is about nodes: --nodes 2 --gone 2")
    name = "-".join(
        ["llama3", str(given.faults or 419)] + ["nodes"] * bool(given.nodes) + ["gone"] * bool(given.gone)
    )
    words = command(name, given.faults, given.seed, given.nodes, given.gone)
    head = measured(f"make chaos ARGS='{shlex.join(sys.argv[1:])}'")
    chaos = subprocess.Popen(
        [str(Path(sys.executable).parent / words[0]), *words[1:]],
        cwd=given.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert chaos.stdout is not None
    lines = []
    try:
        for line in chaos.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.")
    code = chaos.wait()
    path = given.folder / "runs" / "chaos" / f"{name}-{given.seed}" / "verdict.json"
    if code not in (0, 1) or not path.is_file():
        sys.exit(code or 1)
    verdict = json.loads(path.read_text())
    output = "".join(lines).replace(f"{given.folder}/", "")
    page_name = f"chaos_{name}".replace("-419", "").replace("-", "_")
    (RESULTS / f"{page_name}.md").write_text(page(verdict, head, shlex.join(words), output))
    sys.exit(code)


if __name__ == "__main__":
    main()
