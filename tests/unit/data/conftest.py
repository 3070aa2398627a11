"""Small real corpora and the config that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from trainer.config import RunConfig, Source

Configure = Callable[..., RunConfig]


def documents(num: int) -> list[str]:
    """Texts of uneven length that no two share, some not ASCII."""
    rng = np.random.default_rng(7)
    words = ["alpha", "βήτα", "gamma", "delta", "ε", "return", "if", "x = 1", "\n", "…"]
    return [f"text {i}: " + " ".join(rng.choice(words, 5 + 7 * (i % 6))) for i in range(num)]


@pytest.fixture
def texts() -> list[str]:
    return documents(120)


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """configure(source, path=…, …): a resolved config of 16-token rows with a cache of the test's own."""

    def make(source: str, path: Path | str | None = None, **data: object) -> RunConfig:
        config = RunConfig()
        config.data.source = Source(source)
        config.data.path = None if path is None else str(path)
        config.data.cache_dir = str(tmp_path / "cache")
        config.data.valid_fraction = 0.2
        config.data.tokenizer.vocab_size = 320
        for name, value in data.items():
            assert hasattr(config.data, name)
            setattr(config.data, name, value)
        config.train.seq_len, config.train.global_batch, config.train.micro_batch = 16, 8, 2
        config.data.virtual_shards = 8
        return config

    return make


@pytest.fixture
def text_folder(tmp_path: Path, texts: list[str]) -> Path:
    folder = tmp_path / "books"
    for number, text in enumerate(texts):
        path = folder / f"part{number % 3}" / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def jsonl_file(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    return path


@pytest.fixture
def parquet_folder(tmp_path: Path, texts: list[str]) -> Path:
    """Three files, in the form of the hub, too."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        pa.parquet.write_table(
            pa.table({"text": texts[i::3]}), folder / f"train-{i}.parquet", row_group_size=7
        )
    return folder
