from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.data.loader import valid_batches
from trainer.data.prepare import PreparedData, prepare_data
from trainer.data.sources import draw, open_source

Configure = Callable[..., RunConfig]
ROOT = Path(__file__).parents[3]


def all_rows(prepared: PreparedData) -> tuple[np.ndarray, np.ndarray]:
    assert prepared.train is not None
    return prepared.train[np.arange(len(prepared.train))], prepared.valid[np.arange(len(prepared.valid))]


def folder_of(config: RunConfig, prepared: PreparedData) -> Path:
    return Path(config.data.cache_dir) / "data" / prepared.fingerprint


def text_of(rows: np.ndarray, prepared: PreparedData) -> str:
    return prepared.tokenizer.decode([*rows[:, :-1].reshape(-1).tolist(), int(rows[-1, -1])])


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_rows_are_the_documents_of_their_side(
    source: str, configure: Configure, text_folder: Path, jsonl_file: Path, parquet_folder: Path
) -> None:
    path = {"text": text_folder, "jsonl": jsonl_file, "parquet": parquet_folder}[source]
    config = configure(source, path)
    prepared = prepare_data(config)
    documents = list(open_source(config.data).documents())
    for rows, held_out in zip(all_rows(prepared), (False, True), strict=True):
        expected = "".join(
            d.text + "<|endoftext|>" for d in documents if (d.draw < config.data.valid_fraction) is held_out
        )
        got = text_of(rows, prepared)
        # The last row's end may stand inside a character of several bytes, decoded as U+FFFD.
        assert expected.startswith(got.rstrip("�"))
        assert len(prepared.tokenizer.encode(expected[len(got) :])) <= 3 * config.train.seq_len
    assert (prepared.num_train_rows, prepared.num_valid_rows) == tuple(map(len, all_rows(prepared)))


def test_tokenizer_never_sees_the_held_out_text(configure: Configure, tmp_path: Path) -> None:
    config = configure("jsonl", tmp_path / "a.jsonl")
    lines = [f"plain words number {i}" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    held_out = [d.text for d in open_source(config.data).documents() if d.draw < config.data.valid_fraction]
    before = prepare_data(config)
    # Only held-out documents gain a word that would otherwise become a token of its own.
    rows = [{"text": line} for line in lines]
    candidates = (f"{text} {'qzx' * 40} {i}" for text in held_out for i in range(50))
    rows += [{"text": text} for text in candidates if draw(text) < config.data.valid_fraction]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = prepare_data(config)
    assert after.fingerprint != before.fingerprint and after.num_valid_rows > before.num_valid_rows
    assert len(after.tokenizer.encode("qzx" * 40)) == len(before.tokenizer.encode("qzx" * 40))
    assert after.tokenizer.encode("plain words number") == before.tokenizer.encode("plain words number")


@pytest.mark.parametrize("respect", [True, False])
def test_unigram_loss_and_bytes_per_token(configure: Configure, text_folder: Path, respect: bool) -> None:
    config = configure("text", text_folder, respect_documents=respect)
    config.eval.max_rows = 5
    prepared = prepare_data(config)
    train, _ = all_rows(prepared)
    counts = Counter(train[:, 1:].reshape(-1).tolist())
    total = sum(counts.values()) + prepared.vocab_size
    losses = [
        -math.log((counts[target] + 1) / total)
        for batch in valid_batches(prepared, config, 0, 1)
        for target in batch.targets.reshape(-1).tolist()
        if target != -100
    ]
    assert len(losses) <= 5 * 16
    assert prepared.unigram_loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    held_out = [d.text for d in open_source(config.data).documents() if d.draw < config.data.valid_fraction]
    tokens = sum(len(prepared.tokenizer.encode(text)) + 1 for text in held_out)
    assert prepared.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in held_out) / tokens)


