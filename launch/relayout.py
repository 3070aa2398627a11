"""The layout of a run whose number of nodes has changed. Pure and torch-free.

The full layout, for MAX nodes, is the user's. For fewer nodes these rules apply, in this order:

1. ``dp_shard`` stays where the user fixed it, or becomes the largest smaller divisor of the world; the replicas are
   the rest. Where it was left blank, the replicas stay (or become the largest smaller divisor) and ``dp_shard`` is
   the rest.
2. ``ep`` is the largest that is not above the full layout's and that every rule of a config allows.
3. The global batch stays, in more micro-batches a step. They are the largest that are not above the full layout's
   (activations take no more memory) and waste the fewest rows.
4. Where rows are left over, ``train.pad_batch`` fills up with rows that have no targets.
"""

from __future__ import annotations

import copy

from parallel.dims import ParallelDims, divisors
from parallel.errors import ConfigError
from trainer.config import RunConfig, parallel_dims, require
from trainer.config_launcher import node_range, num_nodes
from trainer.layout_rules import split_of
from trainer.rules import validate


def relayout(full: RunConfig, asked: RunConfig | None, nodes: int) -> RunConfig:
    """The config of the same run on so many nodes; the full one itself where they are all there.

    Args:
        full: resolved and validated, for the most nodes.
        asked: as the user wrote it, blanks included; None: what can be left blank counts as left blank.
        nodes: within ``launcher.nnodes``.

    Raises:
        ConfigError: no layout for so many nodes keeps every rule; the message is that of the nearest one.
    """
    if nodes == node_range(full.launcher).most:
        c = copy.deepcopy(full)
        c.launcher.num_nodes = -1
        return c
    c = copy.deepcopy(full)
    c.launcher.num_nodes = nodes
    _share(c, fixed=asked is not None and asked.parallel.dp_shard != -1)
    error: ConfigError | None = None
    for ep in reversed([ep for ep in divisors(c.parallel.dp_shard) if ep <= full.parallel.ep]):
        c.parallel.ep = ep
        try:
            _split_batch(c, full, parallel_dims(c))
            validate(c)
            return c
        except ConfigError as wrong:
            error = error or wrong
    assert error is not None
    raise error


def describe(config: RunConfig) -> str:
    """A layout in a few words, for events."""
    train, nodes = config.train, num_nodes(config.launcher)
    padded = ", padded" if train.pad_batch else ""
    return f"{nodes} node(s), {parallel_dims(config)}, micro_batch {train.micro_batch}{padded}"


def _share(c: RunConfig, fixed: bool) -> None:
    """Fill the world with dp_shard · dp_replicate."""
    p, world = c.parallel, num_nodes(c.launcher) * c.launcher.nproc_per_node
    p.ep = 1
    if fixed:
        p.dp_shard = _below(world, p.dp_shard)
        p.dp_replicate = world // p.dp_shard
    else:
        p.dp_replicate = _below(world, p.dp_replicate)
        p.dp_shard = world // p.dp_replicate


def _split_batch(c: RunConfig, full: RunConfig, dims: ParallelDims) -> None:
    train = c.train

    def padding(micro: int) -> int:
        return -train.global_batch % (micro * dims.dp)

    train.micro_batch = min(range(full.train.micro_batch, 0, -1), key=padding)
    train.pad_batch = full.train.pad_batch or padding(train.micro_batch) > 0
    before, now = split_of(full, parallel_dims(full)), split_of(c, dims)
    require(
        now is None or now == before,
        "layout.balance.scope",
        "micro",
        f"the balance loss counts the rows of one forward pass, {before} ranks and rows; {dims} would train "
        "another objective",
        "layout.balance.scope=sequence or step",
    )


def _below(number: int, wanted: int) -> int:
    """The largest divisor of a number that is not above what is wanted."""
    return max(divisor for divisor in divisors(number) if divisor <= wanted)
