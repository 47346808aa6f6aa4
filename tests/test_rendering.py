"""Tokens and targets of documents, known by hand with a planted tokenizer: « and » enclose each target."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cache_builder.columns import find_columns
from cache_builder.corpus_settings import CorpusSettings
from cache_builder.rendering import RenderedDocument, Renderer
from storage_schemas.errors import RequestError

WORDS = [
    "system",
    "user",
    "assistant",
    "hi",
    "yo",
    "more",
    "ok",
    "be",
    "nice",
    "the",
    "sky",
    "is",
    "blue",
    "ask",
    "tell",
]
WORDS += ["<think>", "</think>", "a", "b", "2025", "[TOOLS]"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what an assistant thought in all turns but the last, as reasoning models' templates do.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DIALOGUE: list[dict[str, Any]] = [
    {"role": "system", "content": "be nice"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "ok"},
]
DIALOGUE_MARKED = (
    "<|im_start|>system\nbe nice<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\n«yo»« »«yo»«<|im_end|>»\n<|im_start|>user\nmore<|im_end|>\n"
    "<|im_start|>assistant\n«ok»«<|im_end|>»\n"
)


def make_tokenizer(template: str | None = CHATML, *, prefix: str = "", suffix: str = "") -> PreTrainedTokenizerFast:
    """Words, single spaces and newlines are one token each, so that every character lies in a known token.

    prefix, suffix: special tokens that it adds to a text by itself.
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, " ", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |\S+"), "isolated")
    if prefix or suffix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefix.split(), "$A", *suffix.split()]),
            special_tokens=[(token, vocabulary[token]) for token in f"{prefix} {suffix}".split()],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4,  # far less than any text here: the corpus's own max_length rules
    )
    fast.chat_template = template
    return fast


def make_renderer(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], **settings: Any) -> Renderer:
    schema = pa.Table.from_pylist(rows).schema
    chosen = CorpusSettings(dataset="planted", max_length=64, **settings)
    columns = find_columns({field.name: field.type for field in schema}, chosen)
    return Renderer(tokenizer, columns, chosen)


def render(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], **settings: Any) -> list[RenderedDocument]:
    # Arrow makes the rows what a dataset's are: every struct has every key.
    rows = tuple(pa.Table.from_pylist(list(rows)).to_pylist())
    renderer = make_renderer(tokenizer, list(rows), **settings)
    return list(renderer.render(rows, [f"document {number}" for number in range(len(rows))]))


def mark(tokenizer: PreTrainedTokenizerFast, document: RenderedDocument) -> str:
    assert document.token_ids.dtype == np.int32
    assert document.completion_mask.dtype == np.bool_
    assert document.token_ids.shape == document.completion_mask.shape
    assert not document.completion_mask[:1].any()
    tokens = tokenizer.convert_ids_to_tokens(document.token_ids.tolist())
    return "".join(f"«{token}»" if hit else token for token, hit in zip(tokens, document.completion_mask, strict=True))


def marked(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], **settings: Any) -> list[str]:
    return [mark(tokenizer, document) for document in render(tokenizer, *rows, **settings)]


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


def test_tokens_added_at_both_ends_are_no_part_of_an_empty_prompt() -> None:
    tokenizer = make_tokenizer(prefix="<s> <unk>", suffix="</s>")
    assert marked(tokenizer, {"prompt": "", "completion": "hi"}) == ["<s><unk>«hi»«</s>»"]


def test_a_token_across_the_boundary_is_no_target_and_counted() -> None:
    tokenizer = make_tokenizer()
    document = render(tokenizer, {"prompt": "the s", "completion": "ky is"})[0]
    assert mark(tokenizer, document) == "the sky« »«is»«</s>»"
    assert document.straddling == 1
    assert render(tokenizer, {"prompt": "the ", "completion": "sky is"})[0].straddling == 0


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefix differencing", "generation markers"])
def test_a_dialogue_has_the_assistants_turns_as_targets(template: str) -> None:
    assert marked(make_tokenizer(template), {"messages": DIALOGUE}) == [DIALOGUE_MARKED]


def test_generation_markers_agree_with_transformers_own_mask() -> None:
    tokenizer = make_tokenizer(MARKED)
    document = render(tokenizer, {"messages": DIALOGUE})[0]
    reference = tokenizer.apply_chat_template(DIALOGUE, return_dict=True, return_assistant_tokens_mask=True)
    assert document.token_ids.tolist() == reference["input_ids"]
    assert document.completion_mask.tolist() == [bool(value) for value in reference["assistant_masks"]]


contents = st.lists(st.sampled_from([*WORDS, " ", "\n", "  "]), max_size=5).map("".join)
dialogues = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=6)


@settings(deadline=None)  # templates are compiled on first use
@given(dialogues)
def test_markers_and_differencing_give_the_same_mask(turns: list[tuple[str, str]]) -> None:
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert marked(make_tokenizer(MARKED), row) == marked(make_tokenizer(CHATML), row)


def test_white_space_of_the_content_is_a_target_and_that_of_the_template_is_not() -> None:
    row = {"messages": [{"role": "user", "content": "hi\n"}, {"role": "assistant", "content": " yo \n"}]}
    expected = "<|im_start|>user\nhi\n<|im_end|>\n<|im_start|>assistant\n« »«yo»« »«\n»«<|im_end|>»\n"
    assert marked(make_tokenizer(), row) == [expected]


def test_without_an_end_of_turn_token_the_white_space_ends_the_turn() -> None:
    template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    assert marked(make_tokenizer(template), row) == ["user hi\nassistant «yo»«\n»"]


