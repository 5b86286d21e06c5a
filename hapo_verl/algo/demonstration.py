"""A demonstration as the exact tokens that are trained on.

    tokens = encode(text) ⊕ ⟨end of sequence⟩                  what the policy itself would have sampled
    response = tokens₁ ⊕ answers₁ ⊕ tokens₂ ⊕ ... ⊕ tokensₖ     where tools answer; mask 1 on tokens, 0 on answers

A turn's text follows the generation prompt of the run's chat template, whose thought it goes on with (`thought.py`);
the end-of-sequence token stands there exactly once, at its end, and no other control token that the run would not have
written; nothing is ever truncated but a tool's answer, where the run truncates it too. A demonstration that cannot be
written this way is not used, with a reason.
(Synthetic Success Injection, arXiv 2603.11321v1, section 4; several turns are ours.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from hapo_verl.algo.thought import continued

# Why a group that the gate wanted to inject was not injected.
REASONS = ("missing", "empty", "overlong", "malformed", "thought", "rejected", "error")


@dataclass(frozen=True)
class Refusal:
    """Why there is no demonstration row; `reason` is one of `REASONS`."""

    reason: str


@dataclass(frozen=True)
class Call:
    """A call of a tool in OpenAI's form; the id is kept for templates that write it."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Turn:
    """What the assistant writes until it waits for answers or is done.

    Attributes:
        text: its own words; a call may stand there as text.
        calls: to be written as the chat template writes them, behind the text.
        answers: the tools' answers, one a call in the order of the calls; none in the last turn.
    """

    text: str
    calls: tuple[Call, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Response:
    """What is trained on.

    Attributes:
        tokens: of the response.
        mask: 1 where the policy would have written the token, 0 where tools or the chat template would.
        turns: of the policy.
        answers: of the tools.
    """

    tokens: list[int]
    mask: list[int]
    turns: int = 0
    answers: int = 0

    @property
    def num_turns(self) -> int:
        """As verl counts: the question, the policy's turns, and one for all answers between two of them."""
        return 2 * self.turns

    def written(self, tokens: Sequence[int]) -> Response:
        """With a turn of the policy behind it."""
        return Response([*self.tokens, *tokens], [*self.mask, *[1] * len(tokens)], self.turns + 1, self.answers)


def demonstration_turns(value: Any) -> list[Turn] | Refusal:
    """The turns of a data set's demonstration.

    Args:
        value: the assistant's text, or a sequence of chat messages: of the assistant, then, as often as it likes, of
            tools and of the assistant again. `None` where the row has none. An assistant's message may carry
            `tool_calls`, each with `function.name` and `function.arguments`: a JSON object as text, or a mapping whose
            null values are left out, since parquet writes one for every key of the column.
    """
    if value is None:
        return Refusal("missing")
    messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else _items(value)
    if messages is None:
        return Refusal("malformed")
    if not messages:
        return Refusal("missing")
    turns: list[Turn] = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role == "assistant" and (not turns or turns[-1].answers):
            turn = _turn(content, message.get("tool_calls"))
            if isinstance(turn, Refusal):
                return turn
            turns.append(turn)
        elif role == "tool" and turns and _is_text(content):
            turns[-1] = replace(turns[-1], answers=(*turns[-1].answers, content))
        else:
            return Refusal("malformed")
    if turns[-1].answers or any(turn.calls and len(turn.calls) != len(turn.answers) for turn in turns):
        return Refusal("malformed")
    return turns


def _items(value: Any) -> list[Any] | None:
    """The items of a list, also of one that a file of arrays holds; None where it is none."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else None


def _is_text(value: Any) -> TypeGuard[str]:
    """A string of whole characters: half of a surrogate pair, as JSON may spell one, has no tokens."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _turn(content: Any, tool_calls: Any) -> Turn | Refusal:
    items = [] if tool_calls is None else _items(tool_calls)
    calls = [_call(item) for item in items or ()]
    text = "" if content is None and calls else content
    if items is None or not _is_text(text) or None in calls:
        return Refusal("malformed")
    if not calls and not text.strip():
        return Refusal("empty")
    return Turn(text, tuple(call for call in calls if call is not None))


def _call(item: Any) -> Call | None:
    function = item.get("function") if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping):
        return None
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    else:
        arguments = _without_nulls(arguments)
    if not _is_text(name) or not isinstance(arguments, Mapping):
        return None
    return Call(name, arguments, item.get("id"))


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}


def demonstration_response(
    turns: Sequence[Turn],
    *,
    write: Callable[[Turn], list[int] | Refusal],
    answer: Callable[[Response, Sequence[int], Turn], Response | Refusal],
    max_tokens: int,
) -> Response | Refusal:
    """The demonstration's response, or the first reason why there is none.

    Args:
        turns: of the assistant, in order.
        write: a turn → its tokens.
        answer: (response so far, tokens of its last turn, that turn) → the response with the tools' answers behind it
            and what opens the next turn; unchanged behind the last one.
        max_tokens: `response_length`, answers included.
    """
    response = Response([], [])
    for turn in turns:
        tokens = write(turn)
        if isinstance(tokens, Refusal):
            return tokens
        answered = answer(response.written(tokens), tokens, turn)
        if isinstance(answered, Refusal):
            return answered
        response = answered
    return response if len(response.tokens) <= max_tokens else Refusal("overlong")


def demonstration_tokens(
    text: str,
    *,
    encode: Callable[[str], list[int]],
    generation_prompt: str,
    end_token: int,
    end_tokens: Collection[int],
    max_tokens: int,
    calls: str = "",
    stop_tokens: Collection[int] = (),
    control_tokens: Collection[int] = (),
) -> list[int] | Refusal:
    """The tokens of a turn, end of sequence included.

    Args:
        text: the assistant's text.
        encode: text → token ids, without special tokens of its own.
        generation_prompt: what the chat template writes before the policy's first token; see `thought.continued`.
        end_token: id that ends an assistant's turn in this run.
        end_tokens: all ids at which generation stops; none may stand inside the demonstration.
        max_tokens: `response_length`, end of sequence included.
        calls: what the chat template writes behind the text for its calls.
        stop_tokens: further ids at which generation stops, as the closing tag of a call; behind one nothing is written.
        control_tokens: ids that the policy has no reason to write in a text, as the header of another turn.
    """
    continuation = continued(text, generation_prompt)
    if continuation is None:
        return Refusal("thought")
    stops = {*end_tokens, *stop_tokens}
    tokens = encode(continuation)
    if any(token in control_tokens and token not in stops for token in tokens):
        return Refusal("malformed")
    if calls:
        if any(token in stops for token in tokens):
            return Refusal("malformed")
        tokens = encode(continuation + calls)
        # The template may have closed the turn already.
        tokens = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))]
    else:
        while tokens and tokens[-1] in end_tokens:
            tokens = tokens[:-1]
    if not tokens:
        return Refusal("empty")
    if any(token in stops for token in tokens[:-1]):
        return Refusal("malformed")
    if tokens[-1] not in stops:
        tokens = [*tokens, end_token]
    return tokens if len(tokens) <= max_tokens else Refusal("overlong")


def turn_end_token(turn_tokens: Sequence[int], end_tokens: Collection[int], default: int) -> int:
    """The id with which the chat template closes an assistant's turn.

    Args:
        turn_tokens: the tokens that the template writes for an assistant's message, from its text on.
        end_tokens: the ids at which generation stops.
        default: the tokenizer's end-of-sequence id, for templates that close a turn with none of them.
    """
    return next((token for token in turn_tokens if token in end_tokens), default)
