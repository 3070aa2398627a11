from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.data.batch import IGNORED, Batch
from trainer.data.loader import Loader, build_loader, merge_states, valid_batches
from trainer.data.order import permutation
from trainer.data.prepare import PreparedData, prepare_data
from trainer.data.sources import draw

Configure = Callable[..., RunConfig]
Corpus = tuple[RunConfig, PreparedData]
Samples = dict[int, tuple[list[int], list[int], list[int]]]


@pytest.fixture
def packed(configure: Configure, text_folder: Path) -> Corpus:
    config = configure("text", text_folder)
    return config, prepare_data(config)


def stream(configure: Configure, folder: Path) -> Corpus:
    config = configure("hub", name=str(folder))
    config.eval.max_rows = 6
    return config, prepare_data(config)


@pytest.fixture
def three_files(configure: Configure, parquet_folder: Path) -> Corpus:
    """Fewer files than the 8 virtual shards: Parquet files shared by 3, 3 and 2 of them."""
    return stream(configure, parquet_folder)


@pytest.fixture
def many_files(configure: Configure, jsonl_file: Path, tmp_path: Path) -> Corpus:
    """More files than virtual shards: 19 of JSON lines, whole to one each."""
    folder = tmp_path / "lines"
    folder.mkdir()
    lines = jsonl_file.read_text().splitlines(keepends=True)
    for i in range(19):
        (folder / f"train-{i:02}.jsonl").write_text("".join(lines[i::19]))
    return stream(configure, folder)


@pytest.fixture
def one_file(configure: Configure, jsonl_file: Path, tmp_path: Path) -> Corpus:
    (tmp_path / "single").mkdir()
    jsonl_file.rename(tmp_path / "single" / "train.jsonl")
    return stream(configure, tmp_path / "single")


@pytest.fixture(params=["three_files", "many_files", "one_file"])
def streamed(request: pytest.FixtureRequest) -> Corpus:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["packed", "three_files", "many_files", "one_file"])
def corpus(request: pytest.FixtureRequest) -> Corpus:
    return request.getfixturevalue(request.param)


def samples(batches: list[Batch]) -> Samples:
    return {
        int(batch.sample_ids[i]): (
            batch.tokens[i].tolist(),
            batch.targets[i].tolist(),
            batch.document_ids[i].tolist(),
        )
        for batch in batches
        for i in range(len(batch.sample_ids))
    }


def loaders(corpus: Corpus, dp_size: int, micro_batch: int) -> list[Loader]:
    config, prepared = corpus
    config.train.micro_batch = micro_batch
    return [build_loader(prepared, config, rank, dp_size) for rank in range(dp_size)]


def step(ranks: list[Loader]) -> Samples:
    batches = [loader.next_step() for loader in ranks]
    assert len({len(each) for each in batches}) == 1
    merged = samples([batch for each in batches for batch in each])
    assert len(merged) == sum(len(batch.sample_ids) for each in batches for batch in each), "none twice"
    return merged


STEPS = 60  # more than two epochs of the packed rows, and of most virtual shards


def test_samples_of_a_step_do_not_depend_on_the_world(corpus: Corpus) -> None:
    one = loaders(corpus, 1, 8)
    expected = [step(one) for _ in range(STEPS)]
    for number, got in enumerate(expected):
        assert sorted(got) == list(range(8 * number, 8 * number + 8))
    for dp_size, micro_batch in ((1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
        ranks = loaders(corpus, dp_size, micro_batch)
        assert [step(ranks) for _ in range(STEPS)] == expected


def test_shapes_and_micro_batches(corpus: Corpus) -> None:
    (loader, _) = loaders(corpus, 2, 2)
    batches = loader.next_step()
    assert [batch.tokens.shape for batch in batches] == [torch.Size([2, 16])] * 2
    assert [batch.sample_ids.tolist() for batch in batches] == [[0, 2], [4, 6]]


@pytest.mark.parametrize("stop", [0, 1, 7, 31])
def test_resume_is_exact_in_any_world(corpus: Corpus, stop: int) -> None:
    reference = loaders(corpus, 1, 8)
    expected = [step(reference) for _ in range(STEPS)]
    before = loaders(corpus, 2, 2)
    for _ in range(stop):
        step(before)
    state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in before])))
    for dp_size, micro_batch in ((2, 2), (4, 1), (1, 4)):
        after = loaders(corpus, dp_size, micro_batch)
        for loader in after:
            loader.load_state_dict(state)
        assert [step(after) for _ in range(STEPS - stop)] == expected[stop:]


