"""Where documents come from.

A source yields :class:`Document` objects, always in the same order, as often as it is asked. Which side of
the train/valid split a document falls on is drawn from a hash of its own name (files) or its own text
(rows): adding, removing or reordering others never moves it, nor does the seed.

A source of your own is a callable ``data.target=package.module:callable``. It is given the ``data`` section
of the config (your options are in ``data.kwargs``) and returns an iterable, the same on every call, of

* ``str``: one document, split by its text, or
* ``{"text": str, "name": str, "domain": str}``: one document, split by its name (``name`` and ``domain`` may
  be left out; the domain is what kind of text it is, which shows in the report).

What it returned is cached until its module, the ``data`` section or the files under ``data.path`` change.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from parallel.errors import ConfigError
from trainer.config import DataConfig, Source
from trainer.data import files
from trainer.data.domains import folder_domain, stdlib_domain
from trainer.plugins import load_target

__all__ = ["Document", "DocumentSource", "draw", "open_source"]


@dataclass(frozen=True)
class Document:
    """One text. It is held out where ``draw``, in [0, 1], is below ``data.valid_fraction``.

    ``domain`` says what kind of text it is, empty where that is not known.
    """

    name: str
    text: str
    draw: float
    domain: str = ""


class DocumentSource(Protocol):
    """Documents in a fixed order."""

    def documents(self) -> Iterator[Document]:
        """All documents with any text, from the first. Raises ConfigError naming the place."""

    def identity(self) -> object:
        """JSON-able; equal if and only if the documents are."""


def draw(key: str) -> float:
    """A number in [0, 1) that depends on the key only."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass")) / 2**64


def open_source(data: DataConfig) -> DocumentSource:
    """The source that the config names; ``data.target`` goes before ``data.source``.

    Raises:
        ConfigError: nothing to read at ``data.path``, or no such target. ``hub`` is opened by
            ``trainer.data.hub``.
    """
    if data.target is not None:
        return TargetSource(data)
    if data.source is Source.stdlib:
        return StdlibSource(Path(sysconfig.get_paths()["stdlib"]))
    assert data.path is not None, "validate() requires data.path"
    found = files.find_files(data.path, data.source.value)
    if data.source is Source.text:
        return TextSource(found, data.valid_fraction)
    return RowSource(found, data.source, data.text_field, data.domain_field)


class StdlibSource:
    """The Python standard library's sources, and the topics of its online help as documents of their own."""

    _SKIPPED = frozenset(["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"])
    _TOPICS = "pydoc_data/topics.py"

    def __init__(self, root: Path) -> None:
        self._files = sorted(
            (path.relative_to(root).as_posix(), path)
            for path in root.rglob("*.py")
            if not self._SKIPPED.intersection(path.relative_to(root).parts)
            # Written when Python was built, so different on every machine.
            and not path.name.startswith("_sysconfigdata")
            and path.name != "sitecustomize.py"
        )
        if not self._files:
            raise ConfigError(
                "data.source",
                "stdlib",
                f"this Python has no library sources in {root}",
                "use another Python, or data=text data.path=FOLDER",
            )

    def documents(self) -> Iterator[Document]:
        for name, path in self._files:
            try:
                with tokenize.open(path) as file:  # in the coding that the file itself declares
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # broken on purpose, as some of the parser's examples are
            topics = _help_topics(text) if name == self._TOPICS else {}
            parts = {f"{name}#{topic}": topics[topic] for topic in sorted(topics)} or {name: text}
            for part, content in parts.items():
                if content.strip():
                    yield Document(part, content, draw(part), stdlib_domain(name))

    def identity(self) -> object:
        return ["stdlib", files.identify_files(self._files)]


def _help_topics(source: str) -> dict[str, str]:
    """The dict that pydoc's topics module assigns, read without running it."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


class TextSource:
    """One document a file. A single file is cut in two at a line: its last part is held out."""

    def __init__(self, found: list[tuple[str, Path]], valid_fraction: float) -> None:
        self._files, self._valid_fraction = found, valid_fraction

    def documents(self) -> Iterator[Document]:
        for name, path in self._files:
            for _, text in files.read_text(path):
                if len(self._files) == 1:
                    cut = int(len(text) * (1 - self._valid_fraction))
                    cut = text.rfind("\n", 0, cut) + 1 or cut
                    yield Document(name, text[:cut], 1.0)
                    yield Document(f"{name}#end", text[cut:], 0.0)
                else:
                    yield Document(name, text, draw(name), folder_domain(name))

    def identity(self) -> object:
        return ["text", files.identify_files(self._files)]


class RowSource:
    """One document a row of JSON lines or Parquet; rows without text are passed over."""

    def __init__(
        self, found: list[tuple[str, Path]], kind: Source, text_field: str, domain_field: str | None = None
    ) -> None:
        self._files, self._kind = found, kind
        self._text_field, self._domain_field = text_field, domain_field

    def documents(self) -> Iterator[Document]:
        read = files.read_jsonl if self._kind is Source.jsonl else files.read_parquet
        for name, path in self._files:
            for where, text, domain in read(path, self._text_field, self._domain_field):
                if text:
                    yield Document(where, text, draw(text), domain or folder_domain(name))

    def identity(self) -> object:
        return [self._kind.value, self._text_field, self._domain_field, files.identify_files(self._files)]


class TargetSource:
    """The user's own callable (see the module's docstring)."""

    def __init__(self, data: DataConfig) -> None:
        assert data.target is not None
        self._target, self._data = data.target, data
        loaded = load_target("data.target", data.target)
        if not callable(loaded):
            raise ConfigError("data.target", data.target, "is not callable", "name a function or a class")
        self._callable = loaded

    def documents(self) -> Iterator[Document]:
        try:
            made = self._callable(self._data)
            if isinstance(made, str) or not isinstance(made, Iterable):
                raise self._wrong(f"returned a {type(made).__name__}, not an iterable of documents")
            for number, item in enumerate(made):
                row = {"text": item} if isinstance(item, str) else item
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise self._wrong(f"document {number} is {_short(item)}")
                domain = row.get("domain") or ""
                if not isinstance(domain, str):
                    raise self._wrong(f"document {number} has the domain {_short(domain)}")
                text, name = files.require_text(row["text"], "text", f"document {number}"), row.get("name")
                if text:
                    yield Document(str(name or number), text, draw(str(name) if name else text), domain)
        except OSError as error:  # told apart from a cache that cannot be written
            raise self._wrong(f"raised {type(error).__name__}: {error}") from error

    def identity(self) -> object:
        section = dataclasses.asdict(self._data)
        options = {key: section[key] for key in ("target", "kwargs", "path", "name", "subset", "text_field")}
        source = sys.modules[self._target.partition(":")[0]].__file__
        modules = [(Path(source).name, Path(source))] if source else []
        if self._data.path is not None and Path(self._data.path).exists():
            root = Path(self._data.path)
            inputs = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
            modules += sorted((path.relative_to(root.parent).as_posix(), path) for path in inputs)
        return ["target", options, files.identify_files(modules)]

    def _wrong(self, relation: str) -> ConfigError:
        return ConfigError(
            "data.target",
            self._target,
            relation,
            'yield str or {"text": str, "name": str, "domain": str} for each document',
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
