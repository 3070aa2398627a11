"""Bugs that MoE frameworks have really had, each injected into the running product.

A mutation is a context manager that patches the code of one rank; the proof must catch every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import parallel.dispatch.all_to_all
import parallel.dispatch.bounded
import parallel.engines.native
import trainer.moe.balance
import trainer.moe.experts
import trainer.moe.router
from parallel.dispatch.visits import Trip
from parallel.engines.base import StateSlice
from parallel.engines.native import NativeEngine
from trainer.checkpoint.durable import DurableCheckpointer
from trainer.checkpoint.resume import Checkpoint
from trainer.config import RunConfig, parallel_dims
from trainer.data.loader import _RowLoader
from trainer.models.transformer import Block
from trainer.moe.positions import Positions
from trainer.moe.router import Router, Scored
from trainer.step import Stepper, Sums

Mutation = Callable[[RunConfig, int], AbstractContextManager[Any]]
MUTATIONS: dict[str, Mutation] = {}


def mutation(make: Callable[[RunConfig, int], AbstractContextManager[Any]]) -> Mutation:
    MUTATIONS[make.__name__] = make
    return make


def _scale_gradients(factor: float, chosen: Callable[[str], bool]) -> AbstractContextManager[Any]:
    original = NativeEngine.backward

    def backward(self: NativeEngine, loss: Tensor, last: bool) -> None:
        original(self, loss, last)
        if last:
            for name, parameter in self._masters.items():
                if chosen(name) and parameter.grad is not None:
                    parameter.grad.mul_(factor)

    return patch.object(NativeEngine, "backward", backward)


@mutation
def expert_gradients_times_ep(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    return _scale_gradients(config.parallel.ep, lambda name: ".experts." in name)


@mutation
def gradients_divided_by_dp(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    return _scale_gradients(1 / parallel_dims(config).dp, lambda name: True)


@mutation
def gradients_divided_by_micro_batches(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    number = config.train.global_batch // (config.train.micro_batch * parallel_dims(config).dp)
    assert number > 1
    return _scale_gradients(1 / number, lambda name: True)


@mutation
@contextmanager
def averaged_over_ranks_with_uneven_tokens(config: RunConfig, rank: int) -> Iterator[None]:
    agree, objective = Stepper._agree, Stepper.objective

    def local_count(self: Any, batches: Any) -> tuple[int, bool]:
        num_targets, stop = agree(self, batches)
        own = sum(int(batch.num_targets) for batch in batches)
        self.factor = num_targets / (own * parallel_dims(config).dp)
        return num_targets, stop

    def scaled(self: Any, losses: Any) -> Tensor:
        return objective(self, losses) * self.factor

    with patch.object(Stepper, "_agree", local_count), patch.object(Stepper, "objective", scaled):
        yield


@mutation
@contextmanager
def clip_norm_misses_experts(config: RunConfig, rank: int) -> Iterator[None]:
    def clip(self: NativeEngine, max_norm: float) -> Tensor:
        slices = list(self.named_gradients())
        dense = [piece.tensor for piece in slices if ".experts." not in piece.name]
        norm = parallel.engines.native.global_norm(dense, self.meshes.replica)
        parallel.engines.native.clip_([piece.tensor for piece in slices], norm, max_norm)
        return norm

    with patch.object(NativeEngine, "clip_gradients", clip):
        yield


@mutation
def clip_norm_counts_replicas_twice(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original = parallel.engines.native.global_norm
    return patch.object(
        parallel.engines.native, "global_norm", lambda local, replica: original(local, dist.group.WORLD)
    )


@mutation
def balance_loss_detached(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original = trainer.moe.balance.balance_loss
    return patch.object(trainer.moe.balance, "balance_loss", lambda *args: original(*args).detach())


@mutation
def balance_loss_divided_by_dp(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original, dp = trainer.moe.balance.balance_loss, parallel_dims(config).dp

    def divided(*args: Tensor) -> Tensor:
        value = original(*args)
        return value / dp + (value - value / dp).detach()  # what is logged stays right, as it did

    return patch.object(trainer.moe.balance, "balance_loss", divided)


@mutation
def router_in_bf16(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original = Router._score

    def score(self: Router, x: Tensor, positions: Positions) -> Scored:
        scored = original(self, x, positions)
        probability = scored.logits[0].to(torch.bfloat16).float().softmax(-1)
        return scored._replace(score_BSE=probability, probability_BSE=probability)

    return patch.object(Router, "_score", score)


@mutation
@contextmanager
def combine_weights_applied_twice(config: RunConfig, rank: int) -> Iterator[None]:
    original = parallel.dispatch.all_to_all.answered
    with patch.object(
        parallel.dispatch.all_to_all, "answered", lambda x, weight, *rest: original(x, weight * weight, *rest)
    ):
        yield


@mutation
def dropped_tokens_lose_their_residual(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    def forward(self: Block, x: Tensor, table: Any, mask: Any, positions: Positions, remember: Any) -> Any:
        x = x + self.attention(self.attention_norm(x), table, mask, remember)
        y, stats = self.feed_forward(self.ffn_norm(x), positions)
        dropped = (y == 0).all(-1, keepdim=True)
        return torch.where(dropped, y, x + y), stats

    return patch.object(Block, "_forward", forward)


@mutation
def recompute_routes_anew(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    assert config.train.activation_checkpointing
    original, num_experts = trainer.moe.router.recorded, config.layout.num_experts

    def recorded(make: Callable[[], Tensor]) -> Tensor:
        first_time = []
        value = original(lambda: first_time.append(1) or make())  # type: ignore[func-returns-value]
        if first_time:
            return value
        moved = (value.expert_BSK + 1) % num_experts
        return value._replace(expert_BSK=moved, sent_BSK=moved)

    return patch.object(trainer.moe.router, "recorded", recorded)


@mutation
def a_row_of_the_last_expert_goes_to_another(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original = trainer.moe.experts.swiglu_of_tokens

    def short(x: Tensor, weight: Tensor, home: Any, counts: list[int], *weights: Tensor) -> Tensor:
        *others, before, last = counts
        return original(x, weight, home, [*others, before + min(last, 1), max(last - 1, 0)], *weights)

    return patch.object(trainer.moe.experts, "swiglu_of_tokens", short)


@mutation
@contextmanager
def checkpoint_holds_only_the_experts_of_rank_0(config: RunConfig, rank: int) -> Iterator[None]:
    save, load = DurableCheckpointer.save, Checkpoint.load_into

    def under_one_key(piece: StateSlice) -> StateSlice:
        if ".experts." not in piece.name or piece.tensor.dim() == 0:
            return piece
        shape, zeros = tuple(piece.tensor.shape), (0,) * piece.tensor.dim()
        return replace(piece, global_shape=shape, offsets=zeros, owner=rank == 0)

    def save_one(self: Any, step: int, slices: Any, *rest: Any) -> None:
        save(self, step, [under_one_key(piece) for piece in slices], *rest)

    def load_one(self: Any, slices: Any, prefix: str = "") -> None:
        load(self, [under_one_key(piece) for piece in slices], prefix)

    with patch.object(DurableCheckpointer, "save", save_one), patch.object(Checkpoint, "load_into", load_one):
        yield


def _after_load(change: Callable[[StateSlice], None]) -> AbstractContextManager[Any]:
    load = Checkpoint.load_into

    def load_and_change(self: Any, slices: Any, prefix: str = "") -> None:
        slices = list(slices)
        load(self, slices, prefix)
        for piece in slices:
            change(piece)

    return patch.object(Checkpoint, "load_into", load_and_change)


@mutation
def moments_of_experts_permuted(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    def permute(piece: StateSlice) -> None:
        if piece.name.startswith("optim.exp_avg.") and ".experts." in piece.name:
            piece.tensor.copy_(piece.tensor.flip(0).clone())

    return _after_load(permute)


@mutation
def optimizer_forgets_its_step_count(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    def forget(piece: StateSlice) -> None:
        if piece.name.startswith("optim.step."):
            piece.tensor.zero_()

    return _after_load(forget)


@mutation
def data_repeated_after_resume(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original = _RowLoader.load_state_dict

    def load(self: Any, state: dict[str, Any]) -> None:
        original(self, {**state, "next_sample": state["next_sample"] - config.train.global_batch})

    return patch.object(_RowLoader, "load_state_dict", load)


@mutation
def router_bias_from_own_counts_only(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original = Sums.reduce

    def reduce(self: Sums, num_targets: int) -> Any:
        assert self._total is not None
        own = self._total.clone()
        totals = original(self, num_targets)
        counts = own[1:].view(self._num_layers, -1)[:, -totals.counts_LE.shape[1] :].long()
        return replace(totals, counts_LE=counts)

    return patch.object(Sums, "reduce", reduce)


@mutation
def a_round_forgets_those_before_it(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    sums = parallel.dispatch.bounded._Sums
    original = sums.add

    def add(self: Any, grads: Any) -> None:
        self._sums = [None] * len(grads)
        original(self, grads)

    return patch.object(sums, "add", add)


@mutation
def a_rank_skips_an_exchange(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original = parallel.dispatch.all_to_all.visit

    def skipping(x: Tensor, weight: Tensor, trip: Trip) -> tuple[Tensor, Tensor, Tensor]:
        if rank != 1:
            return original(x, weight, trip)
        visitors, choices = sum(trip.recv), weight.shape[1]
        nobody = trip.visits.local_TK.new_full((visitors, choices), trip.nowhere)
        return x.new_zeros(visitors, x.shape[1]), weight.new_zeros(visitors, choices), nobody

    return patch.object(parallel.dispatch.all_to_all, "visit", skipping)


@mutation
def a_rank_expects_other_sizes(config: RunConfig, rank: int) -> AbstractContextManager[Any]:
    original = parallel.dispatch.all_to_all.exchange_counts

    def swapped(*args: Any) -> Tensor:
        received = original(*args)
        return received.roll(1, 0) if rank == 1 else received  # their sum stays right

    return patch.object(parallel.dispatch.all_to_all, "exchange_counts", swapped)
