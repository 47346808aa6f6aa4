from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distiller.collate import Collator
from distiller.stream import CacheDataset, concatenate_rows
from storage_schemas.reader import CacheReader
from tests.students import make_student
from tests.teacher_cache import write_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return write_cache(tmp_path_factory.mktemp("collate") / "cache", make_student(seed=1))


def test_rows_are_padded_right_and_row_index_finds_the_targets(cache: CacheReader) -> None:
    dataset = CacheDataset(cache)
    rows = [dataset[i] for i in (1, 0, 3)]
    batch = Collator(pad_token_id=7)(rows)
    width = max(len(row) for row in rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, width)
    for place, row in enumerate(rows):
        assert batch["input_ids"][place].tolist() == [*row.token_ids.tolist(), *[7] * (width - len(row))]
        assert batch["attention_mask"][place].tolist() == [1] * len(row) + [0] * (width - len(row))
        assert batch["position_ids"][place, : len(row)].tolist() == list(range(len(row)))
    inputs = batch["input_ids"].reshape(-1)[batch["row_index"]]
    assert inputs.tolist() == [int(row.token_ids[p]) for row in rows for p in row.positions]
    teacher = batch["teacher"]
    np.testing.assert_array_equal(teacher["top_ids"], np.concatenate([row.top_ids for row in rows]))
    np.testing.assert_array_equal(teacher["label_ids"], np.concatenate([row.label_ids for row in rows]))
    assert teacher["top_ids"].dtype == teacher["label_ids"].dtype == batch["row_index"].dtype == torch.int64
    assert teacher["top_logprobs"].dtype == teacher["log_tail_mass"].dtype == torch.float32


def test_flat_rows_have_no_padding(cache: CacheReader) -> None:
    dataset = CacheDataset(cache)
    rows = [dataset[i] for i in (2, 4)]
    batch = Collator(flatten=True)(rows)
    joined = concatenate_rows(rows)
    assert "attention_mask" not in batch
    assert batch["input_ids"].tolist() == [joined.token_ids.tolist()]
    assert batch["position_ids"].tolist() == [joined.position_ids.tolist()]
    assert batch["row_index"].tolist() == joined.positions.tolist()


def test_rows_without_targets_collate_to_no_teacher_rows(cache: CacheReader) -> None:
    dataset = CacheDataset(cache, max_length=1)  # the prompt's first token, which predicts no target
    batch = Collator()([dataset[0]])
    assert batch["row_index"].shape == (0,)
    assert batch["teacher"]["top_ids"].shape == (0, cache.identity.capture.top_k)


@pytest.mark.parametrize("packing", [False, True])
def test_extras_travel_with_their_rows(tmp_path: Path, packing: bool) -> None:
    cache = write_cache(tmp_path / "cache", make_student(seed=1), entropy=True)
    dataset = CacheDataset(cache, max_length=20, packing=packing)
    rows = [dataset[i] for i in range(len(dataset))]
    teacher = Collator(packed=packing)(rows)["teacher"]
    assert list(teacher["extras"]) == ["entropy"]
    expected = np.concatenate([row.extras["entropy"] for row in rows])
    np.testing.assert_array_equal(teacher["extras"]["entropy"], expected)
    stored = {
        (int(r.token_ids[i]), float(r.top_logprobs[i, 0])): float(r.extras["entropy"][i])
        for r in cache
        for i in range(len(r))
    }
    for row in rows:
        for place, position in enumerate(row.positions):
            key = (int(row.token_ids[position]), float(row.top_logprobs[place, 0]))
            assert row.extras["entropy"][place] == stored[key]
