"""A demonstration's tokens: exact, complete, ended once, or refused with a reason."""

import pytest

from hapo_verl.algo.demonstration import Refusal, demonstration_text, demonstration_tokens, turn_end_token

END = 0


def tokens_of(text, *, generation_prompt="", max_tokens=100, end_tokens=(END,)):
    return demonstration_tokens(
        text,
        encode=lambda text: [END if char == "$" else ord(char) for char in text],
        generation_prompt=generation_prompt,
        end_token=END,
        end_tokens=end_tokens,
        max_tokens=max_tokens,
    )


def test_the_text_is_followed_by_one_end_of_sequence():
    assert tokens_of("ab") == [97, 98, END]


def test_an_end_of_sequence_that_the_text_brings_is_not_doubled():
    assert tokens_of("ab$$") == [97, 98, END]


def test_an_end_of_sequence_inside_the_text_is_refused_and_nothing_is_cut():
    assert tokens_of("a$b") == Refusal("malformed")


def test_the_longest_demonstration_fits_with_its_end_of_sequence_and_one_more_token_does_not():
    assert tokens_of("abc", max_tokens=4) == [97, 98, 99, END]
    assert tokens_of("abc", max_tokens=3) == Refusal("overlong")


def test_only_ends_of_sequence_are_empty():
    assert tokens_of("$") == Refusal("empty")


def test_a_thinking_tag_that_the_chat_template_opens_is_not_opened_twice():
    text = "<think>\nx"
    assert tokens_of(text, generation_prompt="assistant\n<think>\n") == [ord("x"), END]
    assert tokens_of(text, generation_prompt="assistant\n") == [*map(ord, text), END]


def test_a_chance_overlap_with_the_generation_prompt_is_kept():
    assert tokens_of("\nx", generation_prompt="assistant\n") == [*map(ord, "\nx"), END]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("solution", "solution"),
        ([{"role": "assistant", "content": "solution"}], "solution"),
        (None, Refusal("missing")),
        ([], Refusal("missing")),
        ("", Refusal("empty")),
        (" \n", Refusal("empty")),
        ([{"role": "user", "content": "solution"}], Refusal("malformed")),
        ([{"role": "assistant", "content": None}], Refusal("malformed")),
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}], Refusal("malformed")),
    ],
)
def test_a_demonstration_is_a_string_or_one_message_of_the_assistant(value, expected):
    assert demonstration_text(value) == expected


def test_a_turn_ends_with_the_templates_own_stop_token():
    assert turn_end_token([5, 7, 3], end_tokens={7, 9}, default=9) == 7


def test_a_template_that_closes_with_no_stop_token_gets_the_tokenizers():
    assert turn_end_token([5, 3], end_tokens={7, 9}, default=9) == 9
