from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from parallel.errors import ConfigError
from trainer.data.tokenizer import END_OF_TEXT, TextTokenizer


def test_training_twice_gives_the_same_tokenizer(texts: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        TextTokenizer.train(texts, 400).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_text_comes_back(texts: list[str], tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train(texts, 400)
    assert 260 < tokenizer.vocab_size <= 400
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    for text in (texts[5], "日本語 🎉\t\r\n  two  spaces", "\x00\x7f"):
        assert loaded.decode(loaded.encode(text)) == text
        assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.eos == tokenizer.eos and loaded.vocab_size == tokenizer.vocab_size


def test_documents_end_with_eos_and_quoting_it_does_not_end_one(texts: list[str]) -> None:
    tokenizer = TextTokenizer.train(texts, 300)
    first, second = tokenizer.encode_documents([f"a {END_OF_TEXT} b", texts[0]])
    assert first[-1] == second[-1] == tokenizer.eos
    assert tokenizer.eos not in first[:-1]
    assert tokenizer.decode(first.tolist()) == f"a {END_OF_TEXT} b{END_OF_TEXT}"
    assert second[:-1].tolist() == tokenizer.encode(texts[0])


def test_other_names_of_eos_are_found_and_limits_in_the_file_lifted(tmp_path: Path) -> None:
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["</s>"])
    raw.enable_truncation(2)
    raw.enable_padding(length=9)
    raw.save(str(tmp_path / "t.json"))
    tokenizer = TextTokenizer.load(tmp_path / "t.json")
    assert (tokenizer.eos, tokenizer.vocab_size) == (2, 3)
    assert tokenizer.encode("a a a a b") == [0, 0, 0, 0, 1]


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path=.*none\.json: there is no such file"):
        TextTokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json: is not a readable tokenizer"):
        TextTokenizer.load(tmp_path / "bad.json")
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "noeos.json"))
    with pytest.raises(ConfigError, match=r"noeos\.json: has no token that ends a document.*</s>"):
        TextTokenizer.load(tmp_path / "noeos.json")
