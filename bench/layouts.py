"""Every layout with the quickstart's budget, one after another, through `muster train`: `make bench-layouts`.

    .venv/bin/python -m bench.layouts [--layouts switch,mixtral] [--steps 160] [--json]

Two processes, ep=2, the data and steps of conf/experiment/quickstart.yaml. Writes layouts.json (raw) and layouts.md
(the table) after each run. A layout that is in layouts.json already, measured on this machine with this config, is
not run again; Ctrl-C saves the run that is on, which the next call goes on with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launch.outcome import EXIT_STOPPED
from trainer.compose import compose
from trainer.config import Machine, resolve
from trainer.environment import cpu_model
from trainer.layouts import layout_names
from trainer.metrics.history import History
from trainer.metrics.schema import as_float

REPO = Path(__file__).resolve().parent.parent
LAST = 20
"""Logged steps at the end that loads are averaged over."""

Row = dict[str, Any]

_COLUMNS = {
    "parameters": ("num_parameters", lambda n: f"{n / 1e6:.1f} M"),
    "active": ("num_active_parameters", lambda n: f"{n / 1e6:.1f} M"),
    "valid loss": ("loss_valid", "{:.3f}".format),
    "below unigram": ("below_unigram", "{:.3f}".format),
    "tokens/s": ("tokens_per_second", "{:,.0f}".format),
    "max/mean load": ("max_over_mean", "{:.2f}".format),
    "drop rate": ("drop_rate", "{:.1%}".format),
    "dead experts": ("dead_experts", "{:.1f}".format),
    "router entropy": ("router_entropy", "{:.2f}".format),
}


def overrides_of(name: str, steps: int | None) -> list[str]:
    """What makes the quickstart a run of this layout; nothing is logged to W&B and no text is sampled."""
    asked = ["experiment=quickstart", f"layout={name}", "device=cpu", "eval.sample_tokens=0"]
    if name == "dense":
        asked.append("parallel.ep=1")
    return [*asked, *([] if steps is None else [f"train.steps={steps}"])]


def key_of(overrides: list[str], machine: Row) -> str:
    """Changes with the config and the machine."""
    config = asdict(resolve(compose(overrides), Machine.here()))
    text = json.dumps([config, machine], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def this_machine() -> Row:
    return {"nproc": len(os.sched_getaffinity(0)), "cpu": cpu_model(), "torch": torch.__version__}


def train(name: str, key: str, overrides: list[str], root: Path) -> Path | None:
    """Run or go on with one layout.

    Returns:
        The run directory; None if the run failed.

    Raises:
        SystemExit: it was asked to stop and has saved.
    """
    run = [f"run.root={root}", "run.name=bench-layouts", f"run.id={name}-{key}", "run.resume=true"]
    quiet = ["logger.wandb.mode=disabled", "logger.terminal=plain"]
    command = [str(Path(sys.executable).parent / "muster"), "train", *overrides, *run, *quiet]
    print(f"{name}: {' '.join(['muster', *command[1:]])}", file=sys.stderr, flush=True)
    process = subprocess.Popen(command, cwd=REPO, stdout=sys.stderr)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # it got the signal too, and saves
        code = process.wait() or EXIT_STOPPED
    if code == EXIT_STOPPED:
        sys.exit(code)
    if code:
        print(f"{name}: exit code {code}", file=sys.stderr)
        return None
    return root / "bench-layouts" / f"{name}-{key}"


def measured(run_dir: Path) -> Row:
    """What a finished run says about itself."""
    history = History.load(run_dir)
    start, finish, end = history.start, history.finish, history.records[-LAST:]

    def mean(metric: str) -> float | None:
        values = [record[metric] for record in end if metric in record]
        return statistics.fmean(values) if values else None

    speeds = [as_float(record.get("perf/tokens_per_second")) for record in history.records]
    return {
        "num_parameters": start["num_parameters"],
        "num_active_parameters": start["num_active_parameters"],
        "steps": start["steps"],
        "tokens": history.records[-1]["tokens"],
        "restarts": len(history.all("restart", "resume")),
        "seconds": finish["seconds"],
        "loss_valid": finish["loss_valid"],
        "unigram_loss": finish["unigram_loss"],
        "below_unigram": finish["unigram_loss"] - finish["loss_valid"],
        "tokens_per_second": statistics.median(speeds),
        "max_over_mean": mean("moe/max_over_mean"),
        "dead_experts": mean("moe/dead_experts"),
        "drop_rate": mean("moe/drop_rate"),
        "router_entropy": mean("moe/router_entropy"),
    }


def markdown(results: Row) -> str:
    """The page: machine, date, command and one row a layout."""
    rows: dict[str, Row] = results["rows"]
    machine, first = results["machine"], next(iter(rows.values()))
    lines = [
        "# Layouts with the quickstart's budget",
        "",
        "<!-- Written by `make bench-layouts`; the raw numbers are in layouts.json. -->",
        "",
        f"{machine['cpu']}, {machine['nproc']} cores, torch {machine['torch']}, {results['date']}: "
        f"`{results['command']}`",
        "",
        f"Two processes, `ep=2`, {first['steps']} steps, {first['tokens']:,} tokens of the standard library's",
        f"sources. The loss of a unigram model on the held-out rows is {first['unigram_loss']:.3f}.",
        "tokens/s: median over the steps. Load, drops, dead experts (of all layers) and entropy: means of the "
        f"last {LAST} steps.",
        "The loss of `expert_choice` is that of a model that sees later tokens ([why](../../docs/layouts.md)).",
        "",
        "| layout | " + " | ".join(_COLUMNS) + " |",
        "| " + " | ".join(["---"] * (len(_COLUMNS) + 1)) + " |",
    ]
    for name, row in rows.items():
        cells = ["–" if row[key] is None else shown(row[key]) for key, shown in _COLUMNS.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def stored(path: Path, machine: Row) -> dict[str, Row]:
    """Rows of an earlier call on this machine."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return dict(found["rows"]) if found["machine"] == machine else {}


