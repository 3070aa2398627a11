"""What kind of text a document is, so that it can be seen which experts it goes to.

A domain is a short name. Rows name it in a field (``data.domain_field``), files by the first folder they are
in, the standard library by what a module is for. Only held-out rows keep it, as a number a position beside
their tokens: training never asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel.errors import ConfigError
from trainer.data.packing import Packer, Rows, RowWriter

__all__ = ["DomainWriter", "Domains", "field_domain", "folder_domain", "stdlib_domain"]

OTHER = "other"
"""Number 0: documents without a domain, and the domains too small to be told apart."""
MAX_SHOWN = 12

_MAX_KEPT = 2**16
_KINDS = {
    "character tables": "encodings stringprep unicodedata codecs",
    "help text": "pydoc_data",
    "network": "asyncore asynchat cgi email ftplib http imaplib ipaddress mailbox nntplib poplib smtpd smtplib "
    "socket socketserver ssl telnetlib urllib uu webbrowser wsgiref xmlrpc",
    "graphical": "idlelib tkinter turtle turtledemo",
    "concurrency": "_pyio asyncio concurrent contextvars multiprocessing queue sched selectors subprocess "
    "threading",
    "tests and debugging": "bdb cProfile doctest faulthandler logging pdb profile pstats pyclbr timeit trace "
    "traceback tracemalloc unittest warnings",
    "the language": "ast code codeop compileall dis inspect lib2to3 opcode py_compile pydoc symtable tabnanny "
    "token tokenize types typing",
    "packages": "distutils ensurepip imp importlib modulefinder pkgutil runpy site sysconfig venv zipapp zipimport",
    "formats": "aifc base64 bz2 chunk configparser csv dbm gzip html json lzma pickle pickletools plistlib shelve "
    "sndhdr sqlite3 sunau tarfile tomllib wave xdrlib xml zipfile",
    "numbers and dates": "_pydatetime _pydecimal _strptime calendar colorsys datetime decimal fractions numbers "
    "random statistics zoneinfo",
    "text and options": "argparse cmd difflib getopt gettext locale optparse re shlex sre_compile sre_constants "
    "sre_parse string textwrap",
}
_KIND_OF = {module: kind for kind, modules in _KINDS.items() for module in modules.split()}


def stdlib_domain(name: str) -> str:
    """What a module of the standard library is for, by its top-level name: one of a dozen kinds."""
    return _KIND_OF.get(name.partition("/")[0].removesuffix(".py"), OTHER)


def folder_domain(name: str) -> str:
    """The first folder of a file's name relative to ``data.path``; empty where it lies at the top."""
    folder, slash, _ = name.partition("/")
    return folder if slash else ""


def field_domain(row: dict[str, Any], field: str, where: str) -> str:
    """The domain that a row names. ``meta.source`` reaches into an object; null counts as none.

    Raises:
        ConfigError: naming the row: no such field, or not a single value.
    """
    value: Any = row
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(map(repr, value)) if isinstance(value, dict) else f"no fields but {value!r}"
            raise ConfigError(
                "data.domain_field", field, f"{where} has {known}", "name the field that says what kind it is"
            )
        value = value[part]
    if isinstance(value, (dict, list)):
        raise ConfigError(
            "data.domain_field", field, f"{where} holds a {type(value).__name__} there", "name a text field"
        )
    return "" if value is None else str(value)


class DomainWriter:
    """Packs the domain of every token as the tokens are packed, into two files of a folder."""

    def __init__(self, folder: Path, seq_len: int) -> None:
        self._folder = folder
        self._packer = Packer(seq_len)
        self._writer = RowWriter(folder / "valid_domains.arrow", seq_len, _MAX_KEPT)
        self._number = {OTHER: 0}

    def add(self, domains: Sequence[str], lengths: Sequence[int]) -> None:
        """Documents in the order in which their tokens were packed, and how many tokens each has."""
        numbers = [self._number_of(domain or OTHER) for domain in domains]
        tokens = [np.full(n, number, np.int32) for number, n in zip(numbers, lengths, strict=True)]
        self._writer.write(self._packer.push(tokens))

    def _number_of(self, domain: str) -> int:
        if domain not in self._number and len(self._number) == _MAX_KEPT:
            return 0
        return self._number.setdefault(domain, len(self._number))

    def close(self) -> None:
        """Write what is pending, and the names."""
        self._writer.close()
        (self._folder / "domains.json").write_text(json.dumps(list(self._number)))


class Domains:
    """The domains of held-out rows.

    Args:
        folder: that a :class:`DomainWriter` wrote.
        rows: of the held-out rows, those that are evaluated. The ``MAX_SHOWN`` domains with most tokens in
            them keep their names, the others become ``other``.

    Attributes:
        names: of the domains by number, ``other`` first; only one where nothing can be told apart.
    """

    def __init__(self, folder: Path, seq_len: int, rows: np.ndarray) -> None:
        kept: list[str] = json.loads((folder / "domains.json").read_text())
        numbers = Rows(folder / "valid_domains.arrow", seq_len)[rows][:, :-1]
        counts = np.bincount(numbers.reshape(-1), minlength=len(kept))
        counts[0] = 0
        shown = [int(n) for n in np.argsort(-counts, kind="stable")[:MAX_SHOWN] if counts[n]]
        self.names = [OTHER, *(kept[n] for n in shown)]
        place = np.zeros(len(kept), np.int64)
        place[shown] = np.arange(1, len(shown) + 1)
        self._ids = place[numbers]

    def of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Numbers of evaluated rows, ``[n, S]`` int64, by their sample ids (their place in the evaluation)."""
        return self._ids[sample_ids]
