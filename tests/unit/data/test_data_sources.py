from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from parallel.errors import ConfigError
from trainer.config import DataConfig, RunConfig
from trainer.data.sources import Document, StdlibSource, open_source

Configure = Callable[..., RunConfig]


def read(config: RunConfig) -> list[Document]:
    return list(open_source(config.data).documents())


def sides(config: RunConfig) -> dict[str, bool]:
    return {document.text: document.draw < config.data.valid_fraction for document in read(config)}


def test_text_is_one_document_a_file_in_a_fixed_order(
    configure: Configure, text_folder: Path, texts: list[str]
) -> None:
    found = read(configure("text", text_folder))
    assert sorted(document.text for document in found) == sorted(texts)
    assert [document.name for document in found] == sorted(document.name for document in found)
    assert found[0].name == "part0/000.txt"


def test_glob_names_are_relative_to_its_fixed_part(configure: Configure, text_folder: Path) -> None:
    whole = {d.name: d for d in read(configure("text", text_folder))}
    some = read(configure("text", f"{text_folder}/**/*1.txt"))
    assert len(some) == 12
    assert all(whole[d.name] == d for d in some)


def test_rows_are_documents(
    configure: Configure, jsonl_file: Path, parquet_folder: Path, texts: list[str]
) -> None:
    assert [d.text for d in read(configure("jsonl", jsonl_file))] == texts
    assert {d.text for d in read(configure("parquet", parquet_folder))} == set(texts)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_documents_side_depends_on_itself_only(
    kind: str, configure: Configure, text_folder: Path, jsonl_file: Path, texts: list[str]
) -> None:
    path = text_folder if kind == "text" else jsonl_file
    before = sides(configure(kind, path))
    assert 10 < sum(before.values()) < 40, "about a fifth of 120"
    if kind == "text":
        for file in sorted(text_folder.rglob("*.txt"))[::2]:
            file.unlink()
        (text_folder / "aaa.txt").write_text("a new first file")
    else:
        rows = ["a new first row", *reversed(texts[::2])]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    after = sides(configure(kind, path))
    assert len(after) == 61
    assert all(before[text] == side for text, side in after.items() if text in before)


