"""Documents as sequences with stable ids, and what is counted of them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cache_builder.corpus import CorpusCounts, plan_shards
from storage_schemas.errors import RequestError
from tests.conftest import TINY_VOCAB_SIZE
from tests.planted_documents import everything, ids_of, make_corpus, same


def test_a_document_that_is_too_long_is_split(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 10, 11], "completion_mask": [1, 0, 1, 1, 1, 0, 1]}
    corpus = make_corpus([row], tiny_tokenizer, max_length=3)
    pieces = corpus.render(0)
    assert [piece.token_ids.tolist() for piece in pieces] == [[5, 6, 7], [8, 9, 10], [11]]
    assert [piece.completion_mask.tolist() for piece in pieces] == [[False, False, True], [False, True, False], [False]]
    assert [piece.sequence_id for piece in pieces] == ["0/0/0", "0/0/1", "0/0/2"]
    assert len({piece.document_id for piece in pieces}) == 1
    for piece in pieces:
        assert (piece.token_ids.dtype, piece.completion_mask.dtype) == (np.int32, np.bool_)
    assert plan_shards(corpus, 100).counts == CorpusCounts(documents=1, sequences=3, tokens=7, targets=2, split=1)


def test_a_document_that_is_too_long_is_truncated_or_dropped(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = ids_of(5, 3, 4)
    cut = make_corpus(rows, tiny_tokenizer, max_length=3, overflow="truncate")
    assert [piece.token_ids.tolist() for piece in everything(cut)] == [row["input_ids"][:3] for row in rows]
    assert plan_shards(cut, 100).counts == CorpusCounts(
        documents=3, sequences=3, tokens=9, targets=6, truncated=2, tokens_lost=3
    )
    dropped = make_corpus(rows, tiny_tokenizer, max_length=3, overflow="drop")
    assert [piece.sequence_id for piece in everything(dropped)] == ["0/1/0"]
    assert plan_shards(dropped, 100).counts == CorpusCounts(
        documents=3, sequences=1, tokens=3, targets=2, dropped=2, tokens_lost=9
    )


def test_a_chat_through_splitting_and_truncation_keeps_its_targets(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "What is the rest?"},
        {"role": "assistant", "content": "The mass of the rest."},
    ]
    rows = [{"messages": messages}]
    whole = make_corpus(rows, tiny_tokenizer, max_length=200).render(0)[0]
    answer = "The mass of the rest.<|im_end|>"
    assert tiny_tokenizer.decode(whole.token_ids[whole.completion_mask]) == answer
    expected = whole.completion_mask.copy()
    expected[::5] = False  # the first token of each piece
    pieces = make_corpus(rows, tiny_tokenizer, max_length=5).render(0)
    assert np.concatenate([piece.completion_mask for piece in pieces]).tolist() == expected.tolist()
    assert np.concatenate([piece.token_ids for piece in pieces]).tolist() == whole.token_ids.tolist()
    length = int(np.flatnonzero(whole.completion_mask)[2])
    (head,) = make_corpus(rows, tiny_tokenizer, max_length=length, overflow="truncate").render(0)
    assert head.completion_mask.sum() == 2
    assert head.token_ids.tolist() == whole.token_ids[:length].tolist()


texts = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(texts=texts, max_length=st.integers(2, 9))
def test_the_pieces_of_a_document_are_the_document(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str], max_length: int
) -> None:
    rows = [{"text": text} for text in texts]
    split = make_corpus(rows, tiny_tokenizer, max_length=max_length)
    for row, text in enumerate(texts):
        pieces = split.render(row)
        reference = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
        assert [token for piece in pieces for token in piece.token_ids.tolist()] == reference
        assert all(len(piece) == max_length for piece in pieces[:-1])
        assert 1 <= len(pieces[-1]) <= max_length
        for piece in pieces:
            assert piece.completion_mask.tolist() == [False] + [True] * (len(piece) - 1)


def test_ids_of_documents_are_their_content_or_a_column(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"text": "a", "url": "u/1", "score": 1},
        {"text": "b", "url": "u/2", "score": 2},
        {"text": "a", "url": "u/3", "score": 3},
    ]
    ids = [piece.document_id for piece in everything(make_corpus(rows, tiny_tokenizer))]
    assert ids[0] == hashlib.sha256(b'{"text":"a"}').hexdigest()[:16]
    assert ids[0] == ids[2] != ids[1]
    assert [piece.document_id for piece in everything(make_corpus(rows[::-1], tiny_tokenizer))] == ids[::-1]
    named = everything(make_corpus(rows, tiny_tokenizer, id_column="url", segment=7))
    assert [piece.document_id for piece in named] == ["u/1", "u/2", "u/3"]
    assert [piece.sequence_id for piece in named] == ["7/0/0", "7/1/0", "7/2/0"]
    assert [piece.document_id for piece in everything(make_corpus(rows, tiny_tokenizer, id_column="score"))] == [
        "1",
        "2",
        "3",
    ]
    assert everything(make_corpus(rows, tiny_tokenizer, id_column="text"))[1].document_id == "b"
    with pytest.raises(RequestError, match="document 1 has no id in column 'url'"):
        everything(
            make_corpus([{"text": "a", "url": "u"}, {"text": "b", "url": None}], tiny_tokenizer, id_column="url")
        )


def test_a_mask_beside_the_ids_makes_another_document(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [-100, -100]}]
    first, second = everything(make_corpus(rows, tiny_tokenizer))
    assert first.document_id != second.document_id


def test_rendering_does_not_depend_on_the_batch(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "The teacher reads " * (1 + number % 5)} for number in range(150)]
    corpus = make_corpus(rows, tiny_tokenizer)
    one_by_one = everything(corpus)
    assert same([piece for pieces in corpus.documents(0, 150) for piece in pieces], one_by_one)
    assert same(
        [piece for pieces in corpus.documents(63, 66) for piece in pieces],
        [piece for row in (63, 64, 65) for piece in corpus.render(row)],
    )
    monkeypatch.setattr("cache_builder.rendering.BATCH_CHARACTERS", 40)  # several calls of the tokenizer a batch
    assert same([piece for pieces in corpus.documents(0, 150) for piece in pieces], one_by_one)
    with pytest.raises(IndexError):
        corpus.render(150)


def test_empty_documents_are_an_error_or_skipped(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"text": "b"}, {"text": None}]
    with pytest.raises(RequestError, match=r'document 1 \(id [0-9a-f]{16}\) has no tokens; .*empty_documents = "skip"'):
        plan_shards(make_corpus(rows, tiny_tokenizer), 100)
    plan = plan_shards(make_corpus(rows, tiny_tokenizer, empty_documents="skip"), 100)
    assert plan.counts == CorpusCounts(documents=4, sequences=2, tokens=4, targets=2, skipped=2)


def test_documents_without_targets_are_kept_and_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    corpus = make_corpus(rows, tiny_tokenizer, max_length=99)
    assert not corpus.render(0)[0].completion_mask.any()
    counts = plan_shards(corpus, 100).counts
    assert (counts.targetless, counts.targets, counts.sequences) == (1, 0, 1)


def test_straddling_tokens_are_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "of t", "completion": "he"}, {"prompt": "of", "completion": " the"}]
    assert len(tiny_tokenizer(" the")["input_ids"]) == 1
    assert plan_shards(make_corpus(rows, tiny_tokenizer), 100).counts.straddling_tokens == 1


def test_ids_outside_the_vocabulary_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = make_corpus([{"input_ids": [1, TINY_VOCAB_SIZE - 1]}, {"input_ids": [1, TINY_VOCAB_SIZE]}], tiny_tokenizer)
    assert corpus.render(0)
    with pytest.raises(RequestError, match=r"document 1 .* outside the vocabulary of 300"):
        corpus.render(1)


def test_columns_that_are_not_there_are_named_with_those_that_are(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"body": "a", "title": "b", "score": 1}]
    for fields, message in (
        ({}, r"expected a column text, messages or input_ids.* columns body, title, score; set text_column"),
        ({"text_column": "text"}, r"no column 'text'.* columns body, title, score; set text_column"),
        ({"text_column": "body", "id_column": "url"}, r"no column 'url'.* columns body, title, score; set id_column"),
    ):
        with pytest.raises(RequestError, match=message):
            make_corpus(rows, tiny_tokenizer, **fields)
    for row, message in (
        ({"text": 3}, "the column 'text' holds int64, which is no text"),
        ({"messages": "hi"}, "the column 'messages' holds string, which is no messages"),
        (
            {"prompt": "hi", "completion": [{"role": "assistant", "content": "yo"}]},
            "both strings or both message lists",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            make_corpus([row], tiny_tokenizer)
    with pytest.raises(RequestError, match="which is no text, messages or input_ids"):
        make_corpus([{"body": 3}], tiny_tokenizer, text_column="body")


def test_columns_are_found_in_the_precedence_of_trl(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {
        "text": "a",
        "messages": [{"role": "user", "content": "b"}],
        "prompt": "c",
        "completion": "d",
        "input_ids": [1],
    }
    for expected in ("input_ids", "prompt_completion", "messages", "text"):
        columns = make_corpus([row], tiny_tokenizer).columns
        assert columns.format == expected
        row = {name: value for name, value in row.items() if name not in columns.content}
    assert make_corpus([{"body": "a", "input_ids": [1]}], tiny_tokenizer, text_column="body").columns.format == "text"
    chat = {"conversation": [{"role": "user", "content": "b"}]}
    assert make_corpus([chat], tiny_tokenizer, text_column="conversation").columns.format == "messages"
