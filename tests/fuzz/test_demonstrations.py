"""Any text in any chat template gives exactly the tokens that the policy would have sampled, or a reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hapo_verl.algo.demonstration import REASONS, Refusal
from hapo_verl.data.parquet import read_parquet, write_parquet
from hapo_verl.rollout.tokens import ChatFormat
from tests.fuzz.campaign import campaign, texts
from tests.rollout.chat_templates import CHATS

MARKS = sorted(
    {
        *(mark for chat in CHATS.values() for mark in (chat.end, chat.header, *chat.special, *chat.plain, *chat.stops)),
        *("<think>", "</think>", "<think>\n", "\n</think>\n\n", "<think>\n\n</think>\n\n", "[THINK]", "<|", "|>", "</"),
        *("\n", " ", "\n\n", "4", "user", "assistant"),
    }
)
demonstrations = st.lists(st.one_of(st.sampled_from(MARKS), texts), max_size=8).map("".join)


@pytest.fixture(scope="module")
def formats():
    made = {}
    for name, chat in CHATS.items():
        tokenizer = chat.tokenizer()
        chat_format = ChatFormat.of(
            tokenizer, generation_config=chat.generation_config(tokenizer), template_kwargs=chat.kwargs
        )
        made[name] = (chat, tokenizer, chat_format)
    return made


@campaign
@given(name=st.sampled_from(sorted(CHATS)), text=demonstrations, limit=st.integers(0, 120))
def test_a_demonstration_is_what_the_policy_would_have_sampled_or_has_a_reason(formats, name, text, limit):
    chat, tokenizer, chat_format = formats[name]
    response = chat_format.demonstration(text, {}, max_tokens=limit)
    if isinstance(response, Refusal):
        assert response.reason in REASONS
        # More room changes the result only if the demonstration was overlong.
        roomy = chat_format.demonstration(text, {}, max_tokens=10_000)
        assert isinstance(roomy, Refusal) == (response.reason != "overlong")
        return
    tokens = response.tokens
    assert len(response.mask) == len(tokens) <= limit
    assert set(response.mask) == {1}
    # There is one end of the turn, at the end, and no other control token.
    assert tokens[-1] in chat_format.end_tokens
    assert not set(tokens[:-1]) & (chat_format.end_tokens | chat_format.control_tokens)
    # Only text that the template has already written and ends of turns are cut.
    written = tokenizer.decode(tokens[:-1])
    trimmed = text
    while (shorter := trimmed.removesuffix(chat.end)) != trimmed or any(
        (shorter := trimmed.removesuffix(stop)) != trimmed for stop in chat.stops
    ):
        trimmed = shorter
    assert trimmed.endswith(written)
    assert chat_format.generation_prompt.rstrip().endswith(trimmed.removesuffix(written).strip() or "")
    # Every thought of the turn is closed, and a thought that the template has opened is not opened again.
    turn = chat_format.generation_prompt + written
    assert turn.count("<think>") == turn.count("</think>")
    # The written text gives the same demonstration again.
    assert chat_format.demonstration(written + chat.end, {}, max_tokens=limit) == response


@campaign
@given(name=st.sampled_from(sorted(CHATS)), text=demonstrations)
def test_writing_and_reading_a_parquet_file_changes_nothing(formats, tmp_path, name, text):
    _, _, chat_format = formats[name]
    response = chat_format.demonstration(text, {}, max_tokens=200)
    if isinstance(response, Refusal):
        return
    messages = [{"role": "assistant", "content": text}]
    write_parquet([{"text": text, "messages": messages}], tmp_path / "rows.parquet")
    (row,) = read_parquet(tmp_path / "rows.parquet")
    assert chat_format.demonstration(row["text"], {}, max_tokens=200) == response
    assert chat_format.demonstration(row["messages"], {}, max_tokens=200) == response
