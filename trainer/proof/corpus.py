"""Text and target masks of a proof: made up, the same for every party, uneven on purpose."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from trainer.bits import mix64
from trainer.config import DataConfig
from trainer.data.batch import IGNORED, Batch

_WORDS = "expert token router gate rank shard mesh batch loss step norm clip sum seed row".split()


def documents(data: DataConfig) -> Iterator[dict[str, str]]:
    """Short documents of random words, so that a packed row holds several."""
    chance = random.Random(0)
    for number in range(160):
        words = chance.choices(_WORDS, k=chance.randint(3, 60))
        yield {"name": str(number), "text": " ".join(words)}


def mask_targets(batch: Batch) -> Batch:
    """Ignore between a tenth and nine tenths of a row's targets, by its sample id: no two ranks count alike."""
    length = batch.targets.shape[1]
    place = batch.sample_ids[:, None] * length + torch.arange(length)
    share = (mix64(batch.sample_ids + 1) & 7).to(torch.float64) / 10 + 0.1
    drawn = (mix64(place) & 0xFFFF).to(torch.float64) / 0x10000
    targets = batch.targets.masked_fill(drawn < share[:, None], IGNORED)
    return Batch(batch.tokens, targets, batch.document_ids, batch.sample_ids)
