"""The domain of a document travels to the positions of the held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from parallel.errors import ConfigError
from trainer.config import DataConfig, RunConfig
from trainer.data.domains import MAX_SHOWN, folder_domain, stdlib_domain
from trainer.data.order import evaluation_rows
from trainer.data.prepare import PreparedData, prepare_data
from trainer.data.sources import open_source

Configure = Callable[..., RunConfig]


def write_rows(path: Path, kind: str, rows: list[dict[str, object]]) -> Path:
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def names_at_positions(prepared: PreparedData, num_rows: int) -> list[str]:
    ids = prepared.domains.of(np.arange(num_rows))
    return [prepared.domains.names[n] for n in ids.reshape(-1)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_position_knows_the_domain_of_its_document(
    kind: str, configure: Configure, tmp_path: Path, texts: list[str]
) -> None:
    rows = [{"text": t, "meta": {"source": ["web", "code", None][i % 3]}} for i, t in enumerate(texts)]
    path = write_rows(tmp_path / f"rows.{kind}", kind, rows)
    config = configure(kind, path, domain_field="meta.source")
    config.eval.max_rows = 10**6
    prepared = prepare_data(config)
    expected = []
    for document in open_source(config.data).documents():
        if document.draw < config.data.valid_fraction:
            length = len(prepared.tokenizer.encode_documents([document.text])[0])
            expected += [document.domain or "other"] * length
    assert set(expected) == {"web", "code", "other"}
    num_rows = prepared.num_valid_rows
    stream = np.array(expected)[: num_rows * config.train.seq_len].reshape(num_rows, -1)
    # An evaluation reads the rows in an order of its own.
    order = evaluation_rows(num_rows, config.eval.max_rows)
    assert names_at_positions(prepared, num_rows) == stream[order].reshape(-1).tolist()
    other = configure(kind, path)
    assert prepare_data(other).fingerprint != prepared.fingerprint, (
        "a cache without these domains is not used"
    )
    assert prepare_data(other).domains.names == ["other"]


def test_the_first_folder_is_a_domain(configure: Configure, text_folder: Path) -> None:
    prepared = prepare_data(configure("text", text_folder))
    assert sorted(prepared.domains.names) == ["other", "part0", "part1", "part2"]
    assert folder_domain("a/b/c.txt") == "a"
    assert folder_domain("c.txt") == ""


def test_small_domains_share_a_name(configure: Configure, tmp_path: Path, texts: list[str]) -> None:
    rows: list[dict[str, object]] = [{"text": t, "kind": f"kind {i % 40}"} for i, t in enumerate(texts)]
    prepared = prepare_data(
        configure("jsonl", write_rows(tmp_path / "rows.jsonl", "jsonl", rows), domain_field="kind")
    )
    assert len(prepared.domains.names) == MAX_SHOWN + 1
    assert prepared.domains.of(np.arange(len(prepared.valid))).max() == MAX_SHOWN


def test_modules_of_the_library_have_kinds() -> None:
    found = [stdlib_domain(name) for name in ("json/decoder.py", "ssl.py", "pydoc_data/topics.py", "os.py")]
    assert found == ["formats", "network", "help text", "other"]


def test_mistakes_name_the_row(configure: Configure, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "a", "kind": "x"}, {"text": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", "jsonl", rows)
    with pytest.raises(ConfigError, match=r"data\.domain_field=kind.*rows\.jsonl:2 has 'text'"):
        prepare_data(configure("jsonl", path, domain_field="kind"))
    path = write_rows(tmp_path / "rows.parquet", "parquet", [{"text": "a", "kind": "x"}])
    with pytest.raises(ConfigError, match=r"data\.domain_field=sort.*has 'text', 'kind'"):
        prepare_data(configure("parquet", path, domain_field="sort"))
    rows = [{"text": "a", "kind": ["x"]}]
    with pytest.raises(ConfigError, match="holds a list there"):
        prepare_data(
            configure("jsonl", write_rows(tmp_path / "lists.jsonl", "jsonl", rows), domain_field="kind")
        )


def with_domains(data: DataConfig) -> list[dict[str, object]]:
    return [{"text": "one", "domain": "a"}, {"text": "two", "domain": data.kwargs.get("second", "b")}]


def test_a_source_of_the_users_own_names_domains(configure: Configure) -> None:
    config = configure("stdlib", target=f"{__name__}:with_domains")
    assert [d.domain for d in open_source(config.data).documents()] == ["a", "b"]
    config.data.kwargs = {"second": 3}
    with pytest.raises(ConfigError, match="document 1 has the domain 3"):
        list(open_source(config.data).documents())


def test_a_streamed_dataset_names_domains(configure: Configure, tmp_path: Path, texts: list[str]) -> None:
    rows: list[dict[str, object]] = [
        {"text": t, "meta": {"source": f"s{i % 2}"}} for i, t in enumerate(texts)
    ]
    (tmp_path / "hub").mkdir()
    write_rows(tmp_path / "hub" / "train.parquet", "parquet", rows)
    config = configure("hub", name=str(tmp_path / "hub"), domain_field="meta.source")
    prepared = prepare_data(config)
    assert prepared.hub is not None
    assert [d.domain for d in prepared.hub.documents()][:4] == ["s0", "s1", "s0", "s1"]
    assert sorted(prepared.domains.names) == ["other", "s0", "s1"]
    config.data.domain_field = "meta.kind"
    with pytest.raises(ConfigError, match=r"data\.domain_field=meta\.kind.*row 0 has 'source'"):
        prepare_data(config)
