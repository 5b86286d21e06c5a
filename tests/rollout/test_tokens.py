"""Demonstrations in the chat templates of public models: thoughts, control tokens and the end appear exactly once."""

import pytest

from hapo_verl.algo.demonstration import Refusal
from hapo_verl.rollout.tokens import ChatFormat
from tests.rollout.chat_templates import CHATS

THOUGHT, REFUSED, CONTROL = "a thought\n</think>\n\n", Refusal("thought"), Refusal("malformed")


@pytest.fixture(scope="module", params=CHATS)
def chat(request):
    chat = CHATS[request.param]
    tokenizer = chat.tokenizer()
    chat_format = ChatFormat.of(
        tokenizer, generation_config=chat.generation_config(tokenizer), template_kwargs=chat.kwargs
    )

    def written(text):
        response = chat_format.demonstration(text, {}, max_tokens=300)
        return response if isinstance(response, Refusal) else tokenizer.decode(response.tokens)

    return request.param, chat, chat_format, written


def test_the_generation_prompt_and_the_end_equal_the_templates(chat):
    _, expected, chat_format, _ = chat
    assert chat_format.generation_prompt.endswith(expected.ends_with)
    assert "?" not in chat_format.generation_prompt
    assert [chat_format.end_token] == chat_format.encode(expected.end)
    assert len(chat_format.encode(expected.end)) == 1


@pytest.mark.parametrize(
    ("text", "plain", "inside", "over"),
    [
        ("4", "4", REFUSED, "4"),
        (f"<think>\n{THOUGHT}4", f"<think>\n{THOUGHT}4", f"{THOUGHT}4", REFUSED),
        (f"<think>{THOUGHT}4", f"<think>{THOUGHT}4", f"{THOUGHT}4", REFUSED),
        (f"\n<think>\n{THOUGHT}4", f"\n<think>\n{THOUGHT}4", f"{THOUGHT}4", REFUSED),
        (f"{THOUGHT}4", REFUSED, f"{THOUGHT}4", REFUSED),
        ("<think>\n\n</think>\n\n4", "<think>\n\n</think>\n\n4", "\n</think>\n\n4", "4"),
        ("<think>\n4", REFUSED, REFUSED, REFUSED),
        (f"<think>\n<think>\n{THOUGHT}4", REFUSED, REFUSED, REFUSED),
    ],
)
def test_a_thought_is_opened_once_and_closed_before_the_answer_in_every_template(chat, text, plain, inside, over):
    name, expected, chat_format, written = chat
    right = {"DeepSeek-R1-Distill": inside, "Qwen3, not thinking": over}.get(name, plain)
    found = written(text)
    assert found == (right if isinstance(right, Refusal) else right + expected.end)
    if not isinstance(found, Refusal):
        turn = chat_format.generation_prompt + found
        assert turn.count("<think>") == turn.count("</think>") <= 1


def answer(name, text):
    """The text as a valid answer for this template: after a thought if the template opens one."""
    return f"</think>{text}" if name == "DeepSeek-R1-Distill" else text


def test_an_end_token_of_the_text_is_not_doubled_and_one_inside_is_malformed(chat):
    name, expected, _, written = chat
    ended = written(answer(name, "4"))
    for end in (expected.end, *expected.stops):
        assert written(answer(name, f"4{end}")) == written(answer(name, f"4{end}{end}")) == ended
        assert written(answer(name, f"4{end}5")) == CONTROL


def test_control_tokens_in_the_text_are_malformed(chat):
    name, expected, _, written = chat
    for token in (expected.header, *expected.special):
        assert written(answer(name, f"4{token}5")) == CONTROL, token
    assert written(answer(name, f"4 {expected.header}")) == CONTROL


def test_added_text_tokens_and_role_names_are_not_control_tokens(chat):
    name, expected, _, written = chat
    for text in ("the user and the assistant", "<tool_call>4</tool_call>", "a < b | c > d"):
        assert written(answer(name, text)) == answer(name, text) + expected.end


def test_tokens_that_a_template_writes_before_a_text_are_allowed_there():
    """For example gpt-oss, whose channels are tokens: the policy writes them itself before every answer."""
    tokenizer = CHATS["Phi-3"].tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    tokenizer.chat_template = CHATS["Phi-3"].template.replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' %}<|channel|>final<|message|>{% endif %}{{ message.content }}",
    )
    channels = ChatFormat.of(tokenizer, generation_config=None, template_kwargs={})
    text = "<|channel|>final<|message|>4"
    assert tokenizer.decode(channels.demonstration(text, {}, max_tokens=99).tokens) == text + "<|end|>"
    assert channels.demonstration("<|channel|>final<|message|>4<|user|>", {}, max_tokens=99) == CONTROL
