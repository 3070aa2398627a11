"""How well a model predicts text: the loss on packed rows, and log-likelihoods of single texts.

All of it is collective: the ranks share the rows out and make as many calls of the model as each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from trainer.checkpoint.resume import Checkpoint
from trainer.config import RunConfig, Source
from trainer.data.batch import IGNORED, Batch, make_batch
from trainer.data.hub import HubSource
from trainer.data.loader import valid_batches
from trainer.data.packing import Packer
from trainer.data.prepare import PreparedData, prepare_data
from trainer.data.sources import open_source
from trainer.data.tokenizer import TextTokenizer
from trainer.generation import dropless, evaluating
from trainer.models.transformer import Losses
from trainer.ranks import Ranks, idle


@dataclass(frozen=True)
class Perplexity:
    """Attributes:
    loss: nats a target token.
    perplexity: e to the loss.
    bits_per_byte: the loss over ln 2 and the UTF-8 bytes of the text a token: comparable between tokenizers.
    num_tokens: targets counted.
    num_rows: packed rows read.
    complete: whether these are all rows there are.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    num_rows: int
    complete: bool


def held_out_loss(
    model: nn.Module, prepared: PreparedData, config: RunConfig, device: torch.device
) -> Perplexity:
    """On the run's own held-out rows: those, and in batches as, ``loss/valid`` is of. Collective."""
    ranks = Ranks()
    batches = valid_batches(prepared, config, ranks.rank, ranks.size)
    total, num_tokens = _summed(model, batches, config, device, ranks)
    num_rows = min(len(prepared.valid), config.eval.max_rows)
    everything = num_rows == len(prepared.valid) and prepared.hub is None
    return _perplexity(total, num_tokens, prepared.bytes_per_token, num_rows, everything)


def own_data(checkpoint: Checkpoint, config: RunConfig, tokenizer: TextTokenizer) -> PreparedData:
    """The data that the run was trained on, prepared again if its cache is gone.

    Raises:
        ConfigError: it cannot be had, or is another by now: then other rows would be held out.
    """
    prepared = prepare_data(config)
    trained_on = checkpoint.trainer.get("loader", {}).get("fingerprint", prepared.fingerprint)
    streamed = prepared.hub is not None  # there the fingerprint depends on how many rows are read
    if prepared.tokenizer.to_json() != tokenizer.to_json() or (
        trained_on != prepared.fingerprint and not streamed
    ):
        raise ConfigError(
            "data",
            config.data.path or config.data.name or config.data.source.value,
            "is not any more what this run was trained on: its text, split or tokenizer differs",
            "bring it back as it was, or name data to evaluate on (data=text data.path=…)",
        )
    return prepared


def documents_loss(
    model: nn.Module, tokenizer: TextTokenizer, config: RunConfig, fraction: float, device: torch.device
) -> Perplexity:
    """On the documents of ``config.data`` whose draw is below ``fraction`` (1: all), packed in their order.

    The last row is filled up, so that every token but the first is predicted once. Collective.

    Raises:
        ConfigError: there is nothing to read, or no text in it.
    """
    ranks = Ranks()
    rows = _DocumentRows(config, tokenizer, fraction)
    total, num_tokens = _summed(model, _dealt(rows, config, tokenizer.eos, ranks), config, device, ranks)
    if not rows.num_rows:
        value = config.data.path or config.data.name or config.data.source.value
        raise ConfigError("data", value, "holds no text to evaluate on", "name a corpus with text in it")
    return _perplexity(total, num_tokens, rows.num_bytes / rows.num_tokens, rows.num_rows, rows.complete)


class _DocumentRows:
    """Rows of a corpus in its own order, ``[S + 1]`` each, with the number of targets in them that are real."""

    def __init__(self, config: RunConfig, tokenizer: TextTokenizer, fraction: float) -> None:
        # A source that divides a single file does so by this share.
        data = replace(config.data, valid_fraction=fraction)
        hub = data.source is Source.hub and data.target is None
        self._documents = (HubSource(data) if hub else open_source(data)).documents()
        self._tokenizer, self._fraction = tokenizer, fraction
        self._max_rows, self._seq_len = config.eval.max_rows, config.train.seq_len
        self.num_bytes = self.num_tokens = self.num_rows = 0
        self.complete = False

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        for row, num_targets in self._rows():
            if self.num_rows == self._max_rows:
                return
            self.num_rows += 1
            yield row, num_targets
        self.complete = True

    def _rows(self) -> Iterator[tuple[np.ndarray, int]]:
        packer = Packer(self._seq_len)
        for document in self._documents:
            if not document.text or (document.draw >= self._fraction and self._fraction < 1.0):
                continue
            (tokens,) = self._tokenizer.encode_documents([document.text])
            self.num_bytes += len(document.text.encode())
            self.num_tokens += len(tokens)
            for row in packer.push([tokens]):
                yield row, self._seq_len
        rest = packer.carry
        if len(rest) > 1:
            row = np.full(self._seq_len + 1, self._tokenizer.eos, np.int32)
            row[: len(rest)] = rest
            yield row, len(rest) - 1


