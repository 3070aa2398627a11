"""Datasets of the Hugging Face hub, streamed through a fixed number of virtual shards.

``data.virtual_shards`` = V independent streams share the dataset out, V being a matter of the config and
not of the world. With R files in the dataset (R real shards), virtual shard v reads

* V ≤ R: the files f with f % V == v, whole;
* V > R: of file v % R every k-th document from the (v // R)-th on, k the number of shards on that file
  (each of them reads the whole file: more files than virtual shards is the fast case).

Each shard tokenises and packs into rows of its own, and starts over at its end. Held-out documents are
passed over. A shard's state is where it stands in the files and the tokens not yet in a row, so it goes on
exactly, in any rank.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.errors import ConfigError
from trainer.config import DataConfig
from trainer.data import files
from trainer.data.domains import field_domain
from trainer.data.packing import Packer
from trainer.data.sources import Document, draw
from trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:  # a second to import, and most runs read no hub
    import datasets

__all__ = ["HubSource", "VirtualShard"]

_SPLIT = "train"
_TIMEOUT_SECONDS = 10.0


class HubSource:
    """The train split of a hub dataset, or of a local folder in the hub's form, as a stream.

    A remote dataset is pinned to the revision found at the start, so every rank reads the same.

    Raises:
        ConfigError: no such dataset, no access, no network (at once, without retries), no train split,
            or no ``data.text_field`` in it.
    """

    def __init__(self, data: DataConfig) -> None:
        assert data.name is not None, "validate() requires data.name"
        self._name, self._data = data.name, data
        root = Path(data.name).expanduser()
        self._root = root if root.is_dir() else None
        self._revision = _remote_revision(data.name) if self._root is None else None
        self._dataset = self._open()
        self.num_files: int = self._dataset.num_shards
        columns = self._dataset.column_names
        if columns is not None and data.text_field not in columns:
            raise self._no_field(data.name, columns)

    def _no_field(self, where: str, columns: list[str]) -> ConfigError:
        return ConfigError(
            "data.text_field",
            self._data.text_field,
            f"{where} has the columns {', '.join(columns)}",
            "name the one that holds the text",
        )

    def _open(self) -> datasets.IterableDataset:
        import datasets

        datasets.disable_progress_bars()
        fix = "name a dataset with a train split (and data.subset=CONFIG where it has several)"
        try:
            splits = datasets.load_dataset(
                str(self._root or self._name), self._data.subset, streaming=True, revision=self._revision
            )
        except Exception as error:  # the loader's errors share no base class
            raise ConfigError(
                "data.name", self._name, f"cannot be opened ({_first_line(error)})", fix
            ) from error
        if _SPLIT not in splits:
            raise ConfigError(
                "data.name", self._name, f"has the splits {', '.join(splits)}, no {_SPLIT}", fix
            )
        return splits[_SPLIT]

    def identity(self) -> object:
        """The revision of a remote dataset, the files of a local one."""
        content: object = self._revision
        if self._root is not None:
            found = sorted(
                (path.relative_to(self._root).as_posix(), path)
                for path in self._root.rglob("*")
                if path.is_file()
            )
            content = files.identify_files(found)
        return ["hub", self._data.subset, self._data.text_field, self._data.domain_field, content]

    def documents(self) -> Iterator[Document]:
        """All documents with any text, file after file."""
        try:
            for number, row in enumerate(self._dataset):
                document = self.document(row, number)
                if document is not None:
                    yield document
        except ConfigError:
            raise
        except Exception as error:  # of the network or of a reader; they share no base class
            fix = "check the network and the dataset's files, then start again"
            raise ConfigError(
                "data.name", self._name, f"reading it failed ({_first_line(error)})", fix
            ) from error

    def document(self, row: dict[str, Any], number: int) -> Document | None:
        """A row's document; None where it has no text. Raises ConfigError where it is not a string."""
        where, field = f"{self._name}, row {number}", self._data.text_field
        if field not in row:
            raise self._no_field(where, list(row))
        text = files.require_text(row[field], field, where)
        domain = self._data.domain_field
        kind = "" if domain is None else field_domain(row, domain, where)
        return Document(where, text, draw(text), kind) if text else None

    def files_of(self, index: int, num_shards: int) -> tuple[datasets.IterableDataset, int, int]:
        """(stream, k, i): the files of virtual shard ``index``, of whose documents the shard takes those
        whose number is i modulo k. The stream starts at the first."""
        if num_shards <= self.num_files:
            return self._dataset.shard(num_shards, index, contiguous=False), 1, 0
        file = index % self.num_files
        sharing = len(range(file, num_shards, self.num_files))
        return self._dataset.shard(self.num_files, file, contiguous=False), sharing, index // self.num_files


