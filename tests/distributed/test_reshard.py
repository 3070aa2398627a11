"""A checkpoint of one layout goes on under any other, and back."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.distributed.oracle import run_oracle
from tests.distributed.pool import Pool
from tests.grid import grid
from trainer.checkpoint.digest import combine
from trainer.checkpoint.resume import newest_valid

# (world, dp_replicate, ep)
EP4, EP2_DP2, ONE, FSDP2, HSDP = (4, 1, 4), (4, 1, 2), (1, 1, 1), (2, 1, 1), (4, 2, 2)
STEPS = 3


def config_of(layout: str, mesh: tuple[int, int, int]):
    world, dp_replicate, ep = mesh
    return cases.small_config(
        f"layout={layout}",
        f"launcher.nproc_per_node={world}",
        f"parallel.dp_replicate={dp_replicate}",
        f"parallel.ep={ep}",
    )


@cache
def expected_losses(layout: str) -> list[float]:
    """Of three legs in one process."""
    return run_oracle(config_of(layout, ONE), 3 * STEPS).losses


@pytest.mark.parametrize(
    ("layout", "journey"),
    grid(
        ["mixtral", "deepseek"],
        [[EP4, ONE, EP4], [EP4, EP2_DP2, EP4], [EP4, FSDP2, EP4], [HSDP, EP4, HSDP], [ONE, HSDP, FSDP2]],
    ),
    ids=str,
)
def test_training_goes_on_under_another_layout(
    pool: Pool, tmp_path: Path, layout: str, journey: list[tuple[int, int, int]]
) -> None:
    losses: dict[int, float] = {}
    for leg, mesh in enumerate(journey):
        start = STEPS * leg
        args = (config_of(layout, mesh), start + STEPS, str(tmp_path), start)
        answers = pool.run(cases.train_with_checkpoints, mesh[0], *args)
        losses |= answers[0]["losses"]
        saved = newest_valid(tmp_path)
        assert saved is not None
        assert saved.weights_digest == combine(answer["digest"] for answer in answers)
    found = [losses[step] for step in range(STEPS * len(journey))]
    assert found == pytest.approx(expected_losses(layout), rel=1e-5, abs=0.0)


@pytest.mark.parametrize("layout", ["mixtral", "deepseek"])
def test_loading_changes_no_bit_in_any_layout(pool: Pool, tmp_path: Path, layout: str) -> None:
    """What is loaded and saved again without a step has the same digest, whatever layout did it."""
    pool.run(cases.train_with_checkpoints, 4, config_of(layout, EP4), STEPS, str(tmp_path), 0)
    first = newest_valid(tmp_path)
    assert first is not None
    for mesh in (ONE, EP2_DP2, FSDP2, HSDP, EP4):
        args = (config_of(layout, mesh), STEPS, str(tmp_path), STEPS)
        answers = pool.run(cases.train_with_checkpoints, mesh[0], *args)
        assert combine(answer["digest"] for answer in answers) == first.weights_digest
    again = newest_valid(tmp_path)
    assert again is not None
    assert again.tensors.keys() == first.tensors.keys()
    kinds = {name.split(".")[1] for name in first.tensors if name.startswith("optim.")}
    assert kinds == {"exp_avg", "exp_avg_sq", "step"}


def test_ranks_that_hold_nothing_of_a_tensor_resume_too(pool: Pool, tmp_path: Path) -> None:
    """FSDP deals 5 rows of a router to 4 ranks as 2, 2, 1, 0."""
    config = cases.small_config(
        "layout.num_experts=5", "launcher.nproc_per_node=4", "train.seq_len=20", "model.vocab_size=265"
    )
    whole = cases.small_config("layout.num_experts=5", "train.seq_len=20", "model.vocab_size=265")
    losses: dict[int, float] = {}
    for leg, (world, legs_config) in enumerate([(4, config), (4, config), (1, whole), (4, config)]):
        args = (legs_config, 2 * leg + 2, str(tmp_path), 2 * leg)
        losses |= pool.run(cases.train_with_checkpoints, world, *args)[0]["losses"]
    expected = run_oracle(whole, 8).losses
    assert [losses[step] for step in range(8)] == pytest.approx(expected, rel=1e-5, abs=0.0)


def test_every_layout_starts_from_the_same_bits(pool: Pool, tmp_path: Path) -> None:
    digests = set()
    for number, mesh in enumerate((ONE, FSDP2, EP4, EP2_DP2, HSDP)):
        folder = str(tmp_path / str(number))
        answers = pool.run(cases.train_with_checkpoints, mesh[0], config_of("mixtral", mesh), 0, folder, 0)
        digests.add(combine(answer["digest"] for answer in answers))
    assert len(digests) == 1


def test_a_gap_in_what_the_ranks_own_is_refused(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="do not make up this tensor"):
        pool.run(cases.save_without_rank_1, 2, config_of("mixtral", FSDP2), str(tmp_path))
    assert newest_valid(tmp_path) is None


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (
            "*layers.1.feed_forward.experts.w2",
            "model.layers.1.feed_forward.experts.w2",
        ),  # the weight and all its slots
        ("optim.*.norm.weight", "optim.exp_avg.norm.weight"),
        ("model.*.bias_E", "model.layers.1.feed_forward.router.bias_E"),
    ],
)
def test_what_no_rank_names_is_refused_and_the_older_checkpoint_stays(
    pool: Pool, tmp_path: Path, lost: str, named: str
) -> None:
    config = config_of("deepseek", FSDP2)
    for told in pool.run(cases.save_without_a_parameter, 2, config, str(tmp_path), lost):
        assert named in told and "no rank holds it" in told
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]
    found = newest_valid(tmp_path)
    assert found is not None and found.step == 1
