"""Documents' tokens packed into rows of one length, on disk and back.

The documents' tokens stand one after another in one stream. Row i holds the ``seq_len + 1`` tokens from
``i · seq_len`` on: its first ``seq_len`` are the input, its last ``seq_len`` the targets. So neighbours
share one token, every token is a target exactly once, and a row needs nothing from the next. What is left
at the end, less than a row, is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

__all__ = ["Packer", "RowWriter", "Rows"]

_COLUMN = "tokens"
_CHUNK_ROWS = 1024


class Packer:
    """Cuts a stream of tokens into rows, as it comes."""

    def __init__(self, seq_len: int, carry: np.ndarray | None = None) -> None:
        self.seq_len = seq_len
        self.carry = np.empty(0, np.int32) if carry is None else carry
        """Tokens not yet in a complete row (its first one may be the last of the row before)."""

    def push(self, documents: Iterable[np.ndarray]) -> np.ndarray:
        """Add documents (int32, eos-terminated); returns the rows that became complete, [n, S+1]."""
        stream = np.concatenate([self.carry, *documents])
        num_rows = max(0, (len(stream) - 1) // self.seq_len)
        taken = num_rows * self.seq_len
        self.carry = stream[taken:].copy()
        if not num_rows:
            return np.empty((0, self.seq_len + 1), np.int32)
        starts = np.arange(num_rows)[:, None] * self.seq_len
        return stream[starts + np.arange(self.seq_len + 1)]


class RowWriter:
    """Appends rows [n, S+1] to an Arrow file: fixed-size lists of the smallest integer that holds an id."""

    def __init__(self, path: Path, seq_len: int, vocab_size: int) -> None:
        # Imported where it is needed: it takes a second, and a worker that restarts only reads.
        import datasets
        from datasets.arrow_writer import ArrowWriter

        name = "uint16" if vocab_size <= 2**16 else "int32"
        self._dtype = np.dtype(name)
        self._width = seq_len + 1
        features = datasets.Features({_COLUMN: datasets.List(datasets.Value(name), length=self._width)})
        self._writer = ArrowWriter(path=str(path), features=features, writer_batch_size=_CHUNK_ROWS)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self.num_rows = 0

    def write(self, rows: np.ndarray) -> None:
        """Append rows; they reach the file in chunks."""
        if len(rows):
            self._pending.append(rows.astype(self._dtype))
            self._num_pending += len(rows)
            self.num_rows += len(rows)
        if self._num_pending >= _CHUNK_ROWS:
            self._flush()

    def _flush(self) -> None:
        flat = np.concatenate(self._pending).reshape(-1)
        column = pa.FixedSizeListArray.from_arrays(pa.array(flat), self._width)
        self._writer.write_table(pa.table({_COLUMN: column}))
        self._pending, self._num_pending = [], 0

    def close(self) -> None:
        """Write what is pending and the file's footer. At least one row was written."""
        if self._pending:
            self._flush()
        self._writer.finalize()


class Rows:
    """Random access to packed rows in a memory-mapped Arrow file; nothing is read until it is asked for."""

    def __init__(self, path: Path, seq_len: int) -> None:
        width = seq_len + 1
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            column = stream.read_all().column(_COLUMN)
        if column.type.list_size != width:
            raise ValueError(f"{path}: rows of {column.type.list_size} tokens, expected {width}")
        # Zero-copy views of the mapping; Rows keeps them, and so the mapping, alive. Not to_numpy(), which
        # would import pandas where it is installed.
        self._chunks = [np.from_dlpack(chunk.flatten()).reshape(-1, width) for chunk in column.chunks]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)
        self._width = width

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows at these indices, [n, S+1] int32."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"row {wanted.max()} of {len(self)}")
        rows = np.empty((len(wanted), self._width), np.int32)
        which = np.searchsorted(self._ends, wanted, side="right")
        for chunk in np.unique(which):
            here = which == chunk
            first = self._ends[chunk] - len(self._chunks[chunk])
            rows[here] = self._chunks[chunk][wanted[here] - first]
        return rows
