"""``muster generate`` and ``muster report``: what to do with a run that has trained."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.inference import JobFailed, find_checkpoint, layout_for, perform, split
from launch.outcome import Outcome
from parallel.errors import ConfigError
from trainer.config import require
from trainer.rundir import RunDirectory

_OPTIONS: dict[str, type] = {
    "prompt": str,
    "prompts_file": str,
    "num_samples": int,
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "seed": int,
    "batch_size": int,
    "json": bool,
}


@dataclass
class SamplingOptions:
    """What ``muster generate`` takes as key=value, with its defaults (docs/using.md)."""

    prompt: str = "def "
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    top_k: int = 0
    prompts_file: str | None = None
    num_samples: int = 1
    batch_size: int = 16
    json: bool = False


def generate(argv: list[str]) -> Outcome:
    """``muster generate RUN_DIR|CHECKPOINT [prompt=… temperature=… …] [overrides]``.

    Raises:
        ConfigError: no run or checkpoint is there, or an option is unknown or out of range.
    """
    if not argv:
        raise ConfigError(
            "RUN_DIR", "", "which run or checkpoint?", 'muster generate runs/NAME/ID prompt="def "'
        )
    options, overrides = parse_options(argv[1:])
    prompts = read_prompts(options)
    checkpoint = find_checkpoint(Path(argv[0]))
    from trainer.build import run_of
    from trainer.compose import load_frozen
    from trainer.draws import Sampling
    from trainer.inference import Job

    config = layout_for(load_frozen(run_of(checkpoint) / "config.yaml"), overrides)
    o = options
    job = Job(
        checkpoint=str(checkpoint.path),
        prompts=[prompt for prompt in prompts for _ in range(o.num_samples)],
        sampling=Sampling(o.max_new_tokens, o.temperature, o.top_p, o.top_k, o.seed),
        batch_size=o.batch_size,
    )
    try:
        _show(perform(job, config, checkpoint), o)
    except JobFailed as failed:
        return failed.outcome
    return Outcome(0, "")


def parse_options(arguments: list[str]) -> tuple[SamplingOptions, list[str]]:
    """Options and overrides of the run's config; an option's value is taken as it is, spaces included.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    found, overrides = split("generate", arguments, _OPTIONS)
    options = SamplingOptions(**found)
    if "prompt" in found and "prompts_file" in found:
        raise ConfigError("prompts_file", options.prompts_file, "prompt is given too", "one of the two")
    limits = {
        "max_new_tokens": (options.max_new_tokens >= 1, "must be above 0", "64"),
        "num_samples": (options.num_samples >= 1, "must be above 0", "1"),
        "batch_size": (options.batch_size >= 1, "must be above 0", "16"),
        "temperature": (
            options.temperature >= 0,
            "must not be negative (0: always the likeliest token)",
            "0.8",
        ),
        "top_p": (0 < options.top_p <= 1, "must be in (0, 1]", "0.95"),
        "top_k": (options.top_k >= 0, "must not be negative (0: draw among all tokens)", "0"),
    }
    for key, (holds, relation, value) in limits.items():
        require(holds, key, getattr(options, key), relation, f"{key}={value}")
    return options, overrides


def read_prompts(options: SamplingOptions) -> list[str]:
    """The prompt, or those of a file: a line each, or of ``.jsonl`` the field ``prompt`` of each object.

    Raises:
        ConfigError: the file cannot be read or holds no prompt.
    """
    if options.prompts_file is None:
        return [options.prompt]
    path = Path(options.prompts_file)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            lines = [str(json.loads(line)["prompt"]) for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompts_file", path, f"cannot be read: {error}", "a text file") from None
    except (ValueError, KeyError, TypeError):
        fix = 'lines like {"prompt": "def main("}'
        raise ConfigError(
            "prompts_file", path, "each line must be a JSON object with a prompt", fix
        ) from None
    require(bool(lines), "prompts_file", path, "holds no prompt", "a prompt a line")
    return lines


def _show(texts: list[dict[str, Any]], options: SamplingOptions) -> None:
    """Each text after its prompt; several under a line that counts them, or as JSON a line each."""
    for number, text in enumerate(texts):
        if options.json:
            sample = number % options.num_samples
            line = {"prompt": text["prompt"], "sample": sample, **text}
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            continue
        if len(texts) > 1:
            sys.stdout.write(f"──── {number + 1} of {len(texts)}\n")
        sys.stdout.write(f"{text['prompt']}{text['text']}\n")


def report(argv: list[str]) -> Outcome:
    """``muster report RUN_DIR``: write report.html again and print its path.

    Raises:
        ConfigError: no run is there.
    """
    if len(argv) != 1:
        raise ConfigError("RUN_DIR", " ".join(argv), "one run directory", "muster report runs/NAME/ID")
    run = RunDirectory.open(Path(argv[0]))
    from trainer.metrics.report import write_report

    return Outcome(0, str(write_report(run.path)))
