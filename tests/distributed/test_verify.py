"""The prover is proven: it passes what is right and catches every injected bug in the right place."""

from __future__ import annotations

import copy
import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from launch.verify import EXIT_NOT_EQUAL, _prepare, main, verify
from parallel.errors import ConfigError
from tests.command import MUSTER, REPO, Workplace
from tests.configs import composed
from tests.distributed import cases
from tests.distributed.mutations import MUTATIONS
from tests.distributed.pool import Pool
from trainer.compose import CONF_DIR
from trainer.config import CallbackConfig, Device, Machine, RunConfig, parallel_dims, resolve
from trainer.data.prepare import prepare_data
from trainer.proof.compare import Check, Records, compare, first_failure
from trainer.proof.reference import run_reference
from trainer.proof.shrink import STEPS, shrink
from trainer.rules import validate

TWO = ["launcher.nproc_per_node=2", "parallel.ep=2"]
HSDP = ["launcher.nproc_per_node=4", "parallel.ep=2", "parallel.dp_replicate=2"]
DATA = ["train.global_batch=16", "train.micro_batch=2"]


def asked_config(tmp_path: Path, overrides: list[str]) -> RunConfig:

    root = [f"run.root={tmp_path}", "run.name=proof"]
    return resolve(composed(*DATA, *overrides, *root), Machine(num_cpus=2))


def prove(pool: Pool, tmp_path: Path, overrides: list[str], mutation: str | None) -> list[Check]:
    """What `muster verify` does, in the pool's processes and with a bug in them."""
    config, run, _ = _prepare(asked_config(tmp_path, overrides), Device.cpu)
    prepare_data(config)
    run_reference(config, run.path / "proof" / "reference")
    for generation, steps in enumerate((STEPS - 1, STEPS)):
        config = copy.deepcopy(config)
        config.train.steps = steps
        args = (config, str(run.path), generation, mutation)
        pool.run(cases.prove_layout, config.launcher.nproc_per_node, *args, connect=False)
    return compare(Records(run.path / "proof", run.path, config))


@pytest.mark.parametrize(
    "overrides",
    [
        ["layout=mixtral", *TWO],
        ["layout=deepseek", "train.activation_checkpointing=true", *HSDP],
        ["layout=switch", "model.tied_embeddings=true", *TWO],
        ["layout=dense", "launcher.nproc_per_node=2"],
        [
            "layout=gshard",
            "parallel.max_tokens_in_flight=100000",
            "train.activation_checkpointing=true",
            *TWO,
        ],
    ],
    ids=str,
)
def test_what_is_right_passes(pool: Pool, tmp_path: Path, overrides: list[str]) -> None:
    checks = prove(pool, tmp_path, overrides, None)
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 11


# mutation → overrides, the check that fails first, and what is named there.
CAUGHT: dict[str, tuple[list[str], str, str]] = {
    "expert_gradients_times_ep": (TWO, "gradients", "expert gradients × ep (2)"),
    "gradients_divided_by_dp": (TWO, "gradients", "÷ dp (2)"),
    "gradients_divided_by_micro_batches": (TWO, "gradients", "gradients ÷ the number of micro-batches (3)"),
    "averaged_over_ranks_with_uneven_tokens": (TWO, "gradients", "weighted unevenly (a mean over ranks?)"),
    "clip_norm_misses_experts": (TWO, "clip norm", "experts are left out"),
    "clip_norm_counts_replicas_twice": (HSDP, "clip norm", "every gradient counts dp_replicate (2) times"),
    "balance_loss_detached": (TWO, "gradients", "the balance loss does not reach the weights"),
    "balance_loss_divided_by_dp": (TWO, "gradients", "the balance loss counts ÷ "),
    "router_in_bf16": (TWO, "balance loss", "the router of the first MoE layer: precision"),
    "combine_weights_applied_twice": (TWO, "router_z loss", "what MoE layer 0 returned"),
    "dropped_tokens_lose_their_residual": (
        ["layout=switch", "layout.capacity_factor=0.5", *TWO],
        "router_z loss",
        "the residual of dropped tokens",
    ),
    "recompute_routes_anew": (["train.activation_checkpointing=true", *TWO], "gradients", "routed"),
    "a_row_of_the_last_expert_goes_to_another": (
        TWO,
        "router_z loss",
        "what MoE layer 0 returned: dispatch, experts",
    ),
    "moments_of_experts_permuted": (TWO, "state after resume", "optim.exp_avg"),
    "optimizer_forgets_its_step_count": (TWO, "state after resume", "optim.step"),
    "data_repeated_after_resume": (TWO, "samples", "the data of the step before it is repeated"),
    "a_round_forgets_those_before_it": (
        ["layout=switch", "parallel.max_tokens_in_flight=100000", *TWO],
        "gradients",
        "only expert gradients deviate",
    ),
    "router_bias_from_own_counts_only": (["layout=deepseek", *TWO], "routed counts", "MoE layer 0"),
}


