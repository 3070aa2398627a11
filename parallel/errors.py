"""The one error type a user ever sees for a value they chose."""

from __future__ import annotations


class ConfigError(ValueError):
    """A value the user gave that cannot work, said in four parts.

    Commands print it as one message without a traceback and exit with code 2.

    Args:
        field: dotted path of the config field (``parallel.ep``) or the input's name.
        value: what was given.
        relation: the rule that failed, with the numbers in it.
        fix: what to do: the nearest valid value where there is one.
    """

    kind = "config"
    """As in the event ``failure``; of a subclass, where the value is right and something else is not."""

    def __init__(self, field: str, value: object, relation: str, fix: str) -> None:
        self.field, self.value, self.relation, self.fix = field, value, relation, fix
        super().__init__(field, value, relation, fix)

    def __str__(self) -> str:
        return f"{self.field}={self.value}: {self.relation}. Fix: {self.fix}."


class NamedFailure(RuntimeError):
    """What all ranks agree went wrong, and the rank that is to blame; a restart may mend it.

    Args:
        kind: as in the event ``failure``: ``non-finite``, ``corruption``, ``straggler``.
        cause: for a person.
        rank: to blame, if one is.
        host: its name.
        began: unix time since which it went wrong, if that was not just now.
        evidence: what the cause rests on.
    """

    def __init__(
        self,
        kind: str,
        cause: str,
        rank: int | None = None,
        host: str | None = None,
        began: float | None = None,
        evidence: str | None = None,
    ) -> None:
        self.kind, self.cause, self.rank, self.host = kind, cause, rank, host
        self.began, self.evidence = began, evidence
        super().__init__(cause)


class FatalError(NamedFailure):
    """The same, where no restart would mend it: the run gives up (exit code 70)."""
