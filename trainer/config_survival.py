"""What a config may say of checkpoints, failures, restarts and guards. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class StragglerAction(Enum):
    report = "report"
    replace = "replace"


@dataclass
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints; 0: at the end only."""
    keep_last: int = 2
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are never removed; 0: none."""
    max_failed_saves: int = 3
    """Saves in a row that may fail before the run stops; 1: it stops at the first one."""
    load_from: str | None = None
    """A run or checkpoint directory to start from when this run has no checkpoint of its own."""
    load_weights_only: bool = False
    """Of load_from: begin at step 0 with a new optimizer and data order instead of going on."""
    memory_every: int = -1
    """Steps between snapshots in memory that outlives workers; -1: as many as cost 2 % of the time; 0: none."""
    memory_slots: int = 3
    """Snapshots that each rank keeps in memory: how far back a rollback finds one."""
    memory_log: int = 3
    """With memory_every=1 and a native or accelerate engine: of so many snapshots after one of everything only the
    gradients are copied, and a restart does their updates again, to the bit. 0: everything after every step."""
    memory_dir: str | None = None
    """A folder of a memory mount for them, on every node; null: /dev/shm."""
    peer_every: int = -1
    """Steps between snapshots that are copied to another node's memory; -1: each, if there is another; 0: none."""


@dataclass
class ResilienceConfig:
    max_restarts: int = 5
    """Restarts without a new checkpoint in between, after which the run gives up (exit 70)."""
    collective_timeout_seconds: float = 600.0
    stop_grace_seconds: float = 120.0
    """How long workers may take to save after Ctrl-C or SIGTERM."""
    check_exchanges: bool = False
    """Before each exchange of tokens, agree on it out of band: ranks that diverge are then named, at some cost."""
    heartbeat_seconds: float = 3.0
    """How long a worker may be suspended (SIGSTOP) before it is replaced."""
    step_deadline_seconds: float = 60.0
    """What any part of a step may take at least."""
    deadline_factor: float = 10.0
    """Times its usual length, that a part of a step may take before its rank counts as hung."""
    standby: bool = True
    """Keep a process that has imported everything, and fork workers from it: a restart takes no start-up."""
    node_timeout_seconds: float = 30.0
    """How long a node may be silent before it counts as lost."""
    host_failures: int = 3
    """On several nodes: a host that fails so often within an hour is left out, if the run can go on without it; 0:
    never."""
    straggler_factor: float = 2.0
    """Times the median rank's work in a step, beyond which a rank is a straggler (CPUs only); 0: not compared."""
    straggler_seconds: float = 30.0
    """A window of at least so long, and of at least five steps, whose median is compared; three in a row decide."""
    straggler_action: StragglerAction = StragglerAction.report
    """``report``: an alarm names it; ``replace``: the workers are restarted, and it counts against its host."""


@dataclass
class GuardConfig:
    """What stands between a step and its commit (docs/fault-tolerance.md)."""

    non_finite: bool = False
    """A step whose loss or gradients are not finite does not commit: it is redone; if that recurs, stepped over."""
    max_skips: int = 20
    """Batches that a run may step over; one more, and it gives up (exit 70)."""
    max_skips_in_a_row: int = 3
    """The same for batches that follow one another."""
    digest_every: int = 0
    """Each step looks at one of this many parts of a rank's weights and optimizer, the parts in turn, for bits that
    changed between two updates; 1: at everything; 0: off."""
    replica_every: int = 0
    """Steps between comparisons of ranks that hold the same tensors; 0: off."""
    replay_every: int = 0
    """Steps between replays of each rank's micro-batch on the next rank, whose loss must be the same; 0: off."""
    max_rollbacks: int = 3
    """Times that a rank may be found to corrupt the run; once more, and it fails by name."""
    spike_sigma: float = 0.0
    """The same for a step whose loss is this many robust standard deviations (1.4826 · MAD) above the median of
    the steps before it; 0: off."""
    spike_window: int = 100
    """Steps that this median is over; nothing is judged before it is full."""
