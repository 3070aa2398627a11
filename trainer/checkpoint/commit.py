"""How ranks commit a checkpoint together without a collective, so that it can happen behind training.

Every rank writes its shard and a *part* (a small JSON: what is in the shard, its checksum, its share of
the digest) into one hidden directory. Rank 0 waits until all parts are there, checks that together they
hold every element exactly once, writes the manifest and renames the directory to its final name: that
rename is the commit. The others see it happen, or find the note that rank 0 leaves when it gives up.

Then every rank reads its shard back from the disk and takes its part away if it is what was written. Only when no
part is left may older checkpoints go; one that some rank could not read is taken back. (Who loads one compares its
checksums in any case: a crash in between is no danger.)

    .step-00000100.<attempt>-<n>.tmp/       being written, n-th save of this launch generation
      shard-00001.safetensors  part-00001.json      a rank's data; its part, written last
      failed-00001.json                             that rank gave up, and why
    .step-00000100.<attempt>-<n>.failed     rank 0 gave up, and why
    step-00000100/                          committed
      part-00001.json, failed-00001.json            not read back yet; read back, and found to be something else
    step-00000100.replaced/                 until another commit of the step, which took its name, was read back;
                                            a scan finds it, so some valid one is there at any time
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.digest import combine, weights_digest
from trainer.checkpoint.files import StorageError, fsync_directory, remove_tree, write_durably
from trainer.checkpoint.format import (
    MANIFEST,
    FileEntry,
    InvalidCheckpoint,
    Manifest,
    TensorEntry,
    parse_blob,
    parse_file,
    parse_tensor,
    read_manifest,
    shard_name,
    step_name,
)
from trainer.checkpoint.shards import file_fault, write_shard
from trainer.checkpoint.staging import Staged
from trainer.checkpoint.whole import Contents, check_whole, refused

_HIDDEN = re.compile(r"\.(?:step-\d{8,}|best)\.(?P<attempt>.+)-\d+\.(?:tmp|failed)")
_REPLACED = re.compile(r"step-\d{8,}\.replaced")


@dataclass(frozen=True)
class Attempt:
    """The paths of one save of one step. ``name`` is ``<attempt>-<n>``, the same on every rank."""

    directory: Path
    step: int
    name: str

    @property
    def final(self) -> Path:
        return self.directory / step_name(self.step)

    @property
    def tmp(self) -> Path:
        return self.directory / f".{step_name(self.step)}.{self.name}.tmp"

    @property
    def failed(self) -> Path:
        return self.tmp.with_suffix(".failed")

    @property
    def replaced(self) -> Path:
        return self.final.with_name(f"{self.final.name}.replaced")

    def part(self, rank: int) -> Path:
        return self.tmp / f"part-{rank:05d}.json"

    def rank_failed(self, rank: int) -> Path:
        return self.tmp / f"failed-{rank:05d}.json"


@dataclass(frozen=True)
class Part:
    """One rank's contribution as the others need to know it."""

    rank: int
    file: FileEntry
    digest: int
    tensors: dict[str, TensorEntry]
    rank_tensors: dict[str, Any]


def write_part(attempt: Attempt, rank: int, staged: Staged) -> FileEntry:
    """Write and flush this rank's shard, then its part. Returns what the shard is to be.

    Raises:
        OSError: the disk is full, refuses or fails; or rank 0 gave up and removed the directory meanwhile.
    """
    if not attempt.directory.exists():
        attempt.directory.mkdir(parents=True, exist_ok=True)
        fsync_directory(attempt.directory.parent)
    attempt.tmp.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as beside:
        digest = beside.submit(weights_digest, staged.weights)
        entry = FileEntry(staged.image.size, write_shard(attempt.tmp / shard_name(rank), staged.image))
    part = Part(rank, entry, digest.result(), staged.entries, staged.blobs)
    write_durably(attempt.part(rank), json.dumps(asdict(part)).encode())
    return entry


def read_part(path: Path) -> Part:
    """Read another rank's part."""
    body = json.loads(path.read_bytes())
    rank = body["rank"]
    return Part(
        rank,
        parse_file(shard_name(rank), body["file"]),
        body["digest"],
        {name: parse_tensor(name, node) for name, node in body["tensors"].items()},
        {name: parse_blob(name, node) for name, node in body["rank_tensors"].items()},
    )


def collect(attempt: Attempt, world_size: int, timeout_seconds: float) -> list[Part]:
    """Rank 0: wait for every rank's part.

    Raises:
        StorageError: a rank said that it failed, or some did not answer in time (they are named).
    """
    parts: dict[int, Part] = {}

    def arrived() -> bool:
        names = {entry.name for entry in attempt.tmp.iterdir()}
        for rank in set(range(world_size)) - parts.keys():
            if attempt.rank_failed(rank).name in names:
                raise _told(attempt.rank_failed(rank), f"rank {rank}")
            if attempt.part(rank).name in names:
                parts[rank] = read_part(attempt.part(rank))
        return len(parts) == world_size

    if not _poll(arrived, timeout_seconds):
        missing = sorted(set(range(world_size)) - parts.keys())
        late = StorageError(
            "checkpoint",
            attempt.final,
            f"after {timeout_seconds:g} s nothing was written by rank(s) {', '.join(map(str, missing))}",
            "see those ranks' logs; check that every node mounts the same run.root",
        )
        late.rank, late.host = missing[0], "unknown"
        raise late
    return [parts[rank] for rank in range(world_size)]