def test_single_text_file_is_cut_at_a_line(configure: Configure, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = "".join(f"line {i}\n" for i in range(100))
    path.write_text(text)
    config = configure("text", path)
    first, last = read(config)
    assert first.text + last.text == text and last.text.startswith("line ")
    assert first.draw >= config.data.valid_fraction > last.draw
    assert 0.2 * len(text) <= len(last.text) < 0.2 * len(text) + 10


def test_stdlib_holds_sources_and_help_but_no_tests(configure: Configure) -> None:
    found = {document.name: document.text for document in read(configure("stdlib"))}
    root = Path(sysconfig.get_paths()["stdlib"])
    assert found["argparse.py"] == (root / "argparse.py").read_text(encoding="utf-8")
    assert "pydoc_data/topics.py#assert" in found and "pydoc_data/topics.py" not in found
    assert '"assert" statement' in found["pydoc_data/topics.py#assert"]
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert sum(map(len, found.values())) > 5_000_000


def test_stdlib_reads_the_declared_coding_and_passes_over_broken_files(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    (tmp_path / "broken.py").write_bytes(b"# coding: utf-8\nname = '\xe9'\n")
    (tmp_path / "strange.py").write_bytes(b"# coding: no-such-coding\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (document,) = StdlibSource(tmp_path).documents()
    assert document.text == "# coding: latin-1\nname = 'é'\n"


def test_stdlib_without_sources(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no library sources.*data=text"):
        StdlibSource(tmp_path)


PLUGIN = """
def documents(data):
    for i in range(data.kwargs["num"]):
        yield f"plain {i}" if i % 2 else {"text": f"named {i}", "name": f"n{i}"}

def text(data): return "not a list"
def wrong(data): return ["fine", {"words": 3}]
def failing(data): raise FileNotFoundError("gone.bin")
value = 3
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_documents.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_documents"


def test_target_is_the_users_own_source(plugin: str) -> None:
    source = open_source(DataConfig(target=f"{plugin}:documents", kwargs={"num": 4}))
    found = list(source.documents())
    assert [d.text for d in found] == ["named 0", "plain 1", "named 2", "plain 3"]
    assert [d.text for d in source.documents()] == [d.text for d in found], "as often as asked"
    other = open_source(DataConfig(target=f"{plugin}:documents", kwargs={"num": 5}))
    assert source.identity() != other.identity()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text", "returned a str, not an iterable"),
        ("wrong", r"document 1 is \{'words': 3\}"),
        ("failing", "raised FileNotFoundError: gone.bin"),
        ("value", "is not callable"),
    ],
)
def test_target_errors(plugin: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.target={plugin}:{name}: {said}"):
        list(open_source(DataConfig(target=f"{plugin}:{name}")).documents())


@pytest.mark.parametrize(
    ("source", "name", "content", "said"),
    [
        ("text", "absent.txt", None, r"absent\.txt: there is no such file or folder"),
        ("text", "empty.txt", b"", r"empty\.txt: the file is empty \(0 bytes\)"),
        ("text", "none/*.txt", None, r"none/\*\.txt: no file matches.*quoted glob"),
        ("text", "latin.txt", b"caf\xe9 au lait", r"latin\.txt: is not UTF-8: byte 0xe9 at offset 3.*iconv"),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: is not UTF-8.*offset 24"),
        ("jsonl", "b.jsonl", b'{"text": "x"}\n\n{"text": \n', r"b\.jsonl:3: the line is not valid JSON"),
        ("jsonl", "c.jsonl", b"[1]\n", r"c\.jsonl:1: the line is a JSON list"),
        (
            "jsonl",
            "d.jsonl",
            b'{"text": "x"}\n{"id": 1, "body": "y"}\n',
            r"data\.text_field=text: .*d\.jsonl:2 has the fields 'id', 'body'\. Fix: data\.text_field=body",
        ),
        ("jsonl", "e.jsonl", b'{"text": 3}\n', r"e\.jsonl:1 holds a int, not a string"),
        ("parquet", "f.parquet", b"PAR1 but not really", r"f\.parquet: cannot be read as Parquet"),
    ],
)
def test_bad_files_are_named(
    configure: Configure, tmp_path: Path, source: str, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read(configure(source, tmp_path / name))


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_empty_folder(configure: Configure, tmp_path: Path, source: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.png").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"folder: the folder holds no file ending in \."):
        read(configure(source, tmp_path / "folder"))


def test_unreadable_file_is_named(configure: Configure, text_folder: Path) -> None:
    (text_folder / "dangling.txt").symlink_to("nowhere.txt")
    with pytest.raises(ConfigError, match=r"dangling\.txt: cannot be read \(No such file"):
        read(configure("text", text_folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file_is_named(configure: Configure, text_folder: Path) -> None:
    (text_folder / "part0" / "000.txt").chmod(0)
    with pytest.raises(ConfigError, match=r"000\.txt: cannot be read \(Permission denied"):
        read(configure("text", text_folder))


def test_parquet_without_the_column(configure: Configure, parquet_folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.text_field=body: .*train-0\.parquet has the columns 'text'"
    ):
        read(configure("parquet", parquet_folder, text_field="body"))


def test_rows_without_text_are_passed_over_and_half_surrogates_replaced(
    configure: Configure, tmp_path: Path
) -> None:
    pa.parquet.write_table(pa.table({"text": ["one", None, "", "two"]}), tmp_path / "a.parquet")
    assert [d.text for d in read(configure("parquet", tmp_path / "a.parquet"))] == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n\n{"text": null}\n')
    assert [d.text for d in read(configure("jsonl", tmp_path / "a.jsonl"))] == ["a?b"]


def test_bom_is_dropped(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.txt").write_bytes(b"two")
    assert [d.text for d in read(configure("text", f"{tmp_path}/*.txt"))] == ["one", "two"]
