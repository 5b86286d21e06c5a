"""The tokens of a demonstration are exact and complete with one end token, or it is refused with a reason."""

import pytest

from hapo_verl.algo.demonstration import (
    Call,
    Refusal,
    Response,
    Turn,
    demonstration_response,
    demonstration_tokens,
    demonstration_turns,
    turn_end_token,
)

END = 0


def tokens_of(text, *, generation_prompt="", max_tokens=100, end_tokens=(END,), **calls):
    return demonstration_tokens(
        text,
        encode=lambda text: [END if char == "$" else ord(char) for char in text],
        generation_prompt=generation_prompt,
        end_token=END,
        end_tokens=end_tokens,
        max_tokens=max_tokens,
        **calls,
    )


def test_the_text_is_followed_by_one_end_of_sequence():
    assert tokens_of("ab") == [97, 98, END]


def test_an_end_of_sequence_at_the_end_of_the_text_is_not_doubled():
    assert tokens_of("ab$$") == [97, 98, END]


def test_an_end_of_sequence_inside_the_text_is_refused_and_nothing_is_cut():
    assert tokens_of("a$b") == Refusal("malformed")


def test_the_limit_includes_the_end_of_sequence():
    assert tokens_of("abc", max_tokens=4) == [97, 98, 99, END]
    assert tokens_of("abc", max_tokens=3) == Refusal("overlong")


def test_a_text_of_only_an_end_of_sequence_is_empty():
    assert tokens_of("$") == Refusal("empty")


def test_a_thinking_tag_that_the_chat_template_opens_is_not_opened_twice():
    text = "<think>\nx</think>y"
    assert tokens_of(text, generation_prompt="assistant\n<think>\n") == [*map(ord, "x</think>y"), END]
    assert tokens_of(text, generation_prompt="assistant\n") == [*map(ord, text), END]


def test_a_thought_that_does_not_fit_the_chat_template_is_a_reason_of_its_own():
    assert tokens_of("x", generation_prompt="assistant\n<think>\n") == Refusal("thought")
    assert tokens_of("", calls="(c)$", generation_prompt="assistant\n<think>\n") == Refusal("thought")


def test_control_tokens_are_malformed_in_the_text_but_not_in_template_output():
    controls = {"control_tokens": [ord("#"), END]}
    assert tokens_of("a#b", **controls) == tokens_of("a#", **controls) == Refusal("malformed")
    assert tokens_of("a#", calls="(c)", **controls) == Refusal("malformed")
    assert tokens_of("a", calls="#c", **controls) == [*map(ord, "a#c"), END]
    assert tokens_of("a$", **controls) == [ord("a"), END]
    assert tokens_of("a#", **controls, stop_tokens=[ord("#")]) == [*map(ord, "a#")]


def test_a_chance_overlap_with_the_generation_prompt_is_kept():
    assert tokens_of("\nx", generation_prompt="assistant\n") == [*map(ord, "\nx"), END]


def test_calls_follow_the_text_up_to_where_generation_stops():
    assert tokens_of("ab", calls="(c)$\n") == [*map(ord, "ab(c)"), END]
    assert tokens_of("ab", calls="(c)") == [*map(ord, "ab(c)"), END]
    assert tokens_of("", calls="(c)") == [*map(ord, "(c)"), END]
    assert tokens_of("<think></think>x", calls="(c)", generation_prompt="<think>") == [*map(ord, "</think>x(c)"), END]
    assert tokens_of("a$b", calls="(c)") == tokens_of("a$", calls="(c)") == Refusal("malformed")


def test_nothing_is_written_after_a_stop_token_that_is_not_an_end_of_turn():
    stop = {"stop_tokens": [ord(")")]}
    assert tokens_of("a(c)", **stop) == [*map(ord, "a(c)")]
    assert tokens_of("a", calls="(c)(d)$", **stop) == [*map(ord, "a(c)")]
    assert tokens_of("a(c)d", **stop) == Refusal("malformed")
    assert tokens_of("a", **stop) == [ord("a"), END]


def say(text, *calls, **more):
    return {"role": "assistant", "content": text, "tool_calls": list(calls) or None, **more}


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def tool(text, **more):
    return {"role": "tool", "content": text, "tool_calls": None, **more}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("solution", [Turn("solution")]),
        ([{"role": "assistant", "content": "solution"}], [Turn("solution")]),
        ([say("solution", name=None)], [Turn("solution")]),
        (None, Refusal("missing")),
        ([], Refusal("missing")),
        ("", Refusal("empty")),
        (" \n", Refusal("empty")),
        ([{"role": "user", "content": "solution"}], Refusal("malformed")),
        ([{"role": "assistant", "content": None}], Refusal("malformed")),
        (["solution"], Refusal("malformed")),
        # Found by tests/fuzz.
        (5, Refusal("malformed")),
        ({"role": "assistant", "content": "solution"}, Refusal("malformed")),
        ("solu\ud800tion", Refusal("malformed")),
        ([{"role": "assistant", "content": "solution", "tool_calls": 3}], Refusal("malformed")),
        ([{"role": "assistant", "content": "solution", "tool_calls": {"function": {}}}], Refusal("malformed")),
    ],
)
def test_a_demonstration_is_a_string_or_one_message_of_the_assistant(value, expected):
    assert demonstration_turns(value) == expected