def test_cache_is_used_again_and_rebuilt_when_anything_matters(
    configure: Configure, text_folder: Path
) -> None:
    config = configure("text", text_folder)
    first = prepare_data(config)
    made = (folder_of(config, first) / "meta.json").stat().st_mtime_ns
    again = prepare_data(config)
    assert again.fingerprint == first.fingerprint
    assert (folder_of(config, first) / "meta.json").stat().st_mtime_ns == made
    config.train.seed, config.eval.max_rows = 5, 3
    assert prepare_data(config).fingerprint == first.fingerprint, "these do not touch the rows"
    seen = {first.fingerprint}
    for change in ("seq_len", "fraction", "vocab", "content"):
        if change == "seq_len":
            config.train.seq_len = 8
        elif change == "fraction":
            config.data.valid_fraction = 0.3
        elif change == "vocab":
            config.data.tokenizer.vocab_size = 300
        else:  # same size, same time
            file = text_folder / "part0" / "000.txt"
            stat = file.stat()
            file.write_text(file.read_text(encoding="utf-8").replace("text 0", "text 9"), encoding="utf-8")
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert file.stat().st_size == stat.st_size
        seen.add(prepare_data(config).fingerprint)
    assert len(seen) == 5


def test_moved_corpus_finds_its_cache(configure: Configure, text_folder: Path, tmp_path: Path) -> None:
    first = prepare_data(configure("text", text_folder))
    text_folder.rename(tmp_path / "elsewhere")
    assert prepare_data(configure("text", tmp_path / "elsewhere")).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.arrow", "valid.arrow", "unigram.npy"])
@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_damaged_cache_is_built_again(
    configure: Configure, text_folder: Path, name: str, damage: str
) -> None:
    config = configure("text", text_folder)
    first = prepare_data(config)
    expected = all_rows(first)
    path = folder_of(config, first) / name
    if damage == "removed":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    again = prepare_data(config)
    assert all(np.array_equal(a, b) for a, b in zip(all_rows(again), expected, strict=True))
    assert again.unigram_loss == first.unigram_loss


PLUGIN = """
import os, pathlib, signal, time
here = pathlib.Path(__file__).parent
def documents(data):
    with (here / "calls").open("a") as log: log.write("x")
    while len(list(here.glob("started-*"))) < int(os.environ.get("WAIT_FOR", 0)): time.sleep(0.01)
    for i in range(400):
        yield f"document {i} " + "some words " * (i % 9)
        if i == 300 and "DIE" in os.environ and (here / "calls").read_text() == "xx":
            os.kill(os.getpid(), signal.SIGKILL)
"""

SCRIPT = """
import json, os, pathlib, sys
from trainer.config import RunConfig
from trainer.data.prepare import prepare_data
here = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(here))
config = RunConfig()
config.data.target, config.data.cache_dir = "plugged_documents:documents", str(here / "cache")
config.data.tokenizer.vocab_size, config.train.seq_len, config.train.micro_batch = 300, 16, 8

def start(**environment):
    # Forked after the slow imports; nothing has started a thread yet.
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        (here / f"started-{os.getpid()}").touch()
        prepared = prepare_data(config)
        result = [prepared.fingerprint, prepared.num_train_rows, prepared.train[[0]].tolist()]
        (here / f"result-{os.getpid()}").write_text(json.dumps(result))
        os._exit(0)
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run_processes(folder: Path, script: str) -> Any:
    """Run the script's processes in a fresh interpreter; what it prints, from JSON."""
    (folder / "plugged_documents.py").write_text(PLUGIN)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + script, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_processes_at_once_build_once(tmp_path: Path) -> None:
    script = """
pids = [start(WAIT_FOR="2") for _ in range(2)]
print(json.dumps([wait(pid) for pid in pids]))
"""
    assert run_processes(tmp_path, script) == [0, 0]
    one, other = tmp_path.glob("result-*")
    assert one.read_text() == other.read_text()
    assert (tmp_path / "calls").read_text() == "xx", "two passes of one build"


