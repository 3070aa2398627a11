from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data.batch import IGNORED, make_batch
from trainer.data.order import evaluation_rows, permutation
from trainer.data.packing import Packer, Rows, RowWriter

EOS = 0


def stream(lengths: list[int]) -> list[np.ndarray]:
    numbers = iter(range(1, 10_000))
    return [np.array([next(numbers) for _ in range(n)] + [EOS], np.int32) for n in lengths]


def test_rows_tile_the_stream_and_every_token_is_a_target_once() -> None:
    documents = stream([5, 1, 30, 2, 9, 16])
    flat = np.concatenate(documents)
    packer = Packer(seq_len=8)
    rows = np.concatenate([packer.push([document]) for document in documents])
    assert len(rows) == (len(flat) - 1) // 8
    assert np.array_equal(rows[:, 1:].reshape(-1), flat[1 : 1 + 8 * len(rows)])
    assert np.array_equal(rows[:, 0], flat[: 8 * len(rows) : 8])
    assert np.array_equal(packer.carry, flat[8 * len(rows) :])


def test_how_documents_arrive_does_not_matter() -> None:
    documents = stream([3, 40, 1, 1, 25, 7])
    at_once = Packer(8).push(documents)
    packer = Packer(8)
    assert np.array_equal(at_once, np.concatenate([packer.push(documents[:4]), packer.push(documents[4:])]))


@pytest.mark.parametrize(("vocab_size", "stored"), [(300, 2), (70_000, 4)])
def test_rows_come_back_from_disk(tmp_path: Path, vocab_size: int, stored: int) -> None:
    rows = np.random.default_rng(0).integers(0, vocab_size, (3000, 17)).astype(np.int32)
    path = tmp_path / "rows.arrow"
    writer = RowWriter(path, 16, vocab_size)
    for part in np.array_split(rows, 7):
        writer.write(part)
    writer.close()
    assert path.stat().st_size < rows.size * stored * 1.1
    read = Rows(path, 16)
    assert len(read) == 3000
    assert np.array_equal(read[np.arange(3000)], rows)
    wanted = np.array([2999, 0, 1024, 1023, 0])
    assert np.array_equal(read[wanted], rows[wanted])
    with pytest.raises(IndexError):
        read[[3000]]
    with pytest.raises(ValueError, match="expected 9"):
        Rows(path, 8)


def test_batch_marks_documents_and_ignores_the_target_across_them() -> None:
    rows = np.array([[5, 6, EOS, 7, EOS, 8, 9], [1, 2, 3, 4, 5, 6, EOS]], np.int32)
    batch = make_batch(rows, np.array([10, 11]), EOS, respect_documents=True)
    assert batch.tokens.tolist() == [[5, 6, 0, 7, 0, 8], [1, 2, 3, 4, 5, 6]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2], [0] * 6]
    assert batch.targets.tolist() == [[6, 0, IGNORED, 0, IGNORED, 9], [2, 3, 4, 5, 6, 0]]
    assert batch.num_targets == 10
    assert (batch.tokens.dtype, batch.targets.dtype, batch.document_ids.dtype, batch.sample_ids.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
        torch.int64,
    )
    plain = make_batch(rows, np.array([10, 11]), EOS, respect_documents=False)
    assert plain.targets.tolist() == rows[:, 1:].tolist()


def test_batch_padding_has_no_targets_and_moves_between_devices() -> None:
    batch = make_batch(np.ones((2, 5), np.int32), np.array([3, -1]), EOS, respect_documents=True)
    assert batch.targets.tolist() == [[1] * 4, [IGNORED] * 4]
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.document_ids.device.type, moved.sample_ids.device.type} == {
        "meta"
    }


def test_permutations_are_keyed_by_seed_and_epoch() -> None:
    orders = [permutation(500, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(order), np.arange(500)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(orders[0], permutation(500, 0, 0))
    # The order is part of every checkpoint's meaning: a change here would change resumed runs.
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_evaluation_rows_are_a_fixed_prefix() -> None:
    assert np.array_equal(evaluation_rows(100, 10), evaluation_rows(100, 20)[:10])
    assert sorted(evaluation_rows(5, 64)) == [0, 1, 2, 3, 4]
