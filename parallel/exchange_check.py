"""Whether the ranks of an expert-parallel group come to the same exchange, found out without a collective.

An exchange that some ranks do not come to hangs, and one in which a rank sends other sizes than its peer expects
hangs or, worse, does not. With the check on, a rank first writes where it is and what it will send into the
rendezvous store, reads what its peers wrote, and goes on only if all agree.

    exchange/GROUP/NUMBER/RANK   where the rank is and its sizes; NUMBER counts the exchanges of the group
    place/RANK                   where the rank came to last and when; it stays, for those who ask after a failure

Ranks in keys and messages are global. Torch-free, so that supervisors can read places.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

K = TypeVar("K", bound=Hashable)

_BLOCKING_SECONDS = 2.0
"""How long to wait inside the store, which answers fastest; a signal is handled only after it."""
_POLL_SECONDS = 0.1
_MAX_PLACES = 6
_MAX_RANGES = 8
_MAX_PAIRS = 4


class DesyncError(RuntimeError):
    """Ranks of a group are not at the same exchange, or do not agree on its sizes.

    Attributes:
        kind: what it is to a supervisor: ``hang`` where a rank did not come, ``crash`` where one is elsewhere.
    """

    def __init__(self, message: str, kind: str = "crash") -> None:
        super().__init__(message)
        self.kind = kind


class Spot(NamedTuple):
    """A place in the program, equal on all ranks that are in step.

    Attributes:
        step: optimizer step, counted as in ``metrics.jsonl`` (the first is 1); 0 before it.
        part: of the step: a micro-batch, the optimizer, an evaluation; empty where there is only one.
        layer: index of the block; None where the model did not say, or outside of layers.
        operation: of the dispatcher; empty outside of exchanges.
    """

    step: int
    part: str = ""
    layer: int | None = None
    operation: str = ""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}"
        return ", ".join(text for text in (f"step {self.step}", self.part, layer, self.operation) if text)


class _Fingerprint(NamedTuple):
    spot: Spot
    row: str
    send: list[int]
    recv: list[int]

    @classmethod
    def decode(cls, value: bytes) -> _Fingerprint:
        spot, row, send, recv = json.loads(value)
        return cls(Spot(*spot), row, send, recv)


class ExchangeCheck:
    """One rank's side of the check.

    Args:
        store: that all ranks share, with a prefix of its own for this launch of them.
        rank: of this process.
        ranks: of its expert-parallel group, in the order of the group.
        world_size: of the whole job, to say where everyone is.
        timeout_seconds: how long peers may take to come to an exchange.
    """

    def __init__(
        self, store: Store, rank: int, ranks: Sequence[int], world_size: int, timeout_seconds: float
    ) -> None:
        # A connection of its own: other users of the store must not wait while this one does.
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._store.set_timeout(timedelta(seconds=min(_BLOCKING_SECONDS, timeout_seconds)))
        self.rank, self.ranks, self.world_size = rank, list(ranks), world_size
        self.timeout_seconds = timeout_seconds
        self._number = 0
        self.spot = Spot(0)
        self.enter("start", 0)

    def enter(self, part: str, step: int | None = None) -> None:
        """Say which part of which step this rank comes to (None: still the same step)."""
        self.spot = Spot(self.spot.step if step is None else step, part)
        self._store.set(f"place/{self.rank}", _place(self.spot))

    def before(self, layer: int | None, operation: str, row: str, send: list[int], recv: list[int]) -> None:
        """Agree with the group on the exchange that comes next.

        Args:
            row: shape and type of a row, as text; rows of all ranks must be alike.
            send, recv: rows for and from each rank of the group.

        Raises:
            DesyncError: on every rank of the group, before any of them has begun the exchange.
        """
        spot = Spot(self.spot.step, self.spot.part, layer, operation)
        own = json.dumps(_Fingerprint(spot, row, send, recv))
        self._store.set(self._key(self.rank), own)
        self._store.set(f"place/{self.rank}", _place(spot))
        found = [_Fingerprint.decode(value) for value in self._of_all(spot)]
        # Who is here has read all of the exchange before.
        if self._number:
            self._store.delete_key(self._key(self.rank, self._number - 1))
        self._number += 1
        difference = _difference(dict(zip(self.ranks, found, strict=True)))
        if difference is not None:
            raise DesyncError(difference)

    def _key(self, rank: int, number: int | None = None) -> str:
        group = f"{self.ranks[0]}-{self.ranks[-1]}-{len(self.ranks)}"
        return f"exchange/{group}/{self._number if number is None else number}/{rank}"

    def _of_all(self, spot: Spot) -> list[bytes]:
        """The group's fingerprints, once all are there."""
        keys = [self._key(rank) for rank in self.ranks]
        until = time.monotonic() + self.timeout_seconds
        # Its time is up, or the store is gone: then the next call says so.
        with contextlib.suppress(RuntimeError):
            return self._store.multi_get(keys)
        # Not inside the store any more: each wait there that ends in vain leaves lines in the log.
        while not self._store.check(keys):
            if time.monotonic() > until:
                raise self._missing(spot)
            time.sleep(_POLL_SECONDS)
        return self._store.multi_get(keys)

    def _missing(self, spot: Spot) -> DesyncError:
        absent = [rank for rank in self.ranks if not self._store.check([self._key(rank)])]
        present = [rank for rank in self.ranks if rank not in absent]
        verb = "has" if len(absent) == 1 else "have"
        return DesyncError(
            f"timed out after {self.timeout_seconds:g} s: {_names(absent)} {verb} not come to the exchange where "
            f"{_names(present)} of the same expert-parallel group wait{'s' if len(present) == 1 else ''} ({spot}). "
            f"Where the ranks are: {describe_places(self._store, self.world_size)}",
            kind="hang",
        )


