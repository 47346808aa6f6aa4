"""Tokens and targets of documents, known by hand with a planted tokenizer: « and » enclose each target."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from storage_schemas.errors import RequestError
from tests.planted_documents import CHATML, DIALOGUE, DIALOGUE_MARKED, make_tokenizer, mark, marked, render


def test_text_has_every_token_but_the_first_as_target() -> None:
    rows = [{"text": "hi yo"}, {"text": "the"}, {"text": "hi</s>"}, {"text": None}, {"text": ""}]
    expected = ["hi« »«yo»«</s>»", "the«</s>»", "hi«</s>»", "", ""]
    assert marked(make_tokenizer(), *rows) == expected
    assert marked(make_tokenizer(), rows[0], append_eos=False) == ["hi« »«yo»"]


def test_special_tokens_that_the_tokenizer_adds_are_not_doubled() -> None:
    tokenizer = make_tokenizer(prefix="<s>", suffix="</s>")
    rows = [{"text": "hi"}, {"text": "<s>hi</s>"}, {"text": ""}]
    assert marked(tokenizer, *rows) == ["<s>«hi»«</s>»", "<s>«hi»«</s>»", ""]
    assert marked(make_tokenizer(prefix="<s>"), *rows) == ["<s>«hi»«</s>»", "<s>«hi»«</s>»", ""]
    template_with_beginning = make_tokenizer("{{ bos_token }}" + CHATML, prefix="<s>", suffix="</s>")
    assert marked(template_with_beginning, {"messages": DIALOGUE}) == ["<s>" + DIALOGUE_MARKED]


def test_prompt_and_completion_meet_at_the_exact_token() -> None:
    tokenizer = make_tokenizer(prefix="<s>")
    rows = [
        {"prompt": "the sky is", "completion": " blue"},
        {"prompt": "the sky is ", "completion": "blue"},
        {"prompt": "", "completion": "hi yo"},
        {"prompt": "hi", "completion": ""},
        {"prompt": "hi", "completion": None},
        {"prompt": "", "completion": ""},
    ]
    expected = [
        "<s>the sky is« »«blue»«</s>»",
        "<s>the sky is «blue»«</s>»",
        "<s>«hi»« »«yo»«</s>»",
        "<s>hi«</s>»",
        "<s>hi«</s>»",
        "",
    ]
    assert marked(tokenizer, *rows) == expected
    assert marked(tokenizer, rows[0], append_eos=False) == ["<s>the sky is« »«blue»"]


def test_what_the_tokenizer_adds_belongs_to_the_prompt_in_front_and_to_the_completion_behind() -> None:
    tokenizer = make_tokenizer(prefix="<s> <unk>", suffix="</s>")
    assert marked(tokenizer, {"prompt": "", "completion": "hi"}) == ["<s><unk>«hi»«</s>»"]
    assert marked(tokenizer, {"prompt": "hi", "completion": " yo"}) == ["<s><unk>hi« »«yo»«</s>»"]


def test_a_token_across_the_boundary_is_no_target_and_counted() -> None:
    tokenizer = make_tokenizer()
    document = render(tokenizer, {"prompt": "the s", "completion": "ky is"})[0]
    assert mark(tokenizer, document) == "the sky« »«is»«</s>»"
    assert document.straddling == 1
    assert render(tokenizer, {"prompt": "the ", "completion": "sky is"})[0].straddling == 0


def test_text_needs_an_end_of_sequence_token_to_append() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RequestError, match="append_eos = false"):
        render(tokenizer, {"text": "hi"})
    assert marked(tokenizer, {"text": "hi yo"}, append_eos=False) == ["hi« »«yo»"]


def test_a_slow_tokenizer_serves_text_and_nothing_that_needs_offsets() -> None:
    tokenizer = ByT5Tokenizer()  # bytes + 3, and its own end of sequence
    assert [document.token_ids.tolist() for document in render(tokenizer, {"text": "hi"}, {"text": ""})] == [
        [107, 108, 1],
        [],
    ]
    with pytest.raises(RequestError, match="need a fast tokenizer"):
        render(tokenizer, {"prompt": "hi", "completion": "yo"})


def test_input_ids_are_taken_as_they_are_with_their_masks() -> None:
    row = {"input_ids": [8, 9, 10, 11]}
    masks = {"completion_mask": [1, 1, 1, 0], "assistant_masks": [0, 0, 1, 1], "labels": [-100, 9, 10, 11]}
    expected = {
        (): [False, True, True, True],
        ("completion_mask",): [False, True, True, False],
        ("assistant_masks",): [False, False, True, True],
        ("labels",): [False, True, True, True],
        ("completion_mask", "assistant_masks"): [False, False, True, False],
    }
    for names, mask in expected.items():
        document = render(make_tokenizer(), row | {name: masks[name] for name in names})[0]
        assert document.token_ids.tolist() == row["input_ids"]
        assert document.completion_mask.tolist() == mask
    assert len(render(make_tokenizer(), row, {"input_ids": None})[1].token_ids) == 0
    assert render(make_tokenizer(), row | {"labels": [-100, -100, 10, -100]})[0].completion_mask.tolist() == [
        False, False, True, False,
    ]  # fmt: skip


def test_input_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="document 0: completion_mask has 2 entries for 3 input_ids"):
        render(make_tokenizer(), {"input_ids": [1, 2, 3], "completion_mask": [0, 1]})
    with pytest.raises(RequestError, match="document 0: its input_ids are padded"):
        render(make_tokenizer(), {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]})
    for bad in (-1, 1 << 40):
        with pytest.raises(RequestError, match="document 0: input_ids reach from"):
            render(make_tokenizer(), {"input_ids": [1, bad]})


texts = st.lists(
    st.one_of(st.sampled_from([" ", "  ", " the", "the", "a", "\n"]), st.characters(codec="utf-8")), max_size=8
).map("".join)


@pytest.fixture(scope="module")
def trimming_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tiny_tokenizer.eos_token)


@settings(deadline=None)  # the first example also trains the tokenizer
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_byte_level_boundaries_are_those_of_the_bytes(
    tiny_tokenizer: PreTrainedTokenizerFast,
    trimming_tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
) -> None:
    """The reference counts bytes: a byte-level token is as many bytes as it has letters. With and without the
    post-processor that trims spaces off the offsets, which published tokenizers carry."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    for tokenizer in (tiny_tokenizer, trimming_tokenizer):
        for (prompt, completion), document in zip(pairs, render(tokenizer, *rows), strict=True):
            if not prompt + completion:
                assert len(document.token_ids) == 0
                continue
            tokens = tokenizer.convert_ids_to_tokens(document.token_ids.tolist())
            assert tokens[-1] == "<|im_end|>"
            ends = np.cumsum([len(token) for token in tokens[:-1]])
            assert ends[-1] == len((prompt + completion).encode())
            boundary = len(prompt.encode())
            starts = np.concatenate(([0], ends))
            mask = starts >= boundary
            mask[0] = False
            assert document.completion_mask.tolist() == mask.tolist()
            straddles = bool(completion) and bool(((starts[:-1] < boundary) & (ends > boundary)).any())
            assert document.straddling == straddles
