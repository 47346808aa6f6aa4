from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.stream import (
    CacheDataset,
    WindowShuffleSampler,
    concatenate_rows,
    is_held_out,
    pack_sequences,
    shuffled_order,
    split_held_out,
    training_row,
)
from storage_schemas.errors import RequestError
from storage_schemas.reader import CacheReader
from tests.students import make_student
from tests.teacher_cache import write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return write_cache(tmp_path_factory.mktemp("stream") / "cache", make_student(seed=1), shards=3)


def test_a_row_carries_the_distributions_that_predict_its_targets(cache: CacheReader) -> None:
    record = cache.read(0)
    row = training_row(record)
    expected = [i for i in range(len(record) - 1) if record.completion_mask[i + 1]]
    assert row.positions.tolist() == expected
    assert len(row.positions) > 0
    for place, position in enumerate(expected):
        assert row.label_ids[place] == record.token_ids[position + 1]
        assert row.label_logprob[place] == record.label_logprob[position]
        np.testing.assert_array_equal(row.top_ids[place], record.top_ids[position])
        np.testing.assert_array_equal(row.top_logprobs[place], record.top_logprobs[position])
        assert row.log_tail_mass[place] == record.log_tail_mass[position]


def test_targets_all_trains_on_every_token_that_something_predicts(cache: CacheReader) -> None:
    record = cache.read(0)
    assert training_row(record, targets="all").positions.tolist() == list(range(len(record) - 1))


@pytest.mark.parametrize("max_length", [1, 2, 3, 5, 11, 12, 99])
def test_a_cut_row_keeps_the_distribution_of_the_token_after_the_cut(cache: CacheReader, max_length: int) -> None:
    record = cache.read(0)
    row, whole = training_row(record, max_length=max_length), training_row(record)
    assert row.token_ids.tolist() == record.token_ids[:max_length].tolist()
    kept = whole.positions < max_length
    assert row.positions.tolist() == whole.positions[kept].tolist()
    np.testing.assert_array_equal(row.top_ids, whole.top_ids[kept])
    assert row.label_ids.tolist() == whole.label_ids[kept].tolist()
    assert np.isfinite(row.label_logprob).all()


def test_the_dataset_counts_what_it_cuts(cache: CacheReader) -> None:
    dataset = CacheDataset(cache, max_length=10)
    lengths = cache.lengths.tolist()
    assert dataset.cut_sequences == sum(length > 10 for length in lengths) > 0
    assert dataset.cut_tokens == sum(max(0, length - 10) for length in lengths)
    assert dataset.token_count == sum(min(10, length) for length in lengths)
    assert all(len(dataset[i]) <= 10 for i in range(len(dataset)))


def test_a_row_is_a_pure_function_of_its_index_also_in_another_process(cache: CacheReader) -> None:
    dataset = CacheDataset(cache, max_length=24, packing=True)
    copy = pickle.loads(pickle.dumps(dataset))
    for i in reversed(range(len(dataset))):
        first, second, third = dataset[i], dataset[i], copy[i]
        for other in (second, third):
            np.testing.assert_array_equal(first.token_ids, other.token_ids)
            np.testing.assert_array_equal(first.top_logprobs, other.top_logprobs)


def test_an_unusable_cache_is_refused(cache: CacheReader) -> None:
    with pytest.raises(RequestError, match="two tokens or more"):
        CacheDataset(cache, sequences=[])


def test_concatenated_rows_keep_their_targets_and_start_their_positions_anew(cache: CacheReader) -> None:
    rows = [training_row(cache.read(i)) for i in (2, 0, 1)]
    joined = concatenate_rows(rows)
    assert joined.token_ids.tolist() == [int(t) for row in rows for t in row.token_ids]
    assert [int(i) for i in np.flatnonzero(joined.position_ids == 0)] == [0, len(rows[0]), len(rows[0]) + len(rows[1])]
    inputs = joined.token_ids[joined.positions]
    assert inputs.tolist() == [int(row.token_ids[p]) for row in rows for p in row.positions]


@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 4), min_size=40, max_size=40),
    capacity=st.integers(20, 32),
)
def test_packing_loses_nothing_overfills_nothing_and_never_crosses_a_shard(
    lengths: list[int], cuts: list[int], capacity: int
) -> None:
    shards = np.sort(np.array(cuts[: len(lengths)]))
    sizes = np.array(lengths, np.int64)
    packs = pack_sequences(sizes, shards, capacity, np.arange(100, 100 + len(lengths)))
    assert sorted(int(i) for pack in packs for i in pack) == list(range(100, 100 + len(lengths)))
    for pack in packs:
        assert sizes[pack - 100].sum() <= capacity
        assert len(set(shards[pack - 100].tolist())) == 1
    for shard in set(shards.tolist()):
        room = sorted(capacity - sizes[pack - 100].sum() for pack in packs if shards[pack[0] - 100] == shard)
        smallest = sizes[shards == shard].min()
        # Best fit opens a row only where nothing open has room, so two rows never have room for each other's all.
        assert sum(free >= smallest + capacity // 2 for free in room) <= 1


@given(
    shards=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    window=st.integers(1, 8),
)
def test_the_order_is_a_permutation_that_keeps_to_its_window(
    shards: list[int], seed: int, epoch: int, window: int
) -> None:
    shard_of = np.array(shards)
    order = shuffled_order(shard_of, seed=seed, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(len(shards)))
    assert order.tolist() == shuffled_order(shard_of, seed=seed, epoch=epoch, window=window).tolist()
    visited = shard_of[order]
    last_seen = {int(shard): int(np.flatnonzero(visited == shard)[-1]) for shard in set(shards)}
    first_seen = {int(shard): int(np.flatnonzero(visited == shard)[0]) for shard in set(shards)}
    for place in range(len(visited)):
        assert sum(first_seen[s] <= place <= last_seen[s] for s in first_seen) <= window


def test_the_sampler_depends_on_seed_and_epoch_only() -> None:
    shard_of = np.repeat(np.arange(5), 20)
    sampler = WindowShuffleSampler(shard_of, seed=1, window=2)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(second) == sorted(first) == list(range(100))
    assert second != first
    assert list(WindowShuffleSampler(shard_of, seed=2, window=2)) != first
    resumed = WindowShuffleSampler(shard_of, seed=1, window=2)
    resumed.set_epoch(1)
    assert list(resumed) == second


def test_the_held_out_split_is_stable_and_by_document(cache: CacheReader) -> None:
    assert is_held_out("a document", 1.0)
    assert not is_held_out("a document", 0.0)
    share = np.mean([is_held_out(f"document {i}", 0.25) for i in range(4000)])
    assert abs(share - 0.25) < 0.03  # four standard deviations of 4,000 fair draws
    train, held_out = split_held_out(cache, 0.5)
    assert sorted([*train, *held_out]) == list(range(len(cache)))
    assert all(is_held_out(cache.document_ids[i], 0.5) for i in held_out)
    # A hash that other builds of Python, numpy or this package must reproduce: data would leak otherwise.
    assert [is_held_out(f"doc-{i}", 0.5) for i in range(8)] == GOLDEN_SPLIT
    with pytest.raises(RequestError, match="both sides"):
        split_held_out(cache, 1e-9)


GOLDEN_SPLIT = [False, False, True, False, False, False, True, True]


def test_reading_needs_only_the_cache(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", make_student(seed=1), lengths=(6, 6), shards=1)
    assert len(CacheDataset(cache)[1]) == 6
