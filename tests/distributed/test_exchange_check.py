"""Ranks that are not at the same exchange are told so, by name and place, before the exchange begins."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import all_to_all_rows
from parallel.dispatch import all_to_all
from parallel.dispatch.all_to_all import AllToAllDispatcher
from parallel.dispatch.base import Routing
from parallel.exchange_check import DesyncError, ExchangeCheck, Notice, describe_places
from parallel.mesh import build_meshes
from tests.command import MUSTER, SMALL, Workplace
from tests.distributed import cases, oracle
from tests.distributed.pool import Pool
from tests.distributed.test_exchange_timer import Echo
from trainer.build import build_dispatcher, build_engine, build_exchange_check, build_model
from trainer.config import RunConfig, parallel_dims
from trainer.models.init import initialise
from trainer.step import Stepper

STEPS = 6


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    """As an agent hosts it, outside of the ranks."""
    hosted = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield hosted


def client(port: int) -> dist.Store:
    return dist.PrefixStore("launch", dist.TCPStore("127.0.0.1", port, is_master=False))


def train(rank: int, world: int, config: RunConfig, port: int) -> dict[str, Any]:
    """Some steps and an evaluation: weights, the number of checked exchanges, and the store's size meanwhile."""
    size = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    with patch.dict(os.environ, size):  # Accelerate reads them
        store, dims, device = client(port), parallel_dims(config), torch.device("cpu")
        meshes = build_meshes(dims, "cpu")
        check = build_exchange_check(config, meshes, rank, store)
        engine = build_engine(config, meshes, device)
        engine.prepare(build_model(config, build_dispatcher(meshes, check)))
    initialise(engine.model, engine.named_state(), config.train.seed)
    stepper = Stepper(engine, config, device, lambda: False, check)
    told, before = [], ExchangeCheck.before

    def spy(self: ExchangeCheck, layer: int | None, operation: str, *sizes: Any) -> None:
        before(self, layer, operation, *sizes)
        told.append((self.spot.step, self.spot.part, layer, operation))

    share, micro = config.train.global_batch // dims.dp, config.train.micro_batch
    first, num_keys = dims.dp_rank(rank) * share, []
    with patch.object(ExchangeCheck, "before", spy):
        for step in range(STEPS):
            batch = oracle.batch_of_step(config, step)
            batches = [oracle.rows(batch, i, i + micro) for i in range(first, first + share, micro)]
            stepper.train_step(step, batches)
            num_keys.append(store.num_keys())
        stepper.evaluate(batches)
    weights = [piece.tensor.clone() for piece in engine.named_state()]
    return {"weights": weights, "told": told, "num_keys": num_keys}