def _dealt(rows: _DocumentRows, config: RunConfig, eos: int, ranks: Ranks) -> Iterator[Batch]:
    """This rank's micro-batches; every rank reads all documents and has the same number of batches."""
    micro = config.train.micro_batch
    group: list[tuple[np.ndarray, int]] = []
    padding = np.full(config.train.seq_len + 1, eos, np.int32), 0

    def batch() -> Batch:
        filled = group + [padding] * (micro * ranks.size - len(group))
        mine = filled[ranks.rank :: ranks.size]
        made = make_batch(
            np.stack([row for row, _ in mine]), np.arange(micro), eos, config.data.respect_documents
        )
        for index, (_, num_targets) in enumerate(mine):
            made.targets[index, num_targets:] = IGNORED
        return made

    for row in rows:
        group.append(row)
        if len(group) == micro * ranks.size:
            yield batch()
            group.clear()
    if group:
        yield batch()


@torch.no_grad()
def _summed(
    model: nn.Module, batches: Iterator[Batch], config: RunConfig, device: torch.device, ranks: Ranks
) -> tuple[float, int]:
    """Σ −log p over all ranks' targets, and their number."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = 0
    with evaluating(model):
        for batch in batches:
            num_targets += int(batch.num_targets)
            here = batch.to(device)
            documents = here.document_ids if config.data.respect_documents else None
            found = model(here.tokens, here.targets, documents)
            total += (found.cross_entropy if isinstance(found, Losses) else found).double()
    loss, count = ranks.sum(float(total), num_targets)
    return loss, int(count)


def _perplexity(
    total: float, num_tokens: int, bytes_per_token: float, num_rows: int, complete: bool
) -> Perplexity:
    loss = total / max(1, num_tokens)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Perplexity(loss, perplexity, loss / math.log(2) / bytes_per_token, num_tokens, num_rows, complete)


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    context: int,
    device: torch.device,
    batch_size: int = 16,
) -> list[tuple[float, bool]]:
    """log p (nats) of each continuation after its context, and whether it is the likeliest at every token.

    Args:
        pairs: (tokens before, tokens to predict), at least one each. Where both are longer than ``context``
            + 1, the oldest are left out.
        context: the longest window that the model reads.

    Returns:
        In the order of ``pairs``, on every rank. Collective.
    """
    ranks = Ranks()
    longest_first = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    mine = ranks.share([pairs[index] for index in longest_first])
    found: list[tuple[float, bool]] = []
    with dropless(model), evaluating(model):
        for start in range(0, -(-len(pairs) // ranks.size), batch_size):
            part = mine[start : start + batch_size]
            if part:
                found += _score(model, part, context, device)
            else:
                idle(model, device)
    whole = dict(zip(longest_first, ranks.join(found, len(pairs)), strict=True))
    return [whole[index] for index in range(len(pairs))]


def _score(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], context: int, device: torch.device
) -> list[tuple[float, bool]]:
    windows = [(before + after)[-context - 1 :] for before, after in pairs]
    width = max(map(len, windows)) - 1
    tokens = torch.tensor([window[:-1] + [0] * (width + 1 - len(window)) for window in windows])
    logits_BSV = model(tokens.to(device))
    answers = []
    for (_, after), window, logits_SV in zip(pairs, windows, logits_BSV, strict=True):
        end = len(window) - 1
        wanted = torch.tensor(after[-end:], device=device)
        answers.append(_log_likelihood(logits_SV[end - len(wanted) : end], wanted))
    values, greedy = torch.stack(answers).unbind(1)
    return list(zip(values.tolist(), [bool(flag) for flag in greedy.tolist()], strict=True))


def _log_likelihood(logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
    """``[2]``: log p of the tokens, and 1 where they are the likeliest; no host sync."""
    chosen = logits_NV.float().log_softmax(-1).gather(-1, wanted_N[:, None])
    greedy = (logits_NV.argmax(-1) == wanted_N).all()
    return torch.stack([chosen.double().sum(), greedy.double()])