# What does not come to a comparison: mutation → what the ranks say of each other.
DESYNCS = {
    "a_rank_skips_an_exchange": "ranks of an expert-parallel group are not at the same exchange: "
    "rank 0 at step 1, micro-batch 1 of 3, layer 0, dispatch; "
    "rank 1 at step 1, micro-batch 1 of 3, layer 0, combine",
    "a_rank_expects_other_sizes": "ranks of an expert-parallel group do not agree on the sizes of an exchange at "
    "step 1, micro-batch 1 of 3, layer 0, dispatch: rank 0 sends",
}
# What no comparison is needed for: mutation → what the commit of the checkpoint says.
REFUSED = {
    "checkpoint_holds_only_the_experts_of_rank_0": "checkpoint=model.layers.0.feed_forward.experts.w1: the ranks' "
    "slices do not make up this tensor: the ranks hold it with shape [2, ",
}


@cache
def every_mutation_is_listed() -> bool:
    return MUTATIONS.keys() == CAUGHT.keys() | DESYNCS.keys() | REFUSED.keys()


@pytest.mark.parametrize("mutation", CAUGHT)
def test_every_injected_bug_is_caught_and_placed(pool: Pool, tmp_path: Path, mutation: str) -> None:
    assert every_mutation_is_listed()
    overrides, place, hint = CAUGHT[mutation]
    checks = prove(pool, tmp_path, overrides, mutation)
    first = first_failure(checks)
    assert first is not None, "not caught"
    assert first.name == place, f"caught at {first.name} ({first.where})"
    assert hint in f"{first.where} {first.suspicion}"


@pytest.mark.parametrize("mutation", DESYNCS)
def test_ranks_that_diverge_say_where(pool: Pool, tmp_path: Path, mutation: str) -> None:
    with pytest.raises(AssertionError, match=f"DesyncError: {re.escape(DESYNCS[mutation])}"):
        prove(pool, tmp_path, TWO, mutation)


@pytest.mark.parametrize("mutation", REFUSED)
def test_a_checkpoint_that_is_not_whole_is_refused(pool: Pool, tmp_path: Path, mutation: str) -> None:
    with pytest.raises(AssertionError, match=f"StorageError: {re.escape(REFUSED[mutation])}"):
        prove(pool, tmp_path, TWO, mutation)


def test_a_desync_is_the_fault_that_stands_in_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation = "a_rank_skips_an_exchange"

    def command(config: Path) -> list[str]:
        return [sys.executable, "-m", "tests.distributed.mutated_worker", mutation, "--config", str(config)]

    monkeypatch.setenv("PYTHONPATH", str(REPO))
    outcome = verify(asked_config(tmp_path, [*TWO, "run.id=d"]), Console(quiet=True), command=command)
    certificate = json.loads((tmp_path / "proof" / "verify-d" / "certificate.json").read_text())
    assert outcome.code == EXIT_NOT_EQUAL
    assert f"DesyncError: {DESYNCS[mutation]}" in outcome.message
    assert certificate["passed"] is False
    assert f"DesyncError: {DESYNCS[mutation]}" in certificate["fault"]["cause"]
    assert {"field": "resilience.check_exchanges", "asked": False, "run": True} in certificate[
        "asked_and_run"
    ]


def test_a_shrunk_config_keeps_what_can_go_wrong(tmp_path: Path) -> None:
    overrides = [
        "model=deepseek_v3",
        "launcher.nproc_per_node=64",
        "parallel.ep=16",
        "parallel.dp_replicate=2",
    ]
    asked = asked_config(tmp_path, [*overrides, "train.global_batch=256", "train.micro_batch=2"])
    config, changed = shrink(asked, Device.cpu, CallbackConfig("a:b"))
    parallel, layout = config.parallel, config.layout
    assert (parallel.dp_replicate, parallel.ep, parallel.dp_shard) == (2, 2, 4)
    assert (layout.top_k, layout.num_shared_experts, layout.num_groups, layout.top_groups) == (8, 1, 4, 2)
    assert layout.num_experts % parallel.ep == 0
    assert layout.balance.coefficient > 0
    assert layout.balance.router_z > 0
    assert config.train.global_batch // (config.train.micro_batch * 8) == 3, "still accumulated"
    assert {change.field for change in changed} >= {"model.dim", "layout.num_experts", "data.target"}