class VirtualShard:
    """One of the V streams: an endless iterator of packed rows [S+1] int32 with an exact state."""

    def __init__(
        self,
        source: HubSource,
        tokenizer: TextTokenizer,
        *,
        index: int,
        num_shards: int,
        seq_len: int,
        valid_fraction: float,
    ) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._index, self._num_shards = index, num_shards
        self._seq_len, self._valid_fraction = seq_len, valid_fraction
        self._packer = Packer(seq_len)
        self._epoch = 0
        self._open()

    def _open(self) -> None:
        self._stream, self._every, self._first = self._source.files_of(self._index, self._num_shards)
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._num_read = 0
        self._rows = np.empty((0, self._seq_len + 1), np.int32)
        self._num_used = 0

    def next_row(self) -> np.ndarray:
        """The next row. Raises ConfigError if the shard holds no document to train on."""
        ended = False
        while self._num_used == len(self._rows):
            tokens = self._next_document()
            if tokens is not None:
                self._rows, self._num_used = self._packer.push([tokens]), 0
                ended = False
            elif not ended:
                self._start_over()
                ended = True
            else:  # from end to end without a document
                raise self._without_documents()
        self._num_used += 1
        return self._rows[self._num_used - 1]

    def _next_document(self) -> np.ndarray | None:
        """The tokens of the shard's next training document; None at the end of its files."""
        if self._iterator is None:
            self._iterator = iter(self._stream)
        for row in self._iterator:
            number = self._num_read
            self._num_read += 1
            if number % self._every != self._first:
                continue
            document = self._source.document(row, number)
            if document is not None and document.draw >= self._valid_fraction:
                return self._tokenizer.encode_documents([document.text])[0]
        return None

    def _start_over(self) -> None:
        self._open()
        self._epoch += 1

    def _without_documents(self) -> ConfigError:
        return ConfigError(
            "data.virtual_shards",
            self._num_shards,
            f"virtual shard {self._index} holds no document to train on",
            "fewer virtual shards, or a larger dataset",
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: place in the files, epoch, and the tokens read but not yet given out (base64 int32)."""
        # Rows cut but not given out and the carry form one stream again: neighbours share a token.
        unused = self._rows[self._num_used :]
        tokens = np.concatenate([unused[:, :-1].reshape(-1), self._packer.carry])
        return {
            "epoch": self._epoch,
            "num_read": self._num_read,
            "stream": self._stream.state_dict(),
            "tokens": base64.b64encode(tokens.astype("<i4").tobytes()).decode("ascii"),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``'s place."""
        self._open()
        self._epoch, self._num_read = state["epoch"], state["num_read"]
        self._stream.load_state_dict(state["stream"])
        tokens = np.frombuffer(base64.b64decode(state["tokens"]), dtype="<i4").astype(np.int32)
        self._packer = Packer(self._seq_len)
        self._rows = self._packer.push([tokens])


def _remote_revision(name: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    fix = "check the name and the network, set HF_TOKEN for private data, or give a local folder"
    try:
        return HfApi().dataset_info(name, timeout=_TIMEOUT_SECONDS).sha
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise ConfigError(
            "data.name", name, f"no such dataset, or no access to it ({_first_line(error)})", fix
        ) from error
    except Exception as error:  # whatever the HTTP client of the day raises
        raise ConfigError(
            "data.name", name, f"the hub cannot be reached ({_first_line(error)})", fix
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
