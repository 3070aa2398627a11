"""How an exchange is cut into rounds, so that no rank receives more than its budget at a time.

Rows travel in streams, one from each source to each destination, in order of the destination's experts. A round
takes the next piece of every stream:

    round                0         1         2
    source 0 → rank d   ▐██▌      ▐██▌      ▐██      ┐
    source 1 → rank d   ▐█        ▐█        ▐█▌      ├ at most ⌈rows of d / rounds⌉ a round
    source 2 → rank d   ▐█▌       ▐█        ▐█       ┘

Pieces of one stream differ by at most a row, so no link idles while another is full. Which pieces are the longer
ones goes round: the next source's begin where those of the source before it end, and so the pieces that arrive
together also differ by at most a row from round to round. Hence ⌈most rows / budget⌉ rounds are always enough,
which is the least number there can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.dispatch.permute import Permutation


def num_rounds(most_rows: int, budget: int) -> int:
    """In how many rounds the rank that gets the most rows gets at most ``budget`` in each; at least 1."""
    return max(1, -(-most_rows // budget))


def cut(rows_SD: Tensor, rounds: int) -> Tensor:
    """Rows of each stream in each round, ``[rounds, S, D]``, from rows of each (source, destination).

    Each stream's pieces differ by at most 1, and so do the sums over the sources at every destination.
    """
    extra = rows_SD % rounds
    first = (extra.cumsum(0) - extra) % rounds  # the round of a stream's first longer piece
    later = (torch.arange(rounds, device=rows_SD.device)[:, None, None] - first) % rounds
    return rows_SD // rounds + (later < extra)


@dataclass(frozen=True)
class Round:
    """One rank's part of a round.

    Attributes:
        row_N: which of the home rows it sends, ordered by destination.
        send, recv: how many to and from each rank.
        order_M: received rows sorted by local expert; None where they arrive so.
        counts_E: received rows of each local expert, int64.
    """

    row_N: Tensor
    send: list[int]
    recv: list[int]
    order_M: Tensor | None
    counts_E: Tensor


@dataclass(frozen=True)
class Rounds:
    """All rounds of one exchange, as one rank sees them.

    Attributes:
        home: between this rank's tokens and its rows, which are sorted by destination.
        send, recv: rows of each round to and from each rank.
        row_RD: first home row of each piece that it sends, ``[rounds, ep]``, on the device.
        taken_RS: how far into each source's stream each round begins, likewise.
        received_SE: rows of each (source, local expert) in all rounds together, on the device.
    """

    home: Permutation
    send: list[list[int]]
    recv: list[list[int]]
    row_RD: Tensor
    taken_RS: Tensor
    received_SE: Tensor

    @classmethod
    def plan(cls, home: Permutation, rows_SD: Tensor, rank: int, rounds: int, received_SE: Tensor) -> Rounds:
        """Cut the exchange of one group.

        Args:
            rows_SD: rows from each source to each destination, the same on all ranks, on the CPU.
            rank: this one, in the group.
            rounds: how many.
        """
        pieces = cut(rows_SD, rounds)
        send_RD, recv_RS = pieces[:, rank], pieces[:, :, rank]
        stream_D = rows_SD[rank]
        row_RD = (stream_D.cumsum(0) - stream_D) + (send_RD.cumsum(0) - send_RD)
        taken_RS = recv_RS.cumsum(0) - recv_RS
        device = received_SE.device
        return cls(
            home, send_RD.tolist(), recv_RS.tolist(), row_RD.to(device), taken_RS.to(device), received_SE
        )

    def __len__(self) -> int:
        return len(self.send)

    @property
    def num_rows(self) -> int:
        """Home rows, those that no round sends included."""
        return self.home.pair_of_row_N.shape[0]

    def __getitem__(self, index: int) -> Round:
        """Made anew each time, since its index tensors are as many as the rows."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        send, recv = self.send[index], self.recv[index]
        device = self.received_SE.device
        begin_S1 = self.taken_RS[index][:, None]
        end_S1 = begin_S1 + torch.tensor(recv, device=device)[:, None]
        end_SE = self.received_SE.cumsum(1)
        # What a piece of the stream shares with each expert's run of it.
        counts_SE = end_SE.clamp(begin_S1, end_S1) - (end_SE - self.received_SE).clamp(begin_S1, end_S1)
        order = None
        if len(recv) > 1:
            expert = torch.arange(counts_SE.shape[1], device=device).repeat(len(recv))
            expert_M = expert.repeat_interleave(counts_SE.flatten(), output_size=sum(recv))
            order = torch.argsort(expert_M, stable=True)
        return Round(self._rows(index), send, recv, order, counts_SE.sum(0))

    def _rows(self, index: int) -> Tensor:
        """The home rows that a round sends: one run of them for each destination."""
        send, begin_D = self.send[index], self.row_RD[index]
        row_N = torch.arange(sum(send), device=begin_D.device)
        if len(send) == 1:
            return row_N + begin_D
        size_D = torch.tensor(send, device=begin_D.device)
        shift_D = begin_D - (size_D.cumsum(0) - size_D)
        return row_N + shift_D.repeat_interleave(size_D, output_size=sum(send))
