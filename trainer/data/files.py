"""Files on disk: finding them, reading text, JSON lines and Parquet out of them, and saying what is wrong.

Every reader yields ``(where, text)``, and for rows ``(where, text, domain)``; ``where`` names the file and, for
rows, the line or row, so that an error leads the user to the place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import xxhash

from parallel.errors import ConfigError
from trainer.data.domains import field_domain

__all__ = [
    "SUFFIXES",
    "find_files",
    "identify_files",
    "read_jsonl",
    "read_parquet",
    "read_text",
    "require_text",
]

FIELD = "data.path"
SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst", ".tex", ".py"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet", ".pq"),
}
"""What a folder is searched for; a file or glob named in the config may have any suffix."""

_HASHED_BYTES = 2**26


def find_files(path: str, kind: str) -> list[tuple[str, Path]]:
    """The (name, path) of each file that ``data.path`` means, sorted by name.

    A name is relative to the folder (or to the part of the glob before its first wildcard), so it does not
    change when the corpus moves. Hidden files and folders are passed over.

    Raises:
        ConfigError: nothing there, nothing that matches, no file of the kind, or an empty file.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES[kind]]
        base, nothing = root, f"the folder holds no file ending in {', '.join(SUFFIXES[kind])}"
    elif any(mark in path for mark in "*?[") and not root.exists():
        base = Path(*takewhile(lambda part: not any(mark in part for mark in "*?["), root.parts))
        found = list(base.glob(str(root.relative_to(base))))
        nothing = "no file matches"
    else:
        found = [root] if root.exists() else []
        base, nothing = root.parent, "there is no such file or folder"
    named = sorted(
        (name.as_posix(), p)
        for name, p in ((p.relative_to(base), p) for p in found if not p.is_dir())
        if not any(part.startswith(".") for part in name.parts)
    )
    if not named:
        raise ConfigError(
            FIELD, path, nothing, f"give an existing {kind} file, a folder of them, or a quoted glob"
        )
    for _, file in named:
        if _size(file) == 0:
            raise ConfigError(FIELD, file, "the file is empty (0 bytes)", "remove it or fill it")
    return named


def identify_files(files: list[tuple[str, Path]]) -> list[list[object]]:
    """What tells one set of files from another: [name, bytes, content hash] of each.

    Reading a huge file on every start would take minutes, so above 64 MiB its modification time (ns)
    stands in for the hash.
    """
    identity: list[list[object]] = []
    for name, path in files:
        size = _size(path)
        mark = (
            xxhash.xxh3_128_hexdigest(_read_bytes(path)) if size <= _HASHED_BYTES else path.stat().st_mtime_ns
        )
        identity.append([name, size, mark])
    return identity


def read_text(path: Path) -> Iterator[tuple[str, str]]:
    """The file as one text. Raises ConfigError with the byte offset where it is not UTF-8."""
    yield str(path), _decode(_read_bytes(path), path, 0, str(path)).removeprefix("\ufeff")


def read_jsonl(
    path: Path, text_field: str, domain_field: str | None = None
) -> Iterator[tuple[str, str, str]]:
    """The text of each line's object, and its domain (empty without a field); blank lines are passed over.

    Raises:
        ConfigError: with ``file:line``: not UTF-8, not a JSON object, no such field, not a string.
    """
    start = 0
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        text = _decode(line, path, start, where).removeprefix("\ufeff")
        start += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                FIELD, where, f"the line is not valid JSON ({error})", "write one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(
                FIELD,
                where,
                f"the line is a JSON {type(row).__name__}, not an object",
                "write one JSON object a line",
            )
        if text_field not in row:
            raise ConfigError(
                "data.text_field",
                text_field,
                f"{where} has the fields {', '.join(map(repr, row))}",
                _field_fix(row),
            )
        domain = "" if domain_field is None else field_domain(row, domain_field, where)
        yield where, require_text(row[text_field], text_field, where), domain


def read_parquet(
    path: Path, text_field: str, domain_field: str | None = None
) -> Iterator[tuple[str, str, str]]:
    """The text of each row, and its domain (empty without a field).

    Raises:
        ConfigError: naming the file: not Parquet, no such column, or a row whose value is not a string.
    """
    try:
        with pa.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise ConfigError(
                    "data.text_field",
                    text_field,
                    f"{path} has the columns {', '.join(map(repr, names))}",
                    _field_fix(dict.fromkeys(names, "")),
                )
            number = 0
            columns = [text_field, *([domain_field.partition(".")[0]] if domain_field else [])]
            if columns[-1] not in names:
                field_domain(dict.fromkeys(names), columns[-1], str(path))
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    where = f"{path}, row {number}"
                    domain = field_domain(row, domain_field, where) if domain_field else ""
                    yield where, require_text(row[text_field], text_field, where), domain
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            FIELD, path, f"cannot be read as Parquet ({error})", "write the file again"
        ) from error


def require_text(value: object, text_field: str, where: str) -> str:
    """The value if it is a string; an absent one (null) counts as empty. Raises ConfigError.

    JSON can escape half a surrogate pair, which no UTF-8 can hold: it becomes a question mark.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(
            "data.text_field",
            text_field,
            f"{where} holds a {type(value).__name__}, not a string",
            "name a text field",
        )
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _field_fix(row: dict[str, object]) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    return f"data.text_field={texts[0]}" if texts else "name the field that holds the text"


def _decode(data: bytes, path: Path, start: int, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            FIELD,
            where,
            f"is not UTF-8: byte {data[error.start]:#04x} at offset {start + error.start}",
            f"convert it (iconv -f latin1 -t utf-8 {path.name})",
        ) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise _unreadable(path, error) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        FIELD, path, f"cannot be read ({error.strerror})", "check that it exists and that you may read it"
    )
