"""One micro-batch, and how it is made from packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["IGNORED", "Batch", "make_batch", "row_targets"]

IGNORED = -100
"""The target that no loss counts (the default ``ignore_index`` of ``torch.nn.functional.cross_entropy``)."""


@dataclass(frozen=True)
class Batch:
    """B packed rows of S tokens.

    Attributes:
        tokens: [B, S] int64, the model's input.
        targets: [B, S] int64, the next token at each position, or ``IGNORED``.
        document_ids: [B, S] int32, counted from 0 in each row; equal where two positions belong to one
            document. The model masks by it only where ``data.respect_documents`` is on.
        sample_ids: [B] int64, the place of each row in the order of training; -1 for padding rows.
    """

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor
    sample_ids: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            document_ids=self.document_ids.to(device),
            sample_ids=self.sample_ids.to(device),
        )

    @property
    def num_targets(self) -> Tensor:
        """Targets that count, 0-dim int64 on the batch's device (no host sync)."""
        return (self.targets != IGNORED).sum()


def row_targets(rows: np.ndarray, eos: int, respect_documents: bool) -> np.ndarray:
    """Targets of rows [B, S+1]: [B, S] int64.

    With ``respect_documents`` the first token of a document is nobody's target: only the end-of-text
    token of the document before stands in front of it.
    """
    targets = rows[:, 1:].astype(np.int64)
    if respect_documents:
        targets[rows[:, :-1] == eos] = IGNORED
    return targets


def make_batch(rows: np.ndarray, sample_ids: np.ndarray, eos: int, respect_documents: bool) -> Batch:
    """A batch of rows [B, S+1]. A negative sample id marks padding: all its targets are ignored."""
    import torch  # here, so that data can be prepared, and its mistakes told, without it

    tokens = rows[:, :-1].astype(np.int64)
    targets = row_targets(rows, eos, respect_documents)
    targets[sample_ids < 0] = IGNORED
    # A document ends with its eos token, so the tokens after the n-th eos belong to document n.
    ends = tokens == eos
    document_ids = (np.cumsum(ends, axis=1) - ends).astype(np.int32)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        document_ids=torch.from_numpy(document_ids),
        sample_ids=torch.from_numpy(sample_ids.astype(np.int64)),
    )
