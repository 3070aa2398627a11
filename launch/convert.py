"""``muster import`` and ``muster export``: Hugging Face checkpoints ↔ Muster checkpoints."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.outcome import Outcome
from parallel.errors import ConfigError

_SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


def _flag(value: str) -> bool:
    return {"true": True, "false": False}[value.lower()]


def _positive(value: str) -> float:
    number = float(value)
    if not number > 0:
        raise ValueError(value)
    return number


def _size(value: str) -> int:
    match = re.fullmatch(r"(\d+)(MB|GB|TB)", value)
    if match is None or int(match[1]) == 0:
        raise ValueError(value)
    return int(match[1]) * _SIZES[match[2]]


def _dtype(value: str) -> str:
    if value not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(value)
    return value


Option = tuple[Callable[[str], Any], Any, str]
"""How to read it, its default, what it must be."""

IMPORT: dict[str, Option] = {
    "verify": (_flag, True, "true or false"),
    "tolerance": (_positive, 1e-5, "a number above 0"),
    "drop": (lambda value: value.split(","), [], "patterns of tensor names, with commas between them"),
}
EXPORT: dict[str, Option] = {
    "verify": IMPORT["verify"],
    "tolerance": IMPORT["tolerance"],
    "dtype": (_dtype, "auto", "auto, fp32, bf16 or fp16"),
    "shard_size": (_size, 5 * 10**9, "a size such as 500MB or 5GB"),
}


def import_(argv: list[str]) -> Outcome:
    """``muster import HF_DIR OUT [verify=false] [drop=PATTERN,…] [tolerance=1e-5] [overrides]``.

    Raises:
        ConfigError: the model, an option or an override cannot be used.
    """
    if len(argv) < 2 or "=" in argv[1]:
        raise ConfigError(
            "HF_DIR OUT", " ".join(argv), "which model, to where?", "muster import HF_DIR RUN_DIR"
        )
    source, target = Path(argv[0]), Path(argv[1])
    own = [argument for argument in argv[2:] if argument.partition("=")[0] in IMPORT]
    options = parse_options(own, IMPORT, "import")
    from trainer.interop.families import family_of, read_fields
    from trainer.interop.hf_config import HfConfig
    from trainer.interop.hf_import import import_model

    hf = HfConfig.load(source)
    family = family_of(hf)
    fields = read_fields(family, hf)
    overrides = [argument for argument in argv[2:] if argument not in own]
    done = import_model(source, target, hf, family, fields, overrides, **options)
    return Outcome(
        0,
        f"{target}: {family.model_type}, {done.num_parameters:,} parameters in {done.num_tensors:,} tensors; "
        f"{_compared(done.verification)}.\nTrain it with your data:\n  muster resume {target} train.steps=1000 "
        f"data.source=text data.path=FILES\n  muster train --config-dir {target}/conf model=imported data=text "
        "data.path=FILES",
    )


def export(argv: list[str]) -> Outcome:
    """``muster export RUN_DIR|CHECKPOINT HF_DIR [dtype=…] [shard_size=…] [verify=false] [tolerance=1e-5]``.

    Raises:
        ConfigError: the run, the folder or an option cannot be used.
    """
    if len(argv) < 2 or "=" in argv[1]:
        raise ConfigError(
            "RUN_DIR HF_DIR", " ".join(argv), "which run, to where?", "muster export runs/NAME/ID HF_DIR"
        )
    path, target = Path(argv[0]), Path(argv[1])
    options = parse_options(argv[2:], EXPORT, "export")
    if not (path / "manifest.json").is_file():
        from trainer.rundir import RunDirectory

        path = RunDirectory.open(path).path
    from trainer.interop.hf_export import export_model

    shard_bytes = options.pop("shard_size")
    done = export_model(path, target, shard_bytes=shard_bytes, **options)
    return Outcome(
        0,
        f"{target}: {done.family}, {done.num_parameters:,} parameters in {done.num_tensors:,} tensors; "
        f"{_compared(done.verification)}.",
    )


def _compared(found: dict[str, Any] | None) -> str:
    if found is None:
        return "logits not compared (verify=false)"
    return f"logits equal those of transformers to {found['relative']:.1e} of the largest"


def parse_options(arguments: list[str], options: dict[str, Option], command: str) -> dict[str, Any]:
    """Read key=value pairs over the defaults.

    Raises:
        ConfigError: an unknown key, or a value that it cannot have.
    """
    found = {key: default for key, (_, default, _) in options.items()}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in options:
            near = difflib.get_close_matches(key.lstrip("-"), options, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]}=…" if near else "one of " + ", ".join(f"{k}=…" for k in options)
            raise ConfigError(key, value, f"is no option of `muster {command}`", fix)
        read, default, relation = options[key]
        try:
            found[key] = read(value)
        except (ValueError, KeyError):
            shown = str(default).lower() if isinstance(default, bool) else default
            raise ConfigError(key, value, f"must be {relation}", f"{key}={shown}") from None
    return found