def test_saving_does_not_disturb_and_states_chain(corpus: Corpus) -> None:
    quiet = loaders(corpus, 1, 8)
    expected = [step(quiet) for _ in range(30)]
    got = []
    ranks = loaders(corpus, 2, 4)
    for number in range(30):
        got.append(step(ranks))
        state = merge_states([loader.state_dict() for loader in ranks])
        if number % 4 == 3:
            ranks = loaders(corpus, 1 if len(ranks) == 2 else 2, 4)
            for loader in ranks:
                loader.load_state_dict(state)
    assert got == expected


def test_resume_within_the_epoch_loads_into_a_running_loader(corpus: Corpus) -> None:
    (loader,) = loaders(corpus, 1, 8)
    state = loader.state_dict()
    first = [samples(loader.next_step()) for _ in range(5)]
    loader.load_state_dict(state)
    assert [samples(loader.next_step()) for _ in range(5)] == first


def test_epochs_are_keyed_permutations_of_all_rows(packed: Corpus) -> None:
    config, prepared = packed
    assert prepared.train is not None and prepared.num_train_rows is not None
    num_rows = prepared.num_train_rows
    one = loaders(packed, 1, 8)
    seen = {number: tokens for _ in range(STEPS) for number, (tokens, *_) in step(one).items()}
    assert num_rows % 8 and len(seen) > 2 * num_rows, "steps straddle the seam of epochs"
    for number, tokens in seen.items():
        row = permutation(num_rows, config.train.seed, number // num_rows)[number % num_rows]
        assert prepared.train[[row]][0, :-1].tolist() == tokens
    config.train.seed = 1
    (other,) = loaders(packed, 1, 8)
    assert (
        samples(other.next_step())[0][0] == prepared.train[permutation(num_rows, 1, 0)[:1]][0, :-1].tolist()
    )


def test_a_larger_global_batch_goes_on_where_the_smaller_stopped(packed: Corpus) -> None:
    config, prepared = packed
    (loader,) = loaders(packed, 1, 2)
    for _ in range(3):
        loader.next_step()
    config.train.global_batch = 16
    larger = build_loader(prepared, config, 0, 1)
    larger.load_state_dict(loader.state_dict())
    assert sorted(samples(larger.next_step())) == list(range(24, 40))


def test_each_documents_tokens_are_predicted_from_that_document(packed: Corpus) -> None:
    _, prepared = packed
    (loader,) = loaders(packed, 1, 8)
    crossings = 0
    for _ in range(10):
        for tokens, targets, ids in samples(loader.next_step()).values():
            for i in range(15):
                if ids[i] != ids[i + 1]:
                    assert tokens[i] == prepared.tokenizer.eos and targets[i] == IGNORED
                    crossings += 1
                else:
                    assert targets[i] == tokens[i + 1]
    assert crossings > 10


def test_state_of_other_data_is_refused(packed: Corpus, configure: Configure, text_folder: Path) -> None:
    (loader,) = loaders(packed, 1, 8)
    other = configure("text", text_folder, valid_fraction=0.4)
    with pytest.raises(ConfigError, match="the checkpoint stands in other data"):
        build_loader(prepare_data(other), other, 0, 1).load_state_dict(loader.state_dict())


def test_state_of_other_virtual_shards_is_refused(three_files: Corpus) -> None:
    (loader,) = loaders(three_files, 1, 8)
    three_files[0].data.virtual_shards = 4
    (other,) = loaders(three_files, 1, 8)
    with pytest.raises(ConfigError, match=r"data\.virtual_shards=4: .*8 virtual shards.*=8\."):
        other.load_state_dict(loader.state_dict())


def test_stream_reads_every_training_document_and_no_held_out_one(streamed: Corpus, texts: list[str]) -> None:
    config, prepared = streamed
    (loader,) = loaders(streamed, 1, 8)
    per_shard: dict[int, list[int]] = {v: [] for v in range(8)}
    for _ in range(80):
        for number, (tokens, *_) in samples(loader.next_step()).items():
            per_shard[number % 8] += tokens
    read: set[str] = set()
    for tokens in per_shard.values():
        read.update(prepared.tokenizer.decode(tokens).split("<|endoftext|>")[:-1])
    train = {text for text in texts if draw(text) >= config.data.valid_fraction}
    assert read == train
    held_out = set(texts) - train
    shown = "".join(
        prepared.tokenizer.decode(b.tokens[0].tolist()) for b in valid_batches(prepared, config, 0, 1)
    )
    assert held_out and not any(text in shown for text in train)
    assert prepared.num_train_rows is None and prepared.train is None
    assert prepared.num_valid_rows >= 6


def test_virtual_shard_without_documents(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    rows = [{"text": f"document {i} " * 20} for i in range(5)]
    (tmp_path / "few" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configure("hub", name=str(tmp_path / "few"), valid_fraction=0.5)
    with pytest.raises(ConfigError, match=r"data\.virtual_shards=8: virtual shard \d holds no document"):
        build_loader(prepare_data(config), config, 0, 1).next_step()


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 8), (2, 2), (4, 4), (3, 1)])
def test_evaluation_reads_the_same_rows_in_any_world(packed: Corpus, dp_size: int, micro_batch: int) -> None:
    config, prepared = packed
    config.train.micro_batch, config.train.global_batch, config.eval.max_rows = 1, 24, 13
    assert prepared.num_valid_rows > 13
    expected = samples(list(valid_batches(prepared, config, 0, 1)))
    assert sorted(expected) == list(range(13))
    config.train.micro_batch = micro_batch
    ranks = [list(valid_batches(prepared, config, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for each in ranks for batch in each]
    got = samples(batches)
    got.pop(-1, None)
    assert got == expected
    for batch in batches:
        assert batch.tokens.shape == (micro_batch, 16)
        assert (batch.targets[batch.sample_ids < 0] == IGNORED).all()
    config.train.seed = 99
    assert samples(list(valid_batches(prepared, config, 0, 1))).items() >= expected.items()


def test_evaluation_of_a_small_corpus_reads_all_of_it(packed: Corpus) -> None:
    config, prepared = packed
    config.eval.max_rows = 10_000
    got = samples(list(valid_batches(prepared, config, 0, 1)))
    got.pop(-1, None)
    rows = prepared.valid[np.arange(prepared.num_valid_rows)]
    assert sorted(tokens for tokens, *_ in got.values()) == sorted(rows[:, :-1].tolist())


def test_hub_errors(configure: Configure, parquet_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.text_field=body: .* has the columns text"):
        prepare_data(configure("hub", name=str(parquet_folder), text_field="body"))
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ConfigError, match=r"data\.name=.*hollow: cannot be opened"):
        prepare_data(configure("hub", name=str(tmp_path / "hollow")))
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "test.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=r"has the splits test, no train"):
        prepare_data(configure("hub", name=str(tmp_path / "validation")))


def test_hub_name_offline_fails_at_once_and_by_name(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as the variable HF_HUB_OFFLINE=1
    expected = r"data\.name=some-owner/some-name: the hub cannot be reached \(.*offline.*Fix: .*local folder"
    with pytest.raises(ConfigError, match=expected):
        prepare_data(configure("hub", name="some-owner/some-name"))


@pytest.mark.parametrize(("dp_size", "micro"), [(3, 2), (3, 1), (5, 2)])
def test_a_batch_that_does_not_divide_is_padded_without_targets(
    packed: Corpus, dp_size: int, micro: int
) -> None:
    config, prepared = packed
    whole: Samples = {}
    alone = build_loader(prepared, config, 0, 1)
    for _ in range(2):
        whole |= samples(alone.next_step())
    config.train.micro_batch, config.train.pad_batch = micro, True
    found: Samples = {}
    for dp_rank in range(dp_size):
        loader = build_loader(prepared, config, dp_rank, dp_size)
        for _ in range(2):
            batches = loader.next_step()
            assert len(batches) == -(-config.train.global_batch // (micro * dp_size)), "alike on all ranks"
            assert all(len(batch.tokens) == micro for batch in batches)
            padding = [row for batch in batches for row in batch.targets[batch.sample_ids < 0]]
            assert all((row == IGNORED).all() for row in padding)
            read = samples(batches)
            read.pop(-1, None)
            assert not found.keys() & read.keys()
            found |= read
    assert found == whole
