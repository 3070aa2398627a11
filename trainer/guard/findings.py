"""What a guard finds, and what it makes of it."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.errors import NamedFailure


@dataclass(frozen=True)
class Finding:
    """Why a step does not commit; the same on every rank.

    Attributes:
        kind: ``non_finite``, ``spike`` or ``corruption``.
        what: it was, for a person.
        value: the loss, nats a token.
        threshold: that the loss was above; None where it or a gradient is not finite.
        rank, host: where it was seen first; None of what only the sum over all ranks shows.
        evidence: names of tensors, or numbers.
    """

    kind: str
    what: str
    value: float | None = None
    threshold: float | None = None
    rank: int | None = None
    host: str | None = None
    evidence: str = ""

    @property
    def words(self) -> str:
        """After "step N"."""
        where = "" if self.rank is None else f"rank {self.rank} on {self.host}: "
        if self.kind == "spike":
            return f"is a loss spike ({self.value:.4g} > {self.threshold:.4g})"
        if self.kind == "corruption":
            return f"met silent corruption ({where}{self.what})"
        return f"is not finite ({where}{self.what})"


class RollBack(Exception):
    """The run must go back to a state of at most this many steps. All ranks raise it together, between steps.

    Attributes:
        failure: to end in then, so that a restart does not go on from a state that is given up.
    """

    def __init__(self, at_most: int, reason: str, failure: NamedFailure | None = None) -> None:
        self.at_most, self.reason, self.failure = at_most, reason, failure
        super().__init__(reason)
