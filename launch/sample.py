"""``muster generate`` and ``muster report``: what to do with a run that has trained."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from launch.outcome import Outcome
from parallel.errors import ConfigError
from trainer.rundir import RunDirectory


@dataclass
class SamplingOptions:
    """What ``muster generate`` takes as key=value, with its defaults."""

    prompt: str = "def "
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


def generate(argv: list[str]) -> Outcome:
    """``muster generate RUN_DIR|CHECKPOINT [prompt=… max_new_tokens=… temperature=… top_p=… seed=…]``.

    Raises:
        ConfigError: no run or checkpoint is there, or an option is unknown or out of range.
    """
    if not argv:
        raise ConfigError(
            "RUN_DIR", "", "which run or checkpoint?", 'muster generate runs/NAME/ID prompt="def "'
        )
    path = Path(argv[0])
    if not (path / "manifest.json").is_file():
        path = RunDirectory.open(path).path
    options = parse_options(argv[1:])
    from trainer.generation import generate_text

    text = generate_text(
        path, options.prompt, options.max_new_tokens, options.temperature, options.top_p, options.seed
    )
    sys.stdout.write(options.prompt + text + "\n")
    return Outcome(0, "")


def parse_options(arguments: list[str]) -> SamplingOptions:
    """Read key=value pairs; the value is taken as it is, spaces included."""
    kinds: dict[str, type] = {
        "prompt": str,
        "max_new_tokens": int,
        "temperature": float,
        "top_p": float,
        "seed": int,
    }
    options = SamplingOptions()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in kinds:
            near = difflib.get_close_matches(key.lstrip("-"), kinds, n=1, cutoff=0.5)
            fix = (
                f"did you mean {near[0]}=…"
                if near
                else "one of " + ", ".join(f"{f.name}=…" for f in fields(options))
            )
            raise ConfigError(key, value, "is no option of `muster generate`", fix)
        try:
            setattr(options, key, kinds[key](value))
        except ValueError:
            what = "a whole number" if kinds[key] is int else "a number"
            raise ConfigError(key, value, f"must be {what}", f"{key}={getattr(options, key)}") from None
    limits = {
        "max_new_tokens": (options.max_new_tokens >= 1, "must be above 0", "64"),
        "temperature": (
            options.temperature >= 0,
            "must not be negative (0: always the likeliest token)",
            "0.8",
        ),
        "top_p": (0 < options.top_p <= 1, "must be in (0, 1]", "0.95"),
    }
    for key, (holds, relation, value) in limits.items():
        if not holds:
            raise ConfigError(key, getattr(options, key), relation, f"{key}={value}")
    return options


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