def test_two_assistant_turns_in_a_row_and_a_first_one() -> None:
    row = {"messages": [{"role": "assistant", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    expected = "<|im_start|>assistant\n«hi»«<|im_end|>»\n<|im_start|>assistant\n«yo»«<|im_end|>»\n"
    assert marked(make_tokenizer(), row) == [expected]


def test_messages_without_an_assistant_have_no_targets() -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    assert marked(make_tokenizer(), row, {"messages": []}) == ["<|im_start|>user\nhi<|im_end|>\n", ""]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefix differencing", "generation markers"])
def test_only_the_completion_of_a_conversational_prompt_is_a_target(template: str) -> None:
    row = {"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:]}
    expected = DIALOGUE_MARKED.replace("«yo»« »«yo»«<|im_end|>»", "yo yo<|im_end|>")
    assert marked(make_tokenizer(template), row) == [expected]


def test_a_template_that_is_not_prefix_preserving_is_refused() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "<think>a</think>yo"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "<think>b</think>ok"},
        ]
    }
    with pytest.raises(RequestError, match=r"document 0: .*not prefix-preserving.*\{% generation %\}"):
        render(make_tokenizer(FORGETFUL), row)
    assert marked(make_tokenizer(FORGETFUL), {"messages": row["messages"][:2]})  # one turn has nothing to forget
    # ... nor one whose generation prompt writes what the conversation does not hold,
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    with pytest.raises(RequestError, match="not prefix-preserving"):
        render(make_tokenizer(template), {"messages": DIALOGUE})
    # ... nor, for a conversation that the assistant begins, one that cannot render nothing.
    template = "{{ messages[0]['role'] + '' }}" + CHATML
    with pytest.raises(RequestError, match="not prefix-preserving"):
        render(make_tokenizer(template), {"messages": DIALOGUE[2:]})


def test_a_refusal_by_the_template_names_the_document() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match=r"document 1: .*roles must alternate.*chat_template"):
        render(
            make_tokenizer("{% if messages[0]['content'] == 'yo' %}" + template + "{% endif %}a"),
            *({"messages": [{"role": "user", "content": content}]} for content in ("hi", "yo")),
        )


def test_a_template_that_asks_for_the_date_needs_one() -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%Y') }}" + CHATML)
    row = {"messages": DIALOGUE}
    with pytest.raises(RequestError, match="chat_template_date"):
        render(tokenizer, row)
    assert marked(tokenizer, row, chat_template_date=datetime.date(2025, 1, 31)) == ["2025" + DIALOGUE_MARKED]


def test_tools_and_template_arguments_reach_the_template() -> None:
    template = "{% for tool in tools or [] %}[TOOLS]{{ tool.name }}{% endfor %}{{ mood or '' }}" + CHATML
    plain = {"messages": DIALOGUE}
    assert marked(make_tokenizer("{{ mood }}" + CHATML), plain, chat_template_kwargs={"mood": "nice "}) == [
        "nice " + DIALOGUE_MARKED
    ]
    rows = [
        {**plain, "tools": '[{"name": " ask "}]', "chat_template_kwargs": {"mood": "nice "}},
        {**plain, "tools": None, "chat_template_kwargs": None},
    ]
    assert marked(make_tokenizer(template), *rows) == ["[TOOLS] ask nice " + DIALOGUE_MARKED, DIALOGUE_MARKED]
    listed = {**plain, "tools": [{"name": " tell "}]}
    assert marked(make_tokenizer(template), listed) == ["[TOOLS] tell " + DIALOGUE_MARKED]
    with pytest.raises(RequestError, match="document 0: tools is no JSON"):
        render(make_tokenizer(template), {**plain, "tools": "ask"})
    with pytest.raises(RequestError, match="document 0: expected a list in tools"):
        render(make_tokenizer(template), {**plain, "tools": "{}"})


def test_keys_that_only_arrow_gave_a_message_are_not_there_for_the_template() -> None:
    template = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] }}{% if 'name' in message %}a{% endif %}"
    )
    messages = [{"role": "user", "content": "hi ", "name": "x"}, {"role": "user", "content": "yo"}]
    expected = "<|im_start|>user\nhi a<|im_end|>\n<|im_start|>user\nyo<|im_end|>\n"
    assert marked(make_tokenizer(template), {"messages": messages}) == [expected]


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path: Any) -> None:
    path = tmp_path / "marked.jinja"
    path.write_text(MARKED)
    row = {"messages": DIALOGUE}
    assert marked(make_tokenizer(None), row, chat_template=str(path)) == [DIALOGUE_MARKED]
    digests = {
        make_renderer(make_tokenizer(template), [row], chat_template=given).chat.digest  # type: ignore[union-attr]
        for template, given in ((None, str(path)), (MARKED, None), (FORGETFUL, str(path)))
    }
    assert len(digests) == 1
    with pytest.raises(RequestError, match="cannot read the chat template"):
        render(make_tokenizer(), row, chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(RequestError, match="chat_template is for messages"):
        render(make_tokenizer(), {"text": "hi"}, chat_template=str(path))


def test_conversations_need_a_template_and_roles() -> None:
    with pytest.raises(RequestError, match="no chat template; set chat_template"):
        render(make_tokenizer(None), {"messages": DIALOGUE})
    with pytest.raises(RequestError, match="document 0: expected messages with a role"):
        render(make_tokenizer(), {"messages": [{"from": "human", "value": "hi"}]})
    with pytest.raises(RequestError, match="document 0: expected a list of messages"):
        render(make_tokenizer(), {"messages": {"role": "user", "content": "hi"}})


def test_text_needs_an_end_of_sequence_token_to_append() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RequestError, match="append_eos = false"):
        render(tokenizer, {"text": "hi"})
    assert marked(tokenizer, {"text": "hi yo"}, append_eos=False) == ["hi« »«yo»"]


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
