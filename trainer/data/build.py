"""The build behind ``prepare``: two passes over a source, one for the tokenizer and one for the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.data.domains import DomainWriter
from trainer.data.packing import Packer, RowWriter
from trainer.data.sources import Document, DocumentSource
from trainer.data.tokenizer import TextTokenizer

__all__ = ["Limits", "build_corpus"]

_BATCH_CHARACTERS = 2**20
_TOKENIZER_CHARACTERS = 2**26


@dataclass(frozen=True)
class Limits:
    """How far to read a stream that has no practical end. None: to the end."""

    tokenizer_documents: int | None = None
    """Training documents that the tokenizer learns from."""
    valid_rows: int | None = None
    """Held-out rows after which reading stops; the training rows are counted but not kept."""


def build_corpus(
    folder: Path, config: RunConfig, source: DocumentSource, tokenizer: TextTokenizer | None, limits: Limits
) -> dict[str, Any]:
    """Write tokenizer, rows and unigram counts into a folder; returns what ``meta.json`` says of them.

    Raises:
        ConfigError: a document cannot be read, or a side of the split does not fill a row.
    """
    num_seen = 0
    if tokenizer is None:
        texts, num_seen = _tokenizer_texts(source, config.data.valid_fraction, limits)
        tokenizer = TextTokenizer.train(texts, config.data.tokenizer.vocab_size)
        del texts
    tokenizer.save(folder / "tokenizer.json")
    streamed = limits.valid_rows is not None
    train = _Side(None if streamed else folder / "train.arrow", config.train.seq_len, tokenizer.vocab_size)
    domains = DomainWriter(folder, config.train.seq_len)
    valid = _Side(folder / "valid.arrow", config.train.seq_len, tokenizer.vocab_size, domains)
    num_documents, draws = 0, (1.0, 0.0)
    for documents in _batches(source.documents()):
        num_documents += len(documents)
        for document in documents:
            draws = min(draws[0], document.draw), max(draws[1], document.draw)
        for side, held_out in ((train, False), (valid, True)):
            side.add([d for d in documents if (d.draw < config.data.valid_fraction) is held_out], tokenizer)
        if limits.valid_rows is not None and valid.num_rows >= limits.valid_rows and train.num_rows:
            break
    if num_documents == 0 or (num_documents < num_seen and not streamed):
        raise _unsteady(config, num_seen, num_documents)
    for side, name in ((train, "training"), (valid, "held-out")):
        if side.num_rows == 0:
            raise _too_small(config, side, name, num_documents, draws)
        side.close()
    np.save(folder / "unigram.npy", train.counts)
    return {"bytes_per_token": valid.num_bytes / valid.num_tokens}


class _Side:
    """One side of the split on its way to disk."""

    def __init__(
        self, path: Path | None, seq_len: int, vocab_size: int, domains: DomainWriter | None = None
    ) -> None:
        self._packer = Packer(seq_len)
        self._domains = domains
        self._writer = None if path is None else RowWriter(path, seq_len, vocab_size)
        self.counts = np.zeros(vocab_size, np.int64)
        """Of the rows' targets."""
        self.num_documents = self.num_bytes = self.num_tokens = self.num_rows = 0

    def add(self, documents: list[Document], tokenizer: TextTokenizer) -> None:
        if not documents:
            return
        tokens = tokenizer.encode_documents([document.text for document in documents])
        rows = self._packer.push(tokens)
        self.counts += np.bincount(rows[:, 1:].reshape(-1), minlength=len(self.counts))
        self.num_documents += len(documents)
        self.num_bytes += sum(len(document.text.encode()) for document in documents)
        self.num_tokens += sum(map(len, tokens))
        self.num_rows += len(rows)
        if self._writer is not None:
            self._writer.write(rows)
        if self._domains is not None:
            self._domains.add([document.domain for document in documents], list(map(len, tokens)))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._domains is not None:
            self._domains.close()


def _tokenizer_texts(source: DocumentSource, valid_fraction: float, limits: Limits) -> tuple[list[str], int]:
    """The first training documents, up to 64 Mi characters, and how many documents were read for them."""
    texts: list[str] = []
    characters = num_seen = 0
    for document in source.documents():
        num_seen += 1
        if document.draw >= valid_fraction:
            texts.append(document.text)
            characters += len(document.text)
        if characters >= _TOKENIZER_CHARACTERS or len(texts) == limits.tokenizer_documents:
            break
    return texts, num_seen


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches of about a million characters: enough for the tokenizer's threads, little to hold."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _described(config: RunConfig) -> tuple[str, object]:
    """The config field that says where the documents come from, and its value."""
    data = config.data
    if data.target is not None:
        return "data.target", data.target
    for name in ("path", "name"):
        if getattr(data, name) is not None:
            return f"data.{name}", getattr(data, name)
    return "data.source", data.source.value


def _unsteady(config: RunConfig, first: int, second: int) -> ConfigError:
    field, value = _described(config)
    if first == 0:
        return ConfigError(field, value, "holds no document with any text", "name a corpus with text in it")
    return ConfigError(
        field,
        value,
        f"gave {first} documents when read first and {second} when read again",
        "leave the files alone while they are read; a data.target must return all documents on every call",
    )


def _too_small(
    config: RunConfig, side: _Side, name: str, num_documents: int, draws: tuple[float, float]
) -> ConfigError:
    _, value = _described(config)
    fraction, seq_len = config.data.valid_fraction, config.train.seq_len
    if side.num_documents == 0:
        lowest, highest = math.floor(draws[0] * 100 + 1) / 100, math.floor(draws[1] * 100) / 100
        fitting = lowest if name == "held-out" else highest
        possible = num_documents > 1 and draws[0] < fitting <= draws[1]
        return ConfigError(
            "data.valid_fraction",
            fraction,
            f"none of the {num_documents} document(s) of {value} falls on the {name} side",
            f"data.valid_fraction={fitting}" if possible else "give more documents",
        )
    fix = (
        "give more text"
        if side.num_tokens < 2
        else f"train.seq_len={side.num_tokens - 1} or less, or more text"
    )
    return ConfigError(
        "train.seq_len",
        seq_len,
        f"the {name} side of {value} has {side.num_tokens} tokens, less than one row of {seq_len} + 1",
        fix if name == "training" else f"{fix}, or a data.valid_fraction above {fraction}",
    )
