"""Differentiable all-to-all with uneven splits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function

from parallel.exchange_check import Notice
from parallel.exchange_timer import ExchangeTimer
from parallel.recompute import recorded

EXCHANGE_RANGE = "muster: exchange"
"""What a profile calls an exchange, forward or backward."""


def exchange_rows(
    x_ND: Tensor,
    send: list[int],
    recv: list[int],
    group: dist.ProcessGroup,
    notice: Notice | None,
    timer: ExchangeTimer | None = None,
    backward: bool = False,
) -> Tensor:
    """One all-to-all as it is: no gradient, nothing recorded. Arguments as :func:`all_to_all_rows`."""
    with record_function(EXCHANGE_RANGE), nullcontext() if timer is None else timer.timed():
        if notice is not None:
            notice.before(x_ND, send, recv, backward)
        received = x_ND.new_empty(sum(recv), *x_ND.shape[1:])
        dist.all_to_all_single(received, x_ND.contiguous(), recv, send, group=group)
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        send: list[int],
        recv: list[int],
        group: dist.ProcessGroup,
        notice: Notice | None,
        timer: ExchangeTimer | None,
    ) -> Tensor:
        ctx.send, ctx.recv, ctx.group, ctx.notice, ctx.timer = send, recv, group, notice, timer
        return recorded(lambda: exchange_rows(x_ND, send, recv, group, notice, timer))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        home = exchange_rows(grads[0], ctx.recv, ctx.send, ctx.group, ctx.notice, ctx.timer, backward=True)
        return home, None, None, None, None, None


def all_to_all_rows(
    x_ND: Tensor,
    send_splits: list[int],
    recv_splits: list[int],
    group: dist.ProcessGroup,
    notice: Notice | None = None,
    timer: ExchangeTimer | None = None,
) -> Tensor:
    """Send ``send_splits[r]`` consecutive rows to rank r of the group; backward sends gradients home.

    A recomputation gets the rows of the first time and sends nothing.

    Args:
        x_ND: rows ordered by destination, ``N = sum(send_splits)``. Zero splits are fine.
        notice: what the ranks are to agree on first, in both directions.
        timer: told how long it took, in both directions.

    Returns:
        ``[sum(recv_splits), D]``, ordered by source rank.

    Raises:
        DesyncError: with a notice, on every rank of the group: they do not agree.
    """
    return _AllToAll.apply(x_ND, send_splits, recv_splits, group, notice, timer)


def exchange_counts(
    counts: Tensor,
    group: dist.ProcessGroup,
    notice: Notice | None = None,
    timer: ExchangeTimer | None = None,
) -> Tensor:
    """All-to-all of an ``[ep, E_local]`` table of row counts: row r goes to rank r. No gradient.

    Replayed, like the rows, in a recomputation; ``notice`` and ``timer`` as for them.
    """
    even = [1] * dist.get_world_size(group)
    return recorded(lambda: exchange_rows(counts, even, even, group, notice, timer))