ENGINES = {
    "native, recomputed, accumulated": ["train.activation_checkpointing=true", "train.micro_batch=2"],
    "accelerate": ["engine=accelerate", "train.micro_batch=2"],
    "deepspeed": ["engine=deepspeed", "engine.zero_stage=2", "train.micro_batch=2"],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_exchange_is_checked_and_no_bit_is_changed(
    pool: Pool, store: dist.TCPStore, engine: str
) -> None:
    layout = ["layout=mixtral", "launcher.nproc_per_node=2", "parallel.ep=2", *ENGINES[engine]]
    off = pool.run(train, 2, cases.small_config(*layout), store.port)
    on = pool.run(train, 2, cases.small_config(*layout, "resilience.check_exchanges=true"), store.port)
    forward = [(layer, op) for layer in (0, 1) for op in ("counts", "dispatch", "combine")]
    backward = [(layer, op) for layer in (1, 0) for op in ("combine (backward)", "dispatch (backward)")]
    expected = [
        (step, f"micro-batch {part} of 2", *exchange)
        for step in range(1, STEPS + 1)
        for part in (1, 2)
        for exchange in forward + backward
    ]
    expected += [
        (STEPS, f"evaluation, batch {part} of 2", *exchange) for part in (1, 2) for exchange in forward
    ]
    for with_check, without in zip(on, off, strict=True):
        assert with_check["told"] == expected
        assert without["told"] == []
        assert all(map(torch.equal, with_check["weights"], without["weights"]))
        # A place and at most two fingerprints a rank, beside what the store keeps for itself.
        assert max(with_check["num_keys"]) <= max(without["num_keys"]) + 3 * 2
    assert describe_places(dist.PrefixStore("launch", store), 2).startswith(
        f"all 2 ranks at step {STEPS}, evaluation, batch 2 of 2, layer 1, combine"
    )


WORLD = 3
"""Ranks 0 and 2 do as they should, rank 1 does not."""


def answers(rank: int, world: int, port: int, how: str) -> dict[str, str]:
    """What a rank is told when rank 1 goes astray at step 7, and how many ranks an exchange reaches after that."""
    store, group = client(port), dist.group.WORLD
    assert group is not None
    store = dist.PrefixStore(how, store)
    check = ExchangeCheck(
        store, rank, range(world), world, timeout_seconds=1.0 if how == "stays away" else 60.0
    )
    check.enter("", 7)
    try:
        WAYS[how](rank, store, AllToAllDispatcher(group, check), check)
        told = "nothing"
    except DesyncError as error:
        told = f"{error.kind}: {error}"
    # No exchange was begun by anyone: the first that reaches the group is this one.
    reached = torch.ones(world, dtype=torch.int64) * rank
    dist.all_to_all_single(reached, reached.clone(), group=group)
    return {"told": told, "reached": str(reached.tolist())}


def layer(dispatcher: AllToAllDispatcher, skip_combine: bool = False) -> torch.Tensor:
    x = torch.ones(5, 4, requires_grad=True)
    experts = (torch.arange(5) + dispatcher.ep_rank)[:, None] % 6
    routing = Routing(experts, torch.ones(5, 1), num_experts=6)
    with patch.object(all_to_all, "return_home", lambda rows, trip: rows) if skip_combine else nullcontext():
        return dispatcher.run(x, routing, Echo())[0]


def skips_an_exchange(
    rank: int, store: dist.Store, dispatcher: AllToAllDispatcher, check: ExchangeCheck
) -> None:
    layer(dispatcher.at_layer(3), skip_combine=rank == 1)
    layer(dispatcher.at_layer(4))


def skips_a_backward(
    rank: int, store: dist.Store, dispatcher: AllToAllDispatcher, check: ExchangeCheck
) -> None:
    y = layer(dispatcher.at_layer(3))
    if rank != 1:
        y.sum().backward()
    check.enter("", 8)
    layer(dispatcher.at_layer(3))


def expects_other_sizes(
    rank: int, store: dist.Store, dispatcher: AllToAllDispatcher, check: ExchangeCheck
) -> None:
    recv = [2, 2, 2] if rank != 1 else [3, 2, 1]
    notice = Notice(check, 3, "dispatch")
    all_to_all_rows(torch.ones(6, 4), [2, 2, 2], recv, dispatcher.group, notice)


def sends_other_rows(
    rank: int, store: dist.Store, dispatcher: AllToAllDispatcher, check: ExchangeCheck
) -> None:
    dtype = torch.float32 if rank != 1 else torch.bfloat16
    notice = Notice(check, None, "combine")
    all_to_all_rows(torch.ones(6, 4, dtype=dtype), [2, 2, 2], [2, 2, 2], dispatcher.group, notice)


def stays_away(rank: int, store: dist.Store, dispatcher: AllToAllDispatcher, check: ExchangeCheck) -> None:
    y = layer(dispatcher.at_layer(3))
    if rank == 1:
        store.wait(["told-0", "told-2"], timedelta(seconds=100))
        return
    try:
        y.sum().backward()
    finally:
        store.set(f"told-{rank}", "")


WAYS = {
    "skips an exchange": skips_an_exchange,
    "skips a backward": skips_a_backward,
    "expects other sizes": expects_other_sizes,
    "sends other rows": sends_other_rows,
    "stays away": stays_away,
}
TOLD = {
    "skips an exchange": "crash: ranks of an expert-parallel group are not at the same exchange: rank 1 at step 7, "
    "layer 4, counts; ranks 0, 2 at step 7, layer 3, combine",
    "skips a backward": "crash: ranks of an expert-parallel group are not at the same exchange: rank 1 at step 8, "
    "layer 3, counts; ranks 0, 2 at step 7, layer 3, combine (backward)",
    "expects other sizes": "crash: ranks of an expert-parallel group do not agree on the sizes of an exchange at "
    "step 7, layer 3, dispatch: rank 0 sends 2 rows to rank 1, which expects 3; rank 2 sends 2 rows to rank 1, "
    "which expects 1 (the group sends 18 rows and expects 18)",
    "sends other rows": "crash: ranks of an expert-parallel group exchange unlike rows at step 7, combine: rank 1: "
    "rows of [4] bfloat16; ranks 0, 2: rows of [4] float32",
    "stays away": "hang: timed out after 1 s: rank 1 has not come to the exchange where ranks 0, 2 of the same "
    "expert-parallel group wait (step 7, layer 3, combine (backward)). Where the ranks are: rank 1 at step 7, "
    "layer 3, combine, N s ago; ranks 0, 2 at step 7, layer 3, combine (backward), N s ago",
}


@pytest.mark.parametrize("how", WAYS)
def test_everyone_is_told_who_is_where_before_the_exchange(
    pool: Pool, store: dist.TCPStore, how: str
) -> None:
    for rank, answer in enumerate(pool.run(answers, WORLD, store.port, how)):
        silent = how == "stays away" and rank == 1
        expected = "nothing" if silent else TOLD[how]
        assert re.sub(r"\d+ s ago", "N s ago", answer["told"]) == expected
        assert answer["reached"] == "[0, 1, 2]"


@pytest.mark.long  # tests/chaos/test_hang.py sees that it is found
def test_a_suspended_rank_is_named_in_the_log_of_the_others(workplace: Workplace) -> None:
    """Rank 0 waits for it in a collective that is no exchange, and knows all the same."""
    workplace.env["MUSTER_CHECK_EXCHANGES"] = "1"  # as after a hang; the config leaves it off
    suspend = '{target: "tests.distributed.plugins:SuspendAt", kwargs: {step: 3, rank: 1}}'
    overrides = [
        "layout=mixtral",
        "launcher.nproc_per_node=2",
        "parallel.ep=2",
        "eval.every=0",
        "resilience.collective_timeout_seconds=10",
        "resilience.heartbeat_seconds=60",  # so that it is not the agent that finds it
        "resilience.max_restarts=0",
        f"callbacks=[{suspend}]",
        f"data.path={workplace.path / 'corpus'}",
    ]
    workplace.run(MUSTER, "train", *SMALL, *overrides, expect=70)
    log = (workplace.run_dir / "logs" / "generation-0" / "rank-0.log").read_text()
    places = re.findall(r"^Where the ranks are: (.*)$", re.sub(r"\d+ s ago", "N s ago", log), re.MULTILINE)
    assert places == ["rank 1 at step 3, optimizer, N s ago; rank 0 at step 4, start, N s ago"]
    failure = workplace.events("failure")[0]
    assert (failure["kind"], failure["rank"]) == ("hang", 1)