def assemble(
    attempt: Attempt,
    parts: list[Part],
    trainer: dict[str, Any],
    info: dict[str, Any],
    contents: Contents | None,
) -> Manifest:
    """Rank 0: the manifest of all parts, if they hold every element of every tensor exactly once.

    Args:
        contents: of the model; None: only what some rank names can be missed.

    Raises:
        StorageError: a tensor is missing elements or missing altogether, has some twice, or ranks disagree about
            it; or a shard is not as long as its rank wrote it.
    """
    tensors: dict[str, TensorEntry] = {}
    for part in parts:
        shard = attempt.tmp / shard_name(part.rank)
        if not shard.is_file() or shard.stat().st_size != part.file.bytes:
            raise StorageError(
                "checkpoint",
                shard,
                f"is not the {part.file.bytes:,} bytes that rank {part.rank} wrote",
                "check that every node mounts the same run.root",
            )
        for name, entry in part.tensors.items():
            known = tensors.get(name, TensorEntry(entry.dtype, entry.global_shape, ()))
            if (known.dtype, known.global_shape) != (entry.dtype, entry.global_shape):
                mine, other = _kind(entry), _kind(known)
                raise refused(name, f"rank {part.rank} holds it as {mine}, lower ranks as {other}")
            tensors[name] = TensorEntry(entry.dtype, entry.global_shape, known.chunks + entry.chunks)
    check_whole(tensors, contents)
    return Manifest(
        step=attempt.step,
        world_size=len(parts),
        weights_digest=combine(part.digest for part in parts),
        info=info,
        trainer=trainer,
        files={shard_name(part.rank): part.file for part in parts},
        tensors=tensors,
        rank_tensors={str(part.rank): part.rank_tensors for part in parts if part.rank_tensors},
    )


def publish(attempt: Attempt, manifest: Manifest) -> None:
    """Rank 0: write the manifest and give the directory its final name, durably.

    Where the step is committed already (it was recomputed after a rollback), the old one stays if it is
    the same and whole; else the new one takes its place.

    Raises:
        OSError: the file system refused; nothing committed was touched.
    """
    write_durably(attempt.tmp / MANIFEST, manifest.render())
    if not attempt.final.exists():
        attempt.tmp.rename(attempt.final)
    elif _is_same(attempt.final, manifest):
        remove_tree(attempt.tmp)
    else:
        remove_tree(attempt.replaced)  # of a crash before it was: its successor stands
        attempt.final.rename(attempt.replaced)
        attempt.tmp.rename(attempt.final)
    fsync_directory(attempt.directory)


def read_back(attempt: Attempt, rank: int, world_size: int, entry: FileEntry) -> None:
    """Read this rank's shard of a committed step from the disk, and take its part away.

    Raises:
        StorageError: the shard is not what was written: the step is taken back. Or another rank's is not.
    """
    if fault := file_fault(attempt.final / shard_name(rank), entry.bytes, entry.checksum, from_disk=True):
        raise_if_failed(attempt)  # rank 0 took the step back meanwhile
        error = StorageError(
            "checkpoint",
            attempt.final / shard_name(rank),
            f"read back after the commit, it {fault}; older checkpoints were kept",
            "check the disk; set run.root to another one",
        )
        if rank == 0:
            take_back(attempt, world_size, error)
        else:
            _try_write(attempt.final / attempt.rank_failed(rank).name, _note(attempt, rank, error))
        raise error
    (attempt.final / attempt.part(rank).name).unlink(missing_ok=True)


def await_read_back(attempt: Attempt, world_size: int, timeout_seconds: float) -> None:
    """Rank 0: wait until every rank has read its shard back; then what the step replaced may go.

    Raises:
        StorageError: a rank found another file: the step is taken back. Or one did not answer in time.
    """
    waiting: list[str] = []

    def done() -> bool:
        waiting[:] = sorted(entry.name for entry in attempt.final.iterdir() if entry.suffix == ".json")
        told = [name for name in waiting if name.startswith("failed-")]
        if told:
            error = _told(attempt.final / told[0], _rank_of(told[0]))
            take_back(attempt, world_size, error)
            raise error
        return not any(name.startswith("part-") for name in waiting)

    if not _poll(done, timeout_seconds):
        first = next(name for name in waiting if name.startswith("part-"))
        late = StorageError(
            "checkpoint",
            attempt.final,
            f"{timeout_seconds:g} s after the commit, {_rank_of(first)} has not read its shard back",
            "see that rank's log; check that every node mounts the same run.root",
        )
        late.rank, late.host = int(_rank_of(first).split()[1]), "unknown"
        raise late
    remove_tree(attempt.replaced)


