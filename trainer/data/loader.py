"""The batches of a step: a function of (seed, step), shared out over the ranks.

Step s holds the samples s·G … (s+1)·G − 1, G being ``train.global_batch``. Slot j of a step (sample
s·G + j) belongs to data-parallel rank j % dp, whose slots fill its micro-batches in order. Which rank reads
a sample is the only thing that the world decides.

* Packed corpora: sample n is row ``permutation(N, seed, n // N)[n % N]`` of the N training rows: every
  epoch reads every row once, in an order of its own. The state is the next sample's number.
* Streams: sample n is row n // V of virtual shard n % V. The state is the next sample's number and each
  shard's place; a rank's holds the shards it owns, and :func:`merge_states` joins them for a checkpoint.

Both states are plain JSON and may be loaded at another dp size, micro-batch or global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.data.batch import Batch, make_batch
from trainer.data.hub import VirtualShard
from trainer.data.order import evaluation_rows, permutation
from trainer.data.packing import Rows
from trainer.data.prepare import PreparedData

__all__ = ["Loader", "build_loader", "merge_states", "valid_batches"]


class Loader(Protocol):
    """This rank's share of every step."""

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step, ``train.micro_batch`` rows each."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able place after the steps given out so far."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ConfigError if the state is of other data."""


def build_loader(prepared: PreparedData, config: RunConfig, dp_rank: int, dp_size: int) -> Loader:
    """The loader of data-parallel rank ``dp_rank`` of ``dp_size``, at the first step."""
    share = _Share(prepared, config, dp_rank, dp_size)
    if prepared.hub is not None:
        return _StreamLoader(share)
    return _RowLoader(share)


def valid_batches(prepared: PreparedData, config: RunConfig, dp_rank: int, dp_size: int) -> Iterator[Batch]:
    """The held-out rows of an evaluation, shared out: the same rows in any world.

    Every rank gets the same number of batches of ``train.micro_batch`` rows. Where rows run out, padding
    fills up: sample id -1 and no targets. Sample ids count the evaluation's rows from 0.
    """
    order = evaluation_rows(len(prepared.valid), config.eval.max_rows)
    micro = config.train.micro_batch
    num_batches = -(-len(order) // (micro * dp_size))
    slots = dp_rank + dp_size * np.arange(num_batches * micro)
    for slot in slots.reshape(num_batches, micro):
        here = slot < len(order)
        rows = prepared.valid[order[np.where(here, slot, 0)]]
        yield make_batch(
            rows, np.where(here, slot, -1), prepared.tokenizer.eos, config.data.respect_documents
        )


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of the whole run from the ``state_dict`` of every data-parallel rank, at one step.

    Replicas may repeat a rank's state. For packed corpora all states are equal.
    """
    merged = {**states[0], "shards": {}}
    for state in states:
        assert state["next_sample"] == merged["next_sample"], "the ranks' loaders stand at different steps"
        merged["shards"].update(state["shards"])
    return merged


class _Share:
    """What every loader knows: the run's numbers and which slots of a step are this rank's."""

    def __init__(self, prepared: PreparedData, config: RunConfig, dp_rank: int, dp_size: int) -> None:
        train, unit = config.train, config.train.micro_batch * dp_size
        assert train.pad_batch or train.global_batch % unit == 0, "validate() requires whole micro-batches"
        self.prepared, self.config = prepared, config
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.slots = np.arange(dp_rank, -(-train.global_batch // unit) * unit, dp_size)
        self.is_sample = self.slots < train.global_batch

    def batches(self, rows: np.ndarray, sample_ids: np.ndarray) -> list[Batch]:
        """Cut this rank's rows of a step into its micro-batches."""
        micro, eos = self.config.train.micro_batch, self.prepared.tokenizer.eos
        return [
            make_batch(
                rows[i : i + micro], sample_ids[i : i + micro], eos, self.config.data.respect_documents
            )
            for i in range(0, len(rows), micro)
        ]

    def state(self, next_sample: int, shards: dict[str, Any]) -> dict[str, Any]:
        return {"fingerprint": self.prepared.fingerprint, "next_sample": next_sample, "shards": shards}

    def check(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.prepared.fingerprint:
            raise ConfigError(
                "data",
                self.prepared.fingerprint,
                f"the checkpoint stands in other data (fingerprint {state['fingerprint']}): its text, "
                "tokenizer, seq_len or split differs",
                "bring the data back as it was, or start a new run from the weights (checkpoint.load_from)",
            )


class _RowLoader:
    def __init__(self, share: _Share) -> None:
        assert share.prepared.train is not None
        self._share = share
        self._rows: Rows = share.prepared.train
        self._next_sample = 0
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def next_step(self) -> list[Batch]:
        real = self._share.is_sample
        samples = self._next_sample + np.where(real, self._share.slots, 0)
        rows = self._rows[self._row_numbers(samples)]
        self._next_sample += self._share.config.train.global_batch
        return self._share.batches(rows, np.where(real, samples, -1))

    def _row_numbers(self, samples: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(samples, len(self._rows))
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):  # one, or two at the seam (more only if a step exceeds the corpus)
            if epoch != self._epoch:
                seed = self._share.config.train.seed
                self._epoch, self._order = int(epoch), permutation(len(self._rows), seed, int(epoch))
            numbers[epochs == epoch] = self._order[places[epochs == epoch]]
        return numbers

    def state_dict(self) -> dict[str, Any]:
        return self._share.state(self._next_sample, {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._share.check(state)
        self._next_sample = state["next_sample"]


class _StreamLoader:
    def __init__(self, share: _Share) -> None:
        config, prepared = share.config, share.prepared
        assert prepared.hub is not None
        num_shards = config.data.virtual_shards
        assert num_shards % share.dp_size == 0 and config.train.global_batch % num_shards == 0, (
            "see validate()"
        )
        self._share, self._num_shards = share, num_shards
        self._next_sample = 0
        # Since dp divides V, the slots j ≡ rank (mod dp) come from the shards v ≡ rank (mod dp).
        self._shards = {
            index: VirtualShard(
                prepared.hub,
                prepared.tokenizer,
                index=index,
                num_shards=num_shards,
                seq_len=config.train.seq_len,
                valid_fraction=config.data.valid_fraction,
            )
            for index in range(share.dp_rank, num_shards, share.dp_size)
        }

    def next_step(self) -> list[Batch]:
        rows = np.stack([self._shards[int(slot) % self._num_shards].next_row() for slot in self._share.slots])
        samples = self._next_sample + self._share.slots
        self._next_sample += self._share.config.train.global_batch
        return self._share.batches(rows, samples)

    def state_dict(self) -> dict[str, Any]:
        shards = {str(index): shard.state_dict() for index, shard in self._shards.items()}
        return {**self._share.state(self._next_sample, shards), "virtual_shards": self._num_shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._share.check(state)
        if state["virtual_shards"] != self._num_shards:
            raise ConfigError(
                "data.virtual_shards",
                self._num_shards,
                f"the checkpoint's stream is shared out over {state['virtual_shards']} virtual shards",
                f"data.virtual_shards={state['virtual_shards']}",
            )
        for index, shard in self._shards.items():
            shard.load_state_dict(state["shards"][str(index)])
        self._next_sample = state["next_sample"]