def test_killed_build_is_never_used(tmp_path: Path) -> None:
    script = """
codes = [wait(start(DIE="1"))]
folders = [path for path in here.glob("cache/data/*") if path.is_dir()]
left = {folder.name: [file.name for file in folder.iterdir()] for folder in folders}
codes.append(wait(start()))
print(json.dumps([codes, left]))
"""
    codes, left = run_processes(tmp_path, script)
    assert codes == [-signal.SIGKILL, 0]
    ((name, files),) = left.items()
    assert name.endswith(".building") and "tokenizer.json" in files, "killed in its second pass"
    (folder,) = [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]
    (result,) = tmp_path.glob("result-*")
    assert json.loads(result.read_text())[0] == folder.name == name.removesuffix(".building")


def test_users_tokenizer(configure: Configure, text_folder: Path, tmp_path: Path) -> None:
    config = configure("text", text_folder)
    trained = prepare_data(config)
    trained.tokenizer.save(tmp_path / "own.json")
    config.data.tokenizer.path = str(tmp_path / "own.json")
    own = prepare_data(config)
    assert own.fingerprint != trained.fingerprint
    assert all(np.array_equal(a, b) for a, b in zip(all_rows(own), all_rows(trained), strict=True))
    config.model.vocab_size = own.vocab_size - 1
    with pytest.raises(ConfigError, match=rf"model\.vocab_size.*Fix: model\.vocab_size={own.vocab_size}"):
        prepare_data(config)
    config.data.tokenizer.path = str(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path=.*absent\.json"):
        prepare_data(config)


def test_too_small_a_corpus_says_what_would_fit(
    configure: Configure, tmp_path: Path, text_folder: Path
) -> None:
    (tmp_path / "tiny.txt").write_text("hello world\n")
    with pytest.raises(
        ConfigError,
        match=r"train\.seq_len=16: the training side of .*tiny\.txt has 3 tokens.*train\.seq_len=2",
    ):
        prepare_data(configure("text", tmp_path / "tiny.txt"))
    config = configure("text", text_folder, valid_fraction=1e-6)
    config.train.seq_len = 4
    with pytest.raises(ConfigError, match=r"none of the 120 document\(s\).*held-out side") as error:
        prepare_data(config)
    fitting = float(error.value.fix.removeprefix("data.valid_fraction="))
    config.data.valid_fraction = fitting
    prepare_data(config)
    config.data.valid_fraction = 1 - 1e-6
    with pytest.raises(
        ConfigError, match=r"none of the 120 document\(s\).*training side.*Fix: data\.valid_fraction=0\.9"
    ):
        prepare_data(config)
    assert not list((tmp_path / "cache" / "data").glob("*.building")), "failed builds leave nothing"


def test_corpus_without_text(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(ConfigError, match=r"data\.path=.*blank\.jsonl: holds no document with any text"):
        prepare_data(configure("jsonl", tmp_path / "blank.jsonl"))


def test_target_that_gives_its_documents_once(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "once_documents.py").write_text(
        "left = iter([f'text {i} ' * 9 for i in range(99)])\ndef documents(data): return left\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"gave 99 documents when read first and 0 when read again"):
        prepare_data(configure("text", target="once_documents:documents"))


def test_unwritable_cache_is_named(configure: Configure, text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        ConfigError, match=r"data\.cache_dir=.*file: .*cannot be written.*Fix: .*MUSTER_CACHE"
    ):
        prepare_data(configure("text", text_folder, cache_dir=str(tmp_path / "file")))


def test_stdlib_corpus(configure: Configure) -> None:
    config = configure("stdlib", valid_fraction=0.05)
    config.data.tokenizer.vocab_size, config.train.seq_len = 1024, 128
    prepared = prepare_data(config)
    assert prepared.num_train_rows is not None and prepared.num_train_rows > 10_000
    assert 100 < prepared.num_valid_rows < prepared.num_train_rows / 4
    assert prepared.vocab_size == 1024
    assert 4.0 < prepared.unigram_loss < math.log(1024)
    train, valid = all_rows(prepared)
    assert train.max() < 1024 and valid.min() >= 0