def _rank_of(name: str) -> str:
    """``part-00001.json`` → ``rank 1``."""
    return f"rank {int(Path(name).stem.partition('-')[2])}"


def take_back(attempt: Attempt, world_size: int, error: Exception) -> None:
    """Rank 0: a committed step is not what was written: tell the others, and remove it. Raises no OSError."""
    if world_size > 1:
        _try_write(attempt.failed, _note(attempt, 0, error))
    with suppress(OSError):
        attempt.final.rename(attempt.tmp)
        if attempt.replaced.exists():
            attempt.replaced.rename(attempt.final)
        fsync_directory(attempt.directory)
    remove_tree(attempt.tmp)


def _is_same(committed: Path, manifest: Manifest) -> bool:
    try:
        if read_manifest(committed) != manifest:
            return False
    except InvalidCheckpoint:
        return False
    return all(
        file_fault(committed / name, entry.bytes, entry.checksum) is None
        for name, entry in manifest.files.items()
    )


def await_commit(attempt: Attempt, timeout_seconds: float) -> None:
    """Other ranks: wait until rank 0 has committed or given up.

    Raises:
        StorageError: it gave up (with its reason), or neither happened in time.
    """

    def done() -> bool:
        raise_if_failed(attempt)
        return not attempt.tmp.exists() and (attempt.final / MANIFEST).is_file()

    if not _poll(done, timeout_seconds):
        raise StorageError(
            "checkpoint",
            attempt.final,
            f"after {timeout_seconds:g} s rank 0 had neither committed it nor given up",
            "see rank 0's log; check that every node mounts the same run.root",
        )


def abandon(attempt: Attempt, rank: int, world_size: int, error: Exception) -> None:
    """After a failure: tell the other ranks why and remove what was written. Raises no OSError."""
    note = _note(attempt, rank, error)
    if rank == 0:
        # On a full disk there is room for the note only after the removal.
        noted = world_size == 1 or _try_write(attempt.failed, note)
        remove_tree(attempt.tmp)
        if not noted:
            _try_write(attempt.failed, note)
        remove_tree(attempt.tmp)  # again: a rank that had not seen the note may have written into it
    elif attempt.failed.exists():  # rank 0 has given up before: there is nobody to tell
        remove_tree(attempt.tmp)
    elif not attempt.part(rank).exists():  # else rank 0 may be about to commit this shard
        with suppress(OSError):
            (attempt.tmp / shard_name(rank)).unlink(missing_ok=True)
        _try_write(attempt.rank_failed(rank), note)
        if attempt.failed.exists():  # rank 0 gave up meanwhile, maybe too early to remove this note
            remove_tree(attempt.tmp)


def _note(attempt: Attempt, rank: int, error: Exception) -> bytes:
    """What others are to know of an error of this rank, or of one that it was told of."""
    relation = error.relation if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
    fix = error.fix if isinstance(error, StorageError) else "see that rank's log"
    value = str(error.value) if isinstance(error, StorageError) else str(attempt.final)
    where = {"rank": rank, "host": socket.gethostname()}
    if isinstance(error, StorageError) and error.rank is not None:
        where = {"rank": error.rank, "host": error.host or "unknown"}
    return json.dumps({"value": value, "relation": relation, "fix": fix, **where}).encode()


def _try_write(path: Path, note: bytes) -> bool:
    try:
        write_durably(path, note)
    except OSError:
        return False
    return True


def raise_if_failed(attempt: Attempt) -> None:
    """Raise rank 0's reason as StorageError if it has given this attempt up."""
    if attempt.failed.exists():
        raise _told(attempt.failed, "rank 0")


def _told(note: Path, who: str) -> StorageError:
    body = json.loads(note.read_bytes())
    told = StorageError("checkpoint", body["value"], f"{who} gave up: {body['relation']}", body["fix"])
    told.rank, told.host = body["rank"], body["host"]
    return told


def _kind(entry: TensorEntry) -> str:
    return f"{entry.dtype}{list(entry.global_shape)}"


def _poll(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Ask until true, ever more slowly, so that thousands of ranks do not hammer a file server."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited >= timeout_seconds:
            return False
        pause = min(max(0.002, waited / 16), 0.25)
        time.sleep(min(pause, timeout_seconds - waited))
    return True


def remove_stale(directory: Path, attempt: str) -> list[Path]:
    """Rank 0 at start-up: clear away what other launch generations left half-done.

    Hidden directories and notes of other attempts are removed, a step that a crash left under its
    ``.replaced`` name gets its own back. Of committed checkpoints only parts go, which nobody will read back.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _HIDDEN.fullmatch(path.name)
        if match and match["attempt"] != attempt:
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)
            removed.append(path)
        elif _REPLACED.fullmatch(path.name):
            final = path.with_suffix("")
            if final.exists():
                remove_tree(path)
                removed.append(path)
            else:
                path.rename(final)
        elif (path / MANIFEST).is_file():
            for part in path.glob("part-*.json"):
                part.unlink(missing_ok=True)
                removed.append(part)
    return removed