MODELS = ["tiny", "mixtral_8x7b", "olmoe_1b_7b", "deepseek_v3", "llama3_8b", "switch_c"]
LAYOUTS = sorted(path.stem for path in (CONF_DIR / "layout").glob("*.yaml"))


@pytest.mark.parametrize("choice", [*(f"model={m}" for m in MODELS), *(f"layout={name}" for name in LAYOUTS)])
@pytest.mark.parametrize("world", [1, 4, 48])
def test_every_choice_shrinks_to_a_config_that_holds_every_rule(
    tmp_path: Path, choice: str, world: int
) -> None:
    batch = ["train.global_batch=96", "train.micro_batch=1"]
    asked = asked_config(tmp_path, [choice, f"launcher.nproc_per_node={world}", *batch])
    eps = [1] if not asked.layout.num_experts else [ep for ep in (1, 2, 4, 16) if world % ep == 0]
    for ep in eps:
        asked.parallel.ep = ep
        config, _ = shrink(asked, Device.cpu, CallbackConfig("a:b"))
        validate(config)
        was, now = parallel_dims(asked), parallel_dims(config)
        assert now.world_size <= 8
        for degree in ("dp_replicate", "expert_shard", "ep"):
            assert (getattr(was, degree) > 1) == (getattr(now, degree) > 1), degree


def test_a_balance_loss_that_changes_with_the_layout_is_refused() -> None:
    overrides = ["layout=mixtral", "layout.balance.scope=micro", "launcher.nproc_per_node=2", "device=cpu"]
    with pytest.raises(
        ConfigError, match=r"2 data-parallel rank\(s\) with train.micro_batch=4 compute another loss"
    ):
        main(overrides)


def test_the_command_writes_a_certificate(workplace: Workplace) -> None:
    output = workplace.run(MUSTER, "verify", "launcher.nproc_per_node=2", "parallel.ep=2", "run.id=v")
    certificate = json.loads(
        (workplace.path / "runs" / "default" / "verify-v" / "certificate.json").read_text()
    )
    assert certificate["passed"] is True
    assert {check["name"] for check in certificate["checks"]} >= {"loss", "gradients", "clip norm", "samples"}
    ratio = next(c for c in certificate["checks"] if c["name"] == "gradients")["values"]["head.weight"]
    assert ratio["min"] == pytest.approx(1.0, abs=1e-3)
    assert ratio["max"] == pytest.approx(1.0, abs=1e-3)
    assert {"field": "model.dim", "asked": 256, "run": 48} in certificate["asked_and_run"]
    assert "passed in" in output


def test_the_page_names_every_injected_bug_and_where_it_is_caught() -> None:
    page = (REPO / "docs" / "verify.md").read_text()
    for name, (_, place, _) in CAUGHT.items():
        assert f"| `{name}` | {place} |" in page
    for name in DESYNCS:
        assert f"| `{name}` | the exchanges |" in page
    for name in REFUSED:
        assert f"| `{name}` | the commit of a checkpoint |" in page


def test_training_does_not_begin_with_a_layout_that_is_not_proven(workplace: Workplace) -> None:
    """A user's own feed-forward layer that mixes tokens over the rows of a rank is no longer the same model."""
    (workplace.path / "mixing.py").write_text(
        "import torch\n"
        "class Mixing(torch.nn.Module):\n"
        "    def __init__(self, config, index, dispatcher):\n"
        "        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.empty(config.model.dim, config.model.dim))\n"
        "    def forward(self, x):\n"
        "        return (x - x.mean((0, 1), keepdim=True)) @ self.w\n"
    )
    workplace.env["PYTHONPATH"] = str(workplace.path)
    wrong = ["layout=dense", "layout.target=mixing:Mixing", "launcher.nproc_per_node=2", "run.id=w"]
    output = workplace.run(MUSTER, "train", *wrong, "train.verify_first=true", expect=1)
    assert not (workplace.path / "runs" / "default" / "w").exists()
    assert "Not equal: loss at step 1" in output
    assert "Traceback" not in output
    certificate = json.loads(
        (workplace.path / "runs" / "default" / "verify-w" / "certificate.json").read_text()
    )
    assert certificate["passed"] is False


def test_a_bad_config_is_a_config_error(workplace: Workplace) -> None:
    output = workplace.run(
        MUSTER, "verify", "parallel.ep=3", "launcher.nproc_per_node=3", "train.global_batch=9", expect=2
    )
    assert "parallel.ep=3: must divide layout.num_experts = 8" in output
    output = workplace.run(MUSTER, "verify", "--device", "tpu", expect=2)
    assert "is cpu or cuda" in output
