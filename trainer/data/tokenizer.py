"""The tokenizer: a byte-level BPE trained on the training split, or the user's ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from parallel.errors import ConfigError
from trainer.config import RunConfig

__all__ = ["END_OF_TEXT", "EOS_NAMES", "TextTokenizer"]

END_OF_TEXT = "<|endoftext|>"
EOS_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "<|im_end|>",
)
"""Tokens that may end a document, in order of preference."""


class TextTokenizer:
    """Text to ids and back. Special tokens are never read out of text; ``eos`` is added after documents.

    Attributes:
        eos: id of the token that ends every document.
        vocab_size: one more than the largest id.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos: int) -> None:
        # A document that quotes "<|endoftext|>" must not end there: specials are spelled out as bytes.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.eos = eos
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """A byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2). Deterministic.

        A small corpus may have too few pairs to fill ``vocab_size``; the vocabulary is smaller then.
        """
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        eos = tokenizer.token_to_id(END_OF_TEXT)
        assert eos is not None, "the trainer was given it as a special token"
        return cls(tokenizer, eos)

    @classmethod
    def load(cls, path: str | Path, field: str = "data.tokenizer.path") -> TextTokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            ConfigError: missing, not a tokenizer, or without any of ``EOS_NAMES``.
        """
        fix = "give a tokenizer.json saved by the tokenizers package, or null to train one"
        if not Path(path).is_file():
            raise ConfigError(field, path, "there is no such file", fix)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ConfigError(field, path, f"is not a readable tokenizer ({error})", fix) from error
        for name in EOS_NAMES:
            eos = tokenizer.token_to_id(name)
            if eos is not None:
                return cls(tokenizer, eos)
        raise ConfigError(
            field,
            path,
            f"has no token that ends a document (none of {', '.join(EOS_NAMES)})",
            f"add the special token {END_OF_TEXT} to it",
        )

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json``."""
        self._tokenizer.save(str(path))

    def to_json(self) -> str:
        """What ``save`` writes."""
        return self._tokenizer.to_str(pretty=True)

    def name_of(self, token: int) -> str:
        """How the vocabulary writes a token."""
        name = self._tokenizer.id_to_token(token)
        assert name is not None, f"no token {token}"
        return name

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without eos."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each document, int32, its ``eos`` at the end. Uses all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*encoding.ids, self.eos], dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are shown by name."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def fill_vocabulary(config: RunConfig) -> None:
    """Set ``model.vocab_size``, where it is left blank, to that of the tokenizer that the user gave.

    ``resolve()`` cannot: it opens no files.

    Raises:
        ConfigError: the tokenizer cannot be read.
    """
    if config.model.vocab_size == -1 and config.data.tokenizer.path is not None:
        config.model.vocab_size = TextTokenizer.load(config.data.tokenizer.path).vocab_size