def write(folder: Path, rows: dict[str, Row], steps: int, asked: str) -> None:
    """The rows of runs with this many steps, raw and as a page."""
    results = {
        "machine": this_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"make bench-layouts{asked}",
        "rows": {name: rows[name] for name in layout_names() if rows.get(name, {}).get("steps") == steps},
    }
    (folder / "layouts.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "layouts.md").write_text(markdown(results))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.layouts", description=__doc__.split("\n")[0])
    parser.add_argument("--layouts", help="separated by commas; default: all")
    parser.add_argument("--steps", type=int, help="of each run; default: the quickstart's")
    parser.add_argument("--runs", type=Path, default=REPO / "runs", help="where run directories go")
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "results", help="where results go")
    parser.add_argument("--json", action="store_true", help="print the raw numbers instead of the page")
    args = parser.parse_args(argv)
    names = args.layouts.split(",") if args.layouts else layout_names()
    unknown = sorted(set(names) - set(layout_names()))
    if unknown:
        parser.error(f"no such layout: {', '.join(unknown)}; there are {', '.join(layout_names())}")
    given = {"layouts": args.layouts, "steps": args.steps}
    asked = " ".join(f"--{option} {value}" for option, value in given.items() if value)
    args.out.mkdir(parents=True, exist_ok=True)
    machine, rows = this_machine(), stored(args.out / "layouts.json", this_machine())
    failed = []
    for name in names:
        overrides = overrides_of(name, args.steps)
        key = key_of(overrides, machine)
        if rows.get(name, {}).get("key") != key:
            run_dir = train(name, key, overrides, args.runs)
            if run_dir is None:
                failed.append(name)
                continue
            rows[name] = {"key": key, "date": time.strftime("%Y-%m-%d"), **measured(run_dir)}
            write(args.out, rows, rows[name]["steps"], f' ARGS="{asked}"' if asked else "")
    page = args.out / ("layouts.json" if args.json else "layouts.md")
    print(page.read_text() if page.is_file() else "", end="")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
