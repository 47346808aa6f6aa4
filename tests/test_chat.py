"""Targets of conversations, known by hand with a planted tokenizer: « and » enclose each."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas.errors import RequestError
from tests.planted_documents import (
    CHATML,
    DIALOGUE,
    DIALOGUE_MARKED,
    FORGETFUL,
    MARKED,
    WORDS,
    make_renderer,
    make_tokenizer,
    marked,
    render,
)


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


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
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
    with pytest.raises(RequestError, match=r"the column 'messages' holds struct.*which is no messages"):
        render(make_tokenizer(), {"messages": {"role": "user", "content": "hi"}})