FIRST, SECOND = call("f", '{"x": [1, null]}', id="7"), call("g", {"y": {"z": None, "n": 2}, "w": None})


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([say("a"), tool("b"), say("c")], [Turn("a", (), ("b",)), Turn("c")]),
        (
            [say(None, FIRST), tool("b", tool_call_id="7"), say("c")],
            [Turn("", (Call("f", {"x": [1, None]}, "7"),), ("b",)), Turn("c")],
        ),
        (
            [say("a", FIRST, SECOND), tool("b"), tool(""), say("c", SECOND), tool("d"), say("e")],
            [
                Turn("a", (Call("f", {"x": [1, None]}, "7"), Call("g", {"y": {"n": 2}})), ("b", "")),
                Turn("c", (Call("g", {"y": {"n": 2}}),), ("d",)),
                Turn("e"),
            ],
        ),
    ],
)
def test_messages_become_assistant_turns_with_the_tool_answers_to_each(messages, turns):
    assert demonstration_turns(messages) == turns


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([tool("b"), say("c")], "malformed"),
        ([say("a"), tool("b")], "malformed"),
        ([say("a"), say("c")], "malformed"),
        ([say("a"), {"role": "user", "content": "b"}, say("c")], "malformed"),
        ([say("a", FIRST)], "malformed"),
        ([say("a", FIRST), say("c")], "malformed"),
        ([say("a", FIRST, SECOND), tool("b"), say("c")], "malformed"),
        ([say("a", FIRST), tool("b"), tool("b"), say("c")], "malformed"),
        ([say("a", FIRST), tool("b"), say("c", FIRST)], "malformed"),
        ([say("a", FIRST), tool(None), say("c")], "malformed"),
        ([say(["a"], FIRST), tool("b"), say("c")], "malformed"),
        ([say("a", call("f", "{")), tool("b"), say("c")], "malformed"),
        ([say("a", call("f", "[1]")), tool("b"), say("c")], "malformed"),
        ([say("a", call("f", None)), tool("b"), say("c")], "malformed"),
        ([say("a", call("f", "[" * 100_000)), tool("b"), say("c")], "malformed"),
        ([say("a", call("f", f'{{"x": {"1" * 5000}}}')), tool("b"), say("c")], "malformed"),
        ([say("a", FIRST), tool("\ud800"), say("c")], "malformed"),
        ([say("a", call(None, {})), tool("b"), say("c")], "malformed"),
        ([say("a", {"name": "f", "arguments": {}}), tool("b"), say("c")], "malformed"),
        ([say("a", "f"), tool("b"), say("c")], "malformed"),
        ([say(" "), tool("b"), say("c")], "empty"),
        ([say("a", FIRST), tool("b"), say("")], "empty"),
        ([say("a"), "b"], "malformed"),
    ],
)
def test_messages_in_another_order_or_form_are_refused(messages, reason):
    assert demonstration_turns(messages) == Refusal(reason)


def response_of(turns, max_tokens=100):
    def answer(response, tokens, turn):
        assert response.tokens[-len(tokens) :] == tokens
        if "unreadable" in turn.answers:
            return Refusal("malformed")
        answers = [ord(char) for text in turn.answers for char in text]
        return Response(
            [*response.tokens, *answers],
            [*response.mask, *[0] * len(answers)],
            response.turns,
            response.answers + len(turn.answers),
        )

    return demonstration_response(turns, write=lambda turn: tokens_of(turn.text), answer=answer, max_tokens=max_tokens)


def test_the_policys_own_tokens_train_and_tool_answers_do_not():
    response = response_of([Turn("a", (), ("xy", "z")), Turn("bc")])
    assert response == Response([97, END, *map(ord, "xyz"), *map(ord, "bc"), END], [1, 1, 0, 0, 0, 1, 1, 1], 2, 2)
    assert response.num_turns == 4
    assert response_of([Turn("a")]) == Response([97, END], [1, 1], 1, 0)
    assert response_of([Turn("a")]).num_turns == 2


def test_answers_count_towards_the_limit_and_the_first_refusal_is_the_reason():
    turns = [Turn("a", (), ("xyz",)), Turn("bc")]
    assert len(response_of(turns, 8).tokens) == 8
    assert response_of(turns, 7) == Refusal("overlong")
    assert response_of([Turn("a", (), ("unreadable",)), Turn("b$c")]) == Refusal("malformed")
    assert response_of([Turn("$", (), ("unreadable",)), Turn("bc")]) == Refusal("empty")


def test_a_turn_ends_with_the_templates_own_stop_token():
    assert turn_end_token([5, 7, 3], end_tokens={7, 9}, default=9) == 7


def test_a_template_that_closes_without_a_stop_token_gets_the_tokenizers():
    assert turn_end_token([5, 3], end_tokens={7, 9}, default=9) == 9
