"""The plan of a corpus as shards, and the description of its segment."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cache_builder.corpus import Corpus, CorpusSettings, describe_segment, plan_shards
from storage_schemas.errors import RequestError
from tests.conftest import TINY_VOCAB_SIZE
from tests.planted_documents import everything, ids_of, make_corpus, same


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


counts = st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any)


@settings(max_examples=60, deadline=None)
@given(counts=counts, shard_tokens=st.integers(1, 40), overflow=st.sampled_from(["split", "truncate", "drop"]))
def test_a_plan_covers_every_document_once(
    tiny_tokenizer: PreTrainedTokenizerFast, counts: list[int], shard_tokens: int, overflow: str
) -> None:
    corpus = make_corpus(ids_of(*counts), tiny_tokenizer, overflow=overflow, empty_documents="skip")
    sequences = everything(corpus)
    if not sequences:
        with pytest.raises(RequestError, match="leaves a sequence"):
            plan_shards(corpus, shard_tokens)
        return
    progress: list[int] = []
    plan = plan_shards(corpus, shard_tokens, progress.append)
    assert sum(progress) == len(counts)
    assert [shard.start for shard in plan.shards] == [0, *(shard.stop for shard in plan.shards[:-1])]
    assert plan.shards[-1].stop == len(counts)
    assert same([piece for shard in plan.shards for piece in corpus.sequences(shard)], sequences)
    for shard in plan.shards:
        pieces = corpus.sequences(shard)
        assert shard.sequences == len(pieces) > 0
        assert shard.tokens == sum(map(len, pieces))
        assert shard.targets == sum(int(piece.completion_mask.sum()) for piece in pieces)
    for shard in plan.shards[:-1]:  # each was closed by the document that filled it
        last = sum(len(piece) for piece in corpus.render(shard.stop - 1))
        assert shard.tokens - last < shard_tokens <= shard.tokens
    assert plan.counts.documents == len(counts)
    assert plan.counts.sequences == sum(shard.sequences for shard in plan.shards)
    assert plan.counts.tokens == sum(shard.tokens for shard in plan.shards)
    assert plan.counts.tokens + plan.counts.tokens_lost == sum(counts)


@settings(max_examples=30, deadline=None)
@given(counts=counts, left=st.integers(1, 40), right=st.integers(1, 40))
def test_shard_tokens_moves_boundaries_and_nothing_else(
    tiny_tokenizer: PreTrainedTokenizerFast, counts: list[int], left: int, right: int
) -> None:
    rows = ids_of(*counts)
    first = make_corpus(rows, tiny_tokenizer, empty_documents="skip")
    second = make_corpus(rows, tiny_tokenizer, empty_documents="skip")
    plans = plan_shards(first, left), plan_shards(second, right)
    assert plans[0].digest == plans[1].digest
    assert plans[0].counts == plans[1].counts
    joined = [[piece for shard in plan.shards for piece in first.sequences(shard)] for plan in plans]
    assert same(*joined)
    assert (left != right) or plans[0] == plans[1]


def test_every_part_of_a_sequence_is_in_the_digest(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "name": "a"}
    changes: list[dict[str, Any]] = [{}, {"input_ids": [5, 6, 8]}, {"completion_mask": [0, 1, 0]}, {"name": "b"}]
    digests = {
        plan_shards(make_corpus([row | change], tiny_tokenizer, id_column="name"), 9).digest for change in changes
    }
    digests |= {plan_shards(make_corpus([row], tiny_tokenizer, segment=1, id_column="name"), 9).digest}
    digests |= {plan_shards(make_corpus([row], tiny_tokenizer, max_length=2, id_column="name"), 9).digest}
    assert len(digests) == len(changes) + 2


def test_a_corpus_that_changed_since_its_plan_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": text} for text in ("one", "two", "three", "four")]
    plan = plan_shards(make_corpus(rows, tiny_tokenizer), 4)
    assert len(plan.shards) > 1
    rows[3] = {"text": "five"}
    changed = make_corpus(rows, tiny_tokenizer)
    *kept, last = plan.shards
    for shard in kept:
        assert changed.sequences(shard)
    message = f"documents {last.start} to 3 of 'planted' are not what they were when the plan was made"
    with pytest.raises(RequestError, match=re.escape(message)):
        changed.sequences(last)
    beyond = last.model_copy(update={"stop": 9})
    with pytest.raises(RequestError, match="are not what they were"):
        changed.sequences(beyond)


def test_documents_without_a_sequence_make_no_shard(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plan = plan_shards(make_corpus(ids_of(0, 4, 0, 4, 0, 0), tiny_tokenizer, empty_documents="skip"), 4)
    assert [(shard.start, shard.stop, shard.sequences) for shard in plan.shards] == [(0, 2, 1), (2, 6, 1)]
    with pytest.raises(RequestError, match="expected shard_tokens of at least 1"):
        plan_shards(make_corpus(ids_of(4), tiny_tokenizer), 0)


def test_a_file_opens_as_the_same_plan_every_time(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"the teacher reads {number}"}) + "\n" for number in range(9)))
    chosen = CorpusSettings(dataset=str(path), max_length=4)
    first, second = (Corpus.open(chosen, tiny_tokenizer, TINY_VOCAB_SIZE) for _ in range(2))
    assert plan_shards(first, 20) == plan_shards(second, 20)
    assert first.source_digest == second.source_digest
    assert describe_segment(first, 20) == describe_segment(second, 20)
    few = Corpus.open(chosen.model_copy(update={"max_documents": 3}), tiny_tokenizer, TINY_VOCAB_SIZE)
    assert len(few) == 3
    assert plan_shards(few, 20).shards[0].start == 0


def test_messages_of_various_keys_in_a_file_keep_their_own(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """datasets keeps such columns as JSON; a template must see of each message what the file has."""
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% for message in messages %}{{ message.role }}:{{ message.content or '' }}"
        "{% for call in message.tool_calls or [] %}{{ call.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    calls = [{"arguments": {"city": "Paris"}}], [{"arguments": {"n": 2}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a", "name": "x"},
                {"role": "assistant", "content": None, "tool_calls": call},
            ]
        }
        for call in calls
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = CorpusSettings(dataset=str(path), max_length=200, chat_template=str(template))
    corpus = Corpus.open(chosen, tiny_tokenizer, TINY_VOCAB_SIZE)
    for row, arguments in enumerate(('{"city": "Paris"}', '{"n": 2}')):
        (sequence,) = corpus.render(row)
        assert tiny_tokenizer.decode(sequence.token_ids) == f"user:a<|im_end|>assistant:{arguments}<|im_end|>"
        assert tiny_tokenizer.decode(sequence.token_ids[sequence.completion_mask]) == f"{arguments}<|im_end|>"


def test_a_hub_source_whose_commit_is_unknown_is_warned_of(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"text": "a"}]))
    with pytest.warns(UserWarning, match="could not be asked for the commit of 'org/name'"):
        corpus = Corpus.open(CorpusSettings(dataset="org/name", max_length=4), tiny_tokenizer, TINY_VOCAB_SIZE)
    assert describe_segment(corpus, 9)["source_digest"] is None
    assert describe_segment(corpus, 9)["dataset"] == "org/name"


def test_a_segment_is_described_by_what_defines_it(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}], "url": text} for text in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def describe(shard_tokens: int = 64, **fields: Any) -> dict[str, Any]:
        chosen = CorpusSettings(dataset=str(path), **{"max_length": 8, **fields})
        return describe_segment(Corpus.open(chosen, tiny_tokenizer, TINY_VOCAB_SIZE), shard_tokens)

    base = describe()
    assert base == json.loads(json.dumps(base)), "expected plain values"
    assert base["dataset"] == "rows.jsonl", "expected a name without this machine's folders"
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages }}")
    changes: dict[str, dict[str, Any]] = {
        "max_length": {"max_length": 9},
        "overflow": {"overflow": "drop"},
        "empty_documents": {"empty_documents": "skip"},
        "id_column": {"id_column": "url"},
        "chat_template_digest": {"chat_template": str(template)},
        "chat_template_kwargs": {"chat_template_kwargs": {"thinking": True}},
        "chat_template_date": {"chat_template_date": "2025-01-31"},
        "shard_tokens": {"shard_tokens": 65},
    }
    for name, change in changes.items():
        described = describe(**change)
        assert {key for key in base if described[key] != base[key]} == {name}
    text = describe(text_column="url")
    assert (text["format"], text["columns"], text["append_eos"]) == ("text", "url", True)
    assert describe(text_column="url", append_eos=False)["append_eos"] is False
    assert base["append_eos"] is False, "expected a chat template to end its turns itself"
    assert describe(max_documents=1)["documents"] == 1
    path.write_text(path.read_text().replace('"a"', '"c"'))
    assert describe()["source_digest"] != base["source_digest"]
