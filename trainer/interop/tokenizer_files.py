"""The tokenizer of a model's folder, and the small files that stand beside its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.data.tokenizer import TextTokenizer

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
)
"""What import keeps of a model's folder, and export gives back."""


def keep_side_files(source: Path, folder: Path) -> None:
    """Copy the small files of a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def import_tokenizer(source: Path, config: RunConfig) -> TextTokenizer:
    """The tokenizer of a model's folder, or the one that ``data.tokenizer.path`` names.

    Raises:
        ConfigError: there is none, or it has more tokens than the model.
    """
    given = config.data.tokenizer.path
    path = source / "tokenizer.json" if given is None else Path(given)
    if given is None and not path.is_file():
        raise ConfigError(
            "HF_DIR",
            source,
            "holds no tokenizer.json",
            "data.tokenizer.path=FILE, or save it there: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        )
    tokenizer = TextTokenizer.load(path, "HF_DIR" if given is None else "data.tokenizer.path")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "data.tokenizer.path",
            path,
            f"has {tokenizer.vocab_size} tokens, the model only {config.model.vocab_size}",
            "give the tokenizer that belongs to the model",
        )
    return tokenizer


def write_tokenizer(run_dir: Path, origin: Path | None, folder: Path) -> dict[str, Any]:
    """Put a run's tokenizer beside an exported model; returns the token ids for ``config.json``.

    Args:
        origin: files of the model that the run began from, where there was one; its own tokenizer files are
            given back as they were if the run still uses that tokenizer.

    Raises:
        ConfigError: the run has no tokenizer.
    """
    tokenizer = TextTokenizer.load(run_dir / "tokenizer.json", "RUN_DIR")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos}
    if origin is not None and _is_same(origin / "tokenizer.json", tokenizer):
        for name in SIDE_FILES:
            if name != "config.json" and (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
        kept = json.loads((origin / "config.json").read_text(encoding="utf-8"))
        ids = {name: kept[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in kept}
    else:
        tokenizer.save(folder / "tokenizer.json")
    eos = tokenizer.name_of(tokenizer.eos)
    if not (folder / "tokenizer_config.json").is_file():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos}
        _write(folder / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})
    if not (folder / "generation_config.json").is_file():
        stop = {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos, "do_sample": True}
        _write(folder / "generation_config.json", {**stop, "temperature": 0.8, "top_p": 0.95})
    return ids


def _is_same(path: Path, tokenizer: TextTokenizer) -> bool:
    return path.is_file() and TextTokenizer.load(path).to_json() == tokenizer.to_json()


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
