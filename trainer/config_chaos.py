"""What a config may say of faults that are injected, and of how a cluster fails. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class InterruptionConfig:
    """How a category of a failure table is injected.

    Attributes:
        kinds: kind of fault (docs/chaos.md) → weight.
        reason: why these.
    """

    kinds: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass
class ClusterConfig:
    name: str = "none"
    """A label for messages."""
    interruptions: str | None = None
    """A CSV with the columns component, category, interruptions: what failed there, and how often. A name without
    a folder is beside the files of conf/cluster."""
    faults: dict[str, InterruptionConfig] = field(default_factory=dict)
    """Component of that table → {kinds: {kind: weight}, reason}: the faults that stand for it."""


@dataclass
class ChaosConfig:
    """Read by ``muster chaos`` alone."""

    faults: int = 0
    """Interruptions drawn from the table of the cluster; 0: all of them."""
    seed: int = 0
    """Of the draw: which faults, at which steps, on which ranks, at which points of the step."""
    kinds: list[str] = field(default_factory=list)
    """Faults by name, one each in this order, instead of the cluster's."""
    schedule: str | None = None
    """A file of JSON lines {step, rank, kind, point} to replay, instead of drawing."""
    nodes: int = 0
    """Network namespaces that the disturbed training is spread over (as root): nodes with a memory mount of their
    own, with launcher.nproc_per_node ranks each. 0: none; what strikes nodes is stood in for."""
    nodes_gone: int = 0
    """Of the nodes that are lost, so many, the first ones, do not come back: the run goes on with the rest, and its
    losses must be those of the undisturbed run up to rounding."""
    reference: str | None = None
    """The directory of a finished run of the same config to compare with; null: it is trained first."""
