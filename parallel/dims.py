"""ParallelDims: every parallel degree of a run in one frozen object. Pure arithmetic, no torch.

The world is one grid of ranks seen through two views (slowest axis first):

    ======  ==========================================  =================================
    view    axes                                        who uses it
    ======  ==========================================  =================================
    dense   pp · dp_replicate · dp_shard · cp · tp      every parameter but the experts'
    sparse  pp · dp_replicate · expert_shard · ep       the experts
    ======  ==========================================  =================================

``ep`` is carved from ``dp_shard · cp · tp`` and never multiplies the world: the ranks that shard the
dense parameters between them also hold the experts between them, ``ep`` ranks per full set, and
``expert_shard = dp_shard · cp · tp / ep`` such sets, among which each expert is sharded (FSDP) again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel.errors import ConfigError

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
SPARSE_AXES = ("pp", "dp_replicate", "expert_shard", "ep")
RESERVED_AXES = ("cp", "tp", "pp")


def nearest(wanted: int, legal: list[int]) -> int:
    """The legal value closest to ``wanted`` (the smaller one of a tie)."""
    return min(sorted(legal), key=lambda value: abs(value - wanted))


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of one world. Build it with :meth:`create`, which checks them.

    Raises (from :meth:`create`):
        ConfigError: a degree is below 1, reserved, or the product is not the world size.
    """

    world_size: int
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @classmethod
    def create(
        cls,
        world_size: int,
        *,
        dp_replicate: int = 1,
        dp_shard: int = -1,
        cp: int = 1,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
    ) -> ParallelDims:
        """Fill ``dp_shard=-1`` with what is left of the world, and check every degree."""
        degrees = {"dp_replicate": dp_replicate, "cp": cp, "tp": tp, "pp": pp, "ep": ep}
        for name, degree in degrees.items():
            if degree < 1:
                raise ConfigError(f"parallel.{name}", degree, "a parallel degree is at least 1", f"{name}=1")
        for name in RESERVED_AXES:
            if degrees[name] > 1:
                raise ConfigError(
                    f"parallel.{name}",
                    degrees[name],
                    f"{name} is reserved: it is named in the meshes but not built yet",
                    f"parallel.{name}=1 and use dp_shard, dp_replicate or ep instead",
                )
        others = dp_replicate * cp * tp * pp
        if dp_shard == -1:
            if world_size % others:
                raise ConfigError(
                    "parallel.dp_replicate",
                    dp_replicate,
                    f"the world of {world_size} rank(s) is not divisible by "
                    f"dp_replicate·cp·tp·pp = {others}, so dp_shard=-1 cannot fill it",
                    f"parallel.dp_replicate={nearest(dp_replicate, divisors(world_size))}",
                )
            dp_shard = world_size // others
        if dp_shard < 1:
            raise ConfigError(
                "parallel.dp_shard",
                dp_shard,
                "dp_shard is at least 1, or -1 to fill the world",
                "dp_shard=-1",
            )
        if others * dp_shard != world_size:
            raise ConfigError(
                "parallel.dp_shard",
                dp_shard,
                f"dp_replicate·dp_shard·cp·tp·pp = {others * dp_shard} must equal the world of "
                f"{world_size} rank(s) (launcher.nnodes · launcher.nproc_per_node)",
                f"parallel.dp_shard={world_size // others}"
                if world_size % others == 0
                else f"launcher.nproc_per_node={others * dp_shard}",
            )
        room = dp_shard * cp * tp
        if room % ep:
            raise ConfigError(
                "parallel.ep",
                ep,
                f"ep is carved from dp_shard·cp·tp = {room}, which it must divide",
                f"parallel.ep={nearest(ep, divisors(room))}",
            )
        return cls(world_size, dp_replicate, dp_shard, cp, tp, pp, ep)

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_shard(self) -> int:
        """Full sets of experts inside one replica; each expert is FSDP-sharded over this many ranks."""
        return self.dp_shard * self.cp * self.tp // self.ep

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def sparse_shape(self) -> tuple[int, ...]:
        return (self.pp, self.dp_replicate, self.expert_shard, self.ep)

    def dense_coordinate(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on each dense axis."""
        return dict(zip(DENSE_AXES, _unravel(rank, self.dense_shape), strict=True))

    def sparse_coordinate(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on each sparse axis."""
        return dict(zip(SPARSE_AXES, _unravel(rank, self.sparse_shape), strict=True))

    def dp_rank(self, rank: int) -> int:
        """Which of the ``dp`` slices of a batch this rank reads."""
        at = self.dense_coordinate(rank)
        return at["dp_replicate"] * self.dp_shard + at["dp_shard"]

    def legal_ep(self, num_experts: int) -> list[int]:
        """Every ep that divides both the sharding ranks and the experts."""
        return divisors(math.gcd(self.dp_shard * self.cp * self.tp, num_experts))

    def __str__(self) -> str:
        shown = {name: getattr(self, name) for name in (*DENSE_AXES, "ep")}
        return " × ".join(f"{name} {degree}" for name, degree in shown.items() if degree > 1) or "one process"


def _unravel(index: int, shape: tuple[int, ...]) -> list[int]:
    coordinate = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        coordinate.append(at)
    return coordinate[::-1]
