"""Do Llama 3's 419 interruptions, in one run, change a bit? `make chaos` [ARGS="--faults 20"].

Trains a small Mixture-of-Experts on two ranks, once in peace and once under the faults that stand for the table in
conf/cluster/llama3.yaml, and writes the verdict to bench/results/chaos_llama3.md. It takes hours, and can be
stopped: started again with the same arguments, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.environment import cpu_model

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "bench" / "results"
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
    *("data.tokenizer.vocab_size=1024", "train.seq_len=64", "train.global_batch=8", "train.num_threads=1"),
    *("optim.schedule=constant", "launcher.nproc_per_node=2", "parallel.ep=2", "logger.wandb.mode=disabled"),
    *("checkpoint.every=4", "resilience.collective_timeout_seconds=20", "run.name=chaos"),
]


def command(faults: int, seed: int) -> list[str]:
    """The `muster chaos` of so many interruptions; 0: all 419."""
    number = faults or 419
    own = ["cluster=llama3", f"chaos.faults={faults}", f"chaos.seed={seed}"]
    steps = f"train.steps={max(40, STEPS_A_FAULT * number + 10)}"
    return ["muster", "chaos", *MODEL, *own, steps, f"run.id=llama3-{number}-{seed}", "run.resume=true"]


def page(verdict: dict[str, Any], line: str, output: str) -> str:
    """The result as Markdown."""
    total = verdict["recovery_seconds"]
    cells = {"faults": f"{verdict['survived']} of {verdict['planned']} survived"}
    cells |= {"bit-identical": "yes" if verdict["bit_identical"] else f"NO: {verdict['first_difference']}"}
    cells |= {"steps computed again": str(verdict["lost_steps"]), "goodput": f"{verdict['goodput'] or 0:.1%}"}
    cells |= {
        "recovery, median": f"{total['median'] or 0:.2f} s",
        "recovery, p99": f"{total['p99'] or 0:.2f} s",
    }
    cells |= {"commands": str(verdict["commands"]), "seconds": f"{verdict['seconds']:.0f}"}
    components: dict[str, list[dict[str, Any]]] = {}
    for fault in verdict["faults"]:
        components.setdefault(fault["component"], []).append(fault)
    rows = [
        f"| {name} | {len(faults)} | {sum(f['survived'] for f in faults)} | "
        f"{', '.join(sorted({f['instead_of'] or f['kind'] for f in faults}))} |"
        for name, faults in sorted(components.items(), key=lambda item: -len(item[1]))
    ]
    machine = f"{os.cpu_count()} cores of {cpu_model()}, {platform.system()}"
    return "\n".join(
        [
            "# Llama 3's interruptions in one run\n",
            f"{machine}, {time.strftime('%Y-%m-%d')}, CPU and gloo, two ranks.",
            f"\nBy `python -m bench.chaos`, which ran\n\n```text\n{line}\n```\n",
            "| | |\n| --- | --- |",
            *(f"| {name} | {value} |" for name, value in cells.items()),
            "\nFaults of nodes are every rank of the machine dying at once (docs/chaos.md).\n",
            "| component | faults | survived | kinds |\n| --- | --- | --- | --- |",
            *rows,
            f"\nRaw output:\n\n```text\n{output.strip()}\n```\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--faults", type=int, default=0, help="0: all 419")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=REPO, help="where runs/ is")
    given = parser.parse_args()
    words = command(given.faults, given.seed)
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
    path = given.folder / "runs" / "chaos" / f"llama3-{given.faults or 419}-{given.seed}" / "verdict.json"
    if code not in (0, 1) or not path.is_file():
        sys.exit(code or 1)
    verdict = json.loads(path.read_text())
    name = "chaos_llama3" if not given.faults else f"chaos_llama3_{given.faults}"
    output = "".join(lines).replace(f"{given.folder}/", "")
    (RESULTS / f"{name}.md").write_text(page(verdict, shlex.join(words), output))
    sys.exit(code)


if __name__ == "__main__":
    main()
