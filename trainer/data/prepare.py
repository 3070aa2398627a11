"""Text to packed rows, once: tokenizer, train and valid rows and their statistics, cached by fingerprint.

The cache is a folder ``<data.cache_dir>/data/<fingerprint>/`` with ``tokenizer.json``, ``train.arrow``,
``valid.arrow``, ``valid_domains.arrow``, ``domains.json``, ``unigram.npy`` and ``meta.json``. It is built in a
folder aside under a file lock and renamed when complete, so several processes may ask at once (one builds, the
others wait) and a build that was killed is never used. ``meta.json`` holds the size of every file; a cache that
disagrees with it, or does not open, is built again. For ``data=hub`` the training rows are not there: they are
streamed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import tokenizers
import xxhash

from parallel.errors import ConfigError
from trainer.config import DataConfig, RunConfig, Source
from trainer.data.batch import IGNORED, row_targets
from trainer.data.build import Limits, build_corpus
from trainer.data.domains import Domains
from trainer.data.hub import HubSource
from trainer.data.order import evaluation_rows
from trainer.data.packing import Rows
from trainer.data.sources import DocumentSource, open_source
from trainer.data.tokenizer import TextTokenizer

__all__ = ["PreparedData", "prepare_data"]

_FORMAT = 2
"""Raise when the same input would give other rows, or other files of the cache."""

_HUB_TOKENIZER_DOCUMENTS = 10_000


@dataclass(frozen=True)
class PreparedData:
    """What training needs of a corpus.

    Attributes:
        tokenizer: text to ids and back.
        vocab_size: the tokenizer's.
        train: the packed training rows; None where they are streamed.
        hub: the stream, for ``data=hub``; else None.
        valid: the packed held-out rows.
        domains: of the held-out rows that evaluation reads.
        unigram_loss: nats a target of the rows that evaluation reads, under the unigram distribution of the
            training rows' targets with one added to each count: what a model without context can reach.
        bytes_per_token: UTF-8 bytes of held-out text a token, eos counted: loss / (ln 2 · this) is bits a
            byte.
        num_train_rows: None where they are streamed.
        num_valid_rows: all that were held out; evaluation reads ``eval.max_rows`` of them.
        fingerprint: hex; equal if and only if rows and tokenizer are.
    """

    tokenizer: TextTokenizer
    vocab_size: int
    train: Rows | None
    hub: HubSource | None
    valid: Rows
    domains: Domains
    unigram_loss: float
    bytes_per_token: float
    num_train_rows: int | None
    num_valid_rows: int
    fingerprint: str


def prepare_data(config: RunConfig) -> PreparedData:
    """Read, split, tokenise and pack the corpus of a resolved config, or open it where that is done already.

    Every process of a run may call this at the same time.

    Raises:
        ConfigError: the input cannot be used (the message names the file and the place), it is too small,
            or the cache cannot be written.
    """
    data = config.data
    tokenizer = TextTokenizer.load(data.tokenizer.path) if data.tokenizer.path is not None else None
    hub = HubSource(data) if data.source is Source.hub and data.target is None else None
    source = hub or open_source(data)
    fingerprint = _fingerprint(config, source, streamed=hub is not None)
    folder = Path(data.cache_dir).expanduser() / "data" / fingerprint
    prepared = _open_cache(folder, config, hub)
    if prepared is None:
        _build_cache(folder, config, source, tokenizer, hub)
        prepared = _open_cache(folder, config, hub)
        assert prepared is not None, f"{folder} does not open although it was just built"
    if 0 <= config.model.vocab_size < prepared.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"must hold the tokenizer's {prepared.vocab_size} tokens",
            f"model.vocab_size={prepared.vocab_size}, or -1",
        )
    return prepared


def _fingerprint(config: RunConfig, source: DocumentSource, streamed: bool) -> str:
    data = config.data
    path = data.tokenizer.path
    parts = {
        "format": _FORMAT,
        "source": source.identity(),
        "tokenizer": data.tokenizer.vocab_size
        if path is None
        else xxhash.xxh3_128_hexdigest(Path(path).read_bytes()),
        "tokenizers": tokenizers.__version__,
        "seq_len": config.train.seq_len,
        "valid_fraction": data.valid_fraction,
        "max_rows": config.eval.max_rows if streamed else None,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _open_cache(folder: Path, config: RunConfig, hub: HubSource | None) -> PreparedData | None:
    """The prepared data, or None where the cache is missing, incomplete or does not open."""
    seq_len = config.train.seq_len
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        if any((folder / name).stat().st_size != size for name, size in meta["files"].items()):
            return None
        tokenizer = TextTokenizer.load(folder / "tokenizer.json")
        train = None if hub is not None else Rows(folder / "train.arrow", seq_len)
        valid = Rows(folder / "valid.arrow", seq_len)
        domains = Domains(folder, seq_len, evaluation_rows(len(valid), config.eval.max_rows))
        counts = np.load(folder / "unigram.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError):  # Arrow's errors and ConfigError are ValueErrors
        return None
    return PreparedData(
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        train=train,
        hub=hub,
        valid=valid,
        domains=domains,
        unigram_loss=_unigram_loss(counts, valid, tokenizer.eos, config),
        bytes_per_token=meta["bytes_per_token"],
        num_train_rows=None if train is None else len(train),
        num_valid_rows=len(valid),
        fingerprint=folder.name,
    )


def _unigram_loss(counts: np.ndarray, valid: Rows, eos: int, config: RunConfig) -> float:
    rows = valid[evaluation_rows(len(valid), config.eval.max_rows)]
    targets = row_targets(rows, eos, config.data.respect_documents)
    log_probability = np.log(counts + 1.0) - np.log(counts.sum() + len(counts))
    return float(-log_probability[targets[targets != IGNORED]].mean())


def _build_cache(
    folder: Path,
    config: RunConfig,
    source: DocumentSource,
    tokenizer: TextTokenizer | None,
    hub: HubSource | None,
) -> None:
    """Build the folder unless another process did so while this one waited for the lock."""
    limits = Limits()
    if hub is not None:
        limits = Limits(tokenizer_documents=_HUB_TOKENIZER_DOCUMENTS, valid_rows=config.eval.max_rows)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_suffix(".lock")):
            if _open_cache(folder, config, hub) is not None:
                return
            # Whoever left this behind is dead: it held the lock.
            aside = folder.with_suffix(".building")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                identity = source.identity()
                meta = build_corpus(aside, config, source, tokenizer, limits)
                if source.identity() != identity:
                    raise _changed(config.data)
                _seal(aside, meta)
                if folder.exists():
                    shutil.rmtree(folder)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            "data.cache_dir",
            config.data.cache_dir,
            f"the prepared data cannot be written there ({error.strerror or error})",
            "free some space or name another folder (data.cache_dir=… or the variable MUSTER_CACHE)",
        ) from error


def _seal(folder: Path, meta: dict[str, Any]) -> None:
    """Bring every file to the disk, then name them and their sizes in ``meta.json``."""
    paths = sorted(folder.iterdir())
    meta["files"] = {path.name: path.stat().st_size for path in paths}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in [*paths, folder / "meta.json"]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _changed(data: DataConfig) -> ConfigError:
    return ConfigError(
        "data.path", data.path, "the files changed while they were read", "start again when they are complete"
    )
