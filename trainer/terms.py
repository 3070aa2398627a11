"""Who leads a run: a term a leader, counted up, at a place that outlives every node.

Two agents may both think that it is their turn. Only one of them can claim term N + 1: the file system or etcd
decides. Who leads shows a beat there; who finds a newer term than its own has been replaced, and leaves.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import ConfigError

_NAME = re.compile(r"\.term-(\d+)")
_BEAT_SECONDS = 1.0
_HTTP_SECONDS = 5.0


@dataclass(frozen=True)
class Term:
    """A leader's time.

    Attributes:
        number: from 1, without a gap.
        host: its name.
        address, port: of its control store.
    """

    number: int
    host: str
    address: str
    port: int


class Terms(Protocol):
    """The place where terms are written. Every method may raise OSError: the place cannot be reached."""

    def newest(self) -> Term | None:
        """The term that is, or was last."""
        ...

    def claim(self, term: Term) -> bool:
        """Begin a term. False: another one of this number, or a newer one, is there already."""
        ...

    def beat(self, count: int) -> None:
        """Show that the leader lives."""
        ...

    def last_beat(self) -> str:
        """What the leader showed last; it lives while this changes."""
        ...


class FileTerms:
    """Files in the run directory, on the file system that all nodes share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> Term | None:
        numbers = [int(m[1]) for path in self._folder.glob(".term-*") if (m := _NAME.fullmatch(path.name))]
        if not numbers:
            return None
        return Term(**json.loads((self._folder / f".term-{max(numbers)}").read_text()))

    def claim(self, term: Term) -> bool:
        newest = self.newest()
        if newest is not None and newest.number >= term.number:
            return False
        aside = self._folder / f".claim-{term.host}-{os.getpid()}"
        aside.write_text(json.dumps(asdict(term)))
        try:
            os.link(
                aside, self._folder / f".term-{term.number}"
            )  # whole, or not at all; on network disks, too
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def beat(self, count: int) -> None:
        # Always the same bytes in the same place: that takes no room, not even on a full disk.
        text = f"{time.time():020.6f} {count:020d}\n".encode()
        with suppress(OSError):
            descriptor = os.open(self._folder / ".beat", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, text, 0)
            finally:
                os.close(descriptor)

    def last_beat(self) -> str:
        try:
            return (self._folder / ".beat").read_text()
        except FileNotFoundError:
            return ""


class EtcdTerms:
    """Two keys in an etcd (3.4 or newer), through its JSON gateway; no package is needed.

    The term's key is written in one transaction that compares its version, which etcd counts from 1: the number of
    the term is the version of the key.

    Args:
        endpoint: ``http://host:port``.
        run: names the run among others.
    """

    def __init__(self, endpoint: str, run: str) -> None:
        self._endpoint = endpoint
        self._term, self._beat = f"/muster/{run}/term", f"/muster/{run}/beat"

    def newest(self) -> Term | None:
        text = self._get(self._term)
        return None if text is None else Term(**json.loads(text))

    def claim(self, term: Term) -> bool:
        key = _base64(self._term)
        put = {"requestPut": {"key": key, "value": _base64(json.dumps(asdict(term)))}}
        compare = {"key": key, "target": "VERSION", "result": "EQUAL", "version": str(term.number - 1)}
        return bool(self._call("txn", {"compare": [compare], "success": [put]}).get("succeeded"))

    def beat(self, count: int) -> None:
        self._call("put", {"key": _base64(self._beat), "value": _base64(f"{time.time():.6f} {count}")})

    def last_beat(self) -> str:
        return self._get(self._beat) or ""

    def _get(self, key: str) -> str | None:
        found = self._call("range", {"key": _base64(key)}).get("kvs")
        return base64.b64decode(found[0]["value"]).decode() if found else None

    def _call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        import urllib.request  # here: a config is checked without it

        request = urllib.request.Request(
            f"{self._endpoint}/v3/kv/{method}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_HTTP_SECONDS) as answer:
            found = json.loads(answer.read())
        assert isinstance(found, dict)
        return found


def open_terms(rendezvous: str | None, run_dir: Path) -> Terms:
    """The place that ``launcher.rendezvous`` names.

    Raises:
        ConfigError: it names none.
    """
    if rendezvous is None:
        return FileTerms(run_dir)
    scheme, _, place = rendezvous.partition("://")
    host, _, port = place.rpartition(":")
    if scheme != "etcd" or not host or not port.isdigit():
        raise ConfigError(
            "launcher.rendezvous",
            rendezvous,
            "names an etcd as etcd://HOST:PORT, or is null for the run directory",
            "launcher.rendezvous=etcd://etcd-host:2379",
        )
    return EtcdTerms(f"http://{place}", f"{run_dir.parent.name}/{run_dir.name}")


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Lease(threading.Thread):
    """A leader's hold on its term: shows its beat, and looks whether somebody has begun a newer term.

    Args:
        patience_seconds: how long the place may be out of reach before the term counts as lost.
    """

    def __init__(self, terms: Terms, term: Term, patience_seconds: float) -> None:
        super().__init__(name="muster-lease", daemon=True)
        self.term = term
        self._terms, self._patience = terms, patience_seconds
        self._held = time.monotonic()
        self._newer: Term | None = None
        self._ended = threading.Event()
        self.start()

    def lost(self, alone: bool) -> str | None:
        """Why this agent leads no longer; None while it does.

        Args:
            alone: not all nodes work for it. Others may then have begun a term that it cannot see while the place
                is out of reach; where all nodes work for it, nobody can have.
        """
        if self._newer is not None:
            return f"{self._newer.host} has taken over the run (term {self._newer.number})"
        silent = time.monotonic() - self._held
        if alone and silent > self._patience:
            return f"its term cannot be held: no answer for {silent:.0f} s"
        return None

    def check(self) -> None:
        """Look at once, before something that only a leader may do."""
        newest = self._terms.newest()
        self._newer = newest if newest is not None and newest.number > self.term.number else None
        self._held = time.monotonic()

    def run(self) -> None:
        count = 0
        while not self._ended.wait(_BEAT_SECONDS if count else 0.0) and self._newer is None:
            count += 1
            with suppress(OSError):
                self._terms.beat(count)
                self.check()

    def end(self) -> None:
        """Let go of the term: who waits for the beat to stop may take over."""
        self._ended.set()
        self.join(2 * _HTTP_SECONDS)
