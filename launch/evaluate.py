"""``muster evaluate RUN_DIR|CHECKPOINT``: the loss on held-out rows or other text, or the harness's tasks."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.inference import JobFailed, find_checkpoint, layout_for, perform, split
from launch.outcome import Outcome
from parallel.errors import ConfigError
from trainer.config import DataConfig, RunConfig, require

if TYPE_CHECKING:
    from trainer.checkpoint.resume import Checkpoint
    from trainer.inference import Job

EVALUATIONS_FILE = "evaluations.jsonl"

_OPTIONS: dict[str, type] = {
    "tasks": str,
    "include_path": str,
    "num_fewshot": int,
    "limit": int,
    "batch_size": int,
    "json": bool,
}
_TASKS_ONLY = ("include_path", "num_fewshot", "limit", "batch_size")
_DOCUMENTS = ("data.source", "data.path", "data.name", "data.subset", "data.target", "data.kwargs")
"""Fields that name other documents than the run's."""


@dataclass(frozen=True)
class Asked:
    """A command line, taken apart.

    Attributes:
        options: of the command.
        data: overrides of the ``data`` section.
        others: overrides of what else.
        max_rows: of ``eval.max_rows``, None where it is not given; below 1: all.
    """

    options: dict[str, Any]
    data: list[str]
    others: list[str]
    max_rows: int | None

    @property
    def own_data(self) -> bool:
        """Whether the run's own held-out rows are asked for."""
        return not self.data and not any(text.startswith("train.seq_len=") for text in self.others)


def main(argv: list[str]) -> Outcome:
    """Run ``muster evaluate`` with these arguments.

    Raises:
        ConfigError: no run or checkpoint is there, an option or override cannot be, or the data cannot be had.
    """
    if not argv:
        raise ConfigError("RUN_DIR", "", "which run or checkpoint?", "muster evaluate runs/NAME/ID")
    asked = parse(argv[1:])
    checkpoint = find_checkpoint(Path(argv[0]))
    from trainer.build import run_of
    from trainer.compose import load_frozen

    run_dir = run_of(checkpoint)
    config = _config(load_frozen(run_dir / "config.yaml"), asked, run_dir)
    job = _job(asked, config, checkpoint)
    began = time.time()
    try:
        (answers,) = perform(job, config, checkpoint)
    except JobFailed as failed:
        return failed.outcome
    record = {
        "time": began,
        "seconds": time.time() - began,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        **({"tasks": answers} if job.tasks is not None else {"data": _described(config, asked), **answers}),
    }
    _keep(run_dir / EVALUATIONS_FILE, record)
    if asked.options.get("json"):
        sys.stdout.write(json.dumps(record) + "\n")
    else:
        _print(record)
    return Outcome(0)


def parse(arguments: list[str]) -> Asked:
    """Take a command line apart.

    Raises:
        ConfigError: an unknown option or one that does not go with the others.
    """
    options, overrides = split("evaluate", arguments, _OPTIONS)
    data = [text for text in overrides if text.partition("=")[0].partition(".")[0] == "data"]
    rows = [text for text in overrides if text.startswith("eval.max_rows=")]
    others = [text for text in overrides if text not in data and text not in rows]
    for name in _TASKS_ONLY:
        require(
            name not in options or "tasks" in options, name, options.get(name), "is for tasks=…", "tasks=NAME"
        )
    for name in ("num_fewshot", "limit", "batch_size"):
        least = 0 if name == "num_fewshot" else 1
        require(
            options.get(name, 1) >= least, name, options.get(name), f"is at least {least}", f"{name}={least}"
        )
    if "tasks" in options:
        require(
            not data and not rows, "tasks", options["tasks"], "tasks bring their own data", "one of the two"
        )
        require(
            all(name.strip() for name in options["tasks"].split(",")),
            "tasks",
            options["tasks"],
            "names tasks of lm-eval, separated by commas",
            "tasks=arc_easy,hellaswag",
        )
    max_rows = None
    for text in rows:
        _, _, value = text.partition("=")
        try:
            max_rows = int(value)
        except ValueError:
            raise ConfigError("eval.max_rows", value, "must be a whole number", "eval.max_rows=64") from None
    return Asked(options, data, others, max_rows)


def _config(frozen: RunConfig, asked: Asked, run_dir: Path) -> RunConfig:
    """The config that the ranks read: the run's, with the layout, rows and data that are asked for."""
    if asked.max_rows is not None:
        frozen.eval.max_rows = asked.max_rows if asked.max_rows > 0 else sys.maxsize
    if not asked.own_data:
        frozen.data = other_data(frozen.data, asked.data)
        frozen.data.tokenizer.path = str(run_dir.absolute() / "tokenizer.json")
    return layout_for(frozen, asked.others)


def other_data(own: DataConfig, overrides: list[str]) -> DataConfig:
    """The run's data section with these overrides; a group (data=text) starts from the group's file."""
    from trainer.compose import apply_overrides, compose

    if not any(text.startswith("data=") for text in overrides):
        return apply_overrides(RunConfig(data=own), overrides).data
    data = compose(overrides).data
    given = {text.partition("=")[0] for text in overrides}
    for name in (
        "respect_documents",
        "cache_dir",
    ):  # how the model was trained, and where this machine has room
        if f"data.{name}" not in given:
            setattr(data, name, getattr(own, name))
    return data


def _job(asked: Asked, config: RunConfig, checkpoint: Checkpoint) -> Job:
    from trainer.inference import Job

    path = str(checkpoint.path)
    if "tasks" in asked.options:
        from trainer.harness import Tasks, require_harness

        o = asked.options
        folder = o.get("include_path")
        tasks = Tasks(
            names=[name.strip() for name in o["tasks"].split(",")],
            include_path=None if folder is None else str(Path(folder).absolute()),
            num_fewshot=o.get("num_fewshot"),
            limit=o.get("limit"),
            batch_size=o.get("batch_size", Tasks.batch_size),
        )
        require_harness(tasks)
        return Job(path, tasks=tasks)
    if asked.own_data:
        return Job(path, own_data=True)
    given = {text.partition("=")[0] for text in asked.data}
    other = "data" in given or bool(given.intersection(_DOCUMENTS))
    whole = other and "data.valid_fraction" not in given
    return Job(path, fraction=1.0 if whole else config.data.valid_fraction)


def _described(config: RunConfig, asked: Asked) -> str:
    if asked.own_data:
        return "held out"
    data = config.data
    return str(data.target or data.path or data.name or data.source.value)


def _keep(path: Path, record: dict[str, Any]) -> None:
    """Add a line; a run that others own can be measured all the same."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        sys.stderr.write(f"{path} cannot be written ({error.strerror}); the result is only shown.\n")


def _print(record: dict[str, Any]) -> None:
    if "tasks" in record:
        lines = [
            (f"{task} {metric}", f"{value:.4g}")
            for task, metrics in record["tasks"].items()
            for metric, value in metrics.items()
        ]
    else:
        rest = "" if record["complete"] else " (eval.max_rows=0 reads all)"
        lines = [
            ("loss", f"{record['loss']:.4f} nats a token"),
            ("perplexity", f"{record['perplexity']:.6g}"),
            ("bits per byte", f"{record['bits_per_byte']:.4f}"),
            ("tokens", f"{record['num_tokens']:,} in {record['num_rows']:,} rows{rest}"),
            ("data", record["data"]),
        ]
    lines.append(("checkpoint", record["checkpoint"]))
    width = max(len(name) for name, _ in lines)
    sys.stdout.write("".join(f"{name:<{width}}  {value}\n" for name, value in lines))