@dataclass(frozen=True)
class Notice:
    """What one kind of exchange of one layer says before it begins.

    Attributes:
        operation: ``counts``, ``dispatch`` or ``combine``.
    """

    check: ExchangeCheck
    layer: int | None
    operation: str

    def before(self, rows: Tensor, send: list[int], recv: list[int], backward: bool) -> None:
        """See :meth:`ExchangeCheck.before`; ``backward`` for the gradients of an exchange, on their way home."""
        operation = f"{self.operation} (backward)" if backward else self.operation
        row = f"{list(rows.shape[1:])} {str(rows.dtype).removeprefix('torch.')}"
        self.check.before(self.layer, operation, row, send, recv)


def _difference(found: Mapping[int, _Fingerprint]) -> str | None:
    """What the ranks of a group do not agree on, or None."""
    prints = list(found.values())
    spot = prints[0].spot
    if any(other.spot != spot for other in prints):
        told = _by_place({rank: one.spot for rank, one in found.items()})
        return f"ranks of an expert-parallel group are not at the same exchange: {told}"
    if any(other.row != prints[0].row for other in prints):
        rows = {rank: f"rows of {one.row}" for rank, one in found.items()}
        told = "; ".join(f"{_names(ranks)}: {row}" for row, ranks in _grouped(rows))
        return f"ranks of an expert-parallel group exchange unlike rows at {spot}: {told}"
    if all(one.send == [other.recv[i] for other in prints] for i, one in enumerate(prints)):
        return None
    pairs = [
        f"rank {source} sends {one.send[j]} rows to rank {target}, which expects {other.recv[i]}"
        for i, (source, one) in enumerate(found.items())
        for j, (target, other) in enumerate(found.items())
        if one.send[j] != other.recv[i]
    ]
    told = "; ".join(pairs[:_MAX_PAIRS])
    more = f"; and {len(pairs) - _MAX_PAIRS} more pairs" if len(pairs) > _MAX_PAIRS else ""
    sent, expected = (sum(map(sum, sizes)) for sizes in zip(*((p.send, p.recv) for p in prints), strict=True))
    return (
        f"ranks of an expert-parallel group do not agree on the sizes of an exchange at {spot}: {told}{more} "
        f"(the group sends {sent} rows and expects {expected})"
    )


def describe_places(store: Store, world_size: int) -> str:
    """Where every rank came to last, in one line of bounded length; empty if no rank has said.

    The rarest places come first: a rank that is behind, or gone astray, is seldom in company.

    Args:
        store: with the prefix of the launch, as given to :class:`ExchangeCheck`.

    Raises:
        RuntimeError: the store's host is gone.
    """
    keys = [f"place/{rank}" for rank in range(world_size)]
    if store.check(keys):
        values: dict[int, bytes] = dict(enumerate(store.multi_get(keys)))
    else:
        values = {rank: store.get(key) for rank, key in enumerate(keys) if store.check([key])}
    if not values:
        return ""
    spots: dict[int, Spot | None] = dict.fromkeys(range(world_size))
    times = {}
    for rank, value in values.items():
        times[rank], spot = json.loads(value)
        spots[rank] = Spot(*spot)
    return _by_place(spots, times)


def describe_places_within(store: Store, world_size: int, seconds: float) -> str:
    """:func:`describe_places` for the way out of a failed process: never raises, never takes longer.

    Empty where the store does not answer in time. A thread may be left waiting for it.
    """
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(describe_places(store, world_size))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else ""


def _place(spot: Spot) -> str:
    return json.dumps([time.time(), spot])


def _by_place(spots: Mapping[int, Spot | None], times: Mapping[int, float] | None = None) -> str:
    """``rank 1 at step 7, layer 3, combine, 12 s ago; ranks 0, 2-3 at …``; the age is of a place's last comer."""
    now = time.time()
    last = {rank: times[rank] for rank in spots if rank in times} if times else {}
    # The rarest first, and of those the one that is longest there.
    groups = sorted(_grouped(spots), key=lambda of: (len(of[1]), min(last.get(rank, 0.0) for rank in of[1])))
    parts = []
    for spot, ranks in groups:
        where = "not heard of yet" if spot is None else f"at {spot}"
        ages = [now - last[rank] for rank in ranks if rank in last]
        age = f", {max(0.0, min(ages)):.0f} s ago" if ages else ""
        who = f"all {len(ranks)} ranks" if len(ranks) == len(spots) > 1 else _names(ranks)
        parts.append(f"{who} {where}{age}")
    if len(parts) > _MAX_PLACES:
        between = groups[_MAX_PLACES - 1 : -1]
        num_ranks = sum(len(ranks) for _, ranks in between)
        parts[_MAX_PLACES - 1 : -1] = [f"{num_ranks:,} ranks at {len(between):,} other places"]
    return "; ".join(parts)


def _grouped(of_rank: Mapping[int, K]) -> list[tuple[K, list[int]]]:
    """Ranks by what they have, the rarest first."""
    groups: dict[K, list[int]] = {}
    for rank, value in of_rank.items():
        groups.setdefault(value, []).append(rank)
    return sorted(groups.items(), key=lambda group: len(group[1]))


def _names(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 0, 2-3``, or only how many where that would be long."""
    ranges: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1] = (ranges[-1][0], rank)
        else:
            ranges.append((rank, rank))
    if len(ranges) > _MAX_RANGES:
        return f"{len(ranks):,} ranks"
    listed = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
