"""Turns a demonstration into the exact tokens that are trained on.

    tokens = encode(text) ⊕ ⟨end of sequence⟩                  one turn, as the policy itself would have sampled it
    response = tokens₁ ⊕ answers₁ ⊕ tokens₂ ⊕ ... ⊕ tokensₖ     with tools; mask 1 on tokens, 0 on tools' answers

The text of a turn follows the generation prompt of the run's chat template and continues a thought that the template
has opened (`thought.py`). A turn has exactly one end-of-sequence token, at its end, and no other control token that the
policy would not have written. Nothing is truncated, except a tool's answer where the run truncates it too. A
demonstration that cannot be written this way is refused with a reason and not used.
(Synthetic Success Injection, arXiv 2603.11321v1, section 4; demonstrations of several turns are ours.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from hapo_verl.algo.thought import continued

# The reasons why a group got no demonstration although the gate fired.
REASONS = ("missing", "empty", "overlong", "malformed", "thought", "rejected", "error")


@dataclass(frozen=True)
class Refusal:
    """The result when a demonstration cannot be used; `reason` is one of `REASONS`."""

    reason: str


@dataclass(frozen=True)
class Call:
    """A tool call in OpenAI's format; the id is kept for chat templates that write it."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant: what it writes before tools answer or before it is done.

    Attributes:
        text: the assistant's text; it may contain tool calls written as plain text.
        calls: tool calls that the chat template writes after the text.
        answers: the tools' answers, one per call in the order of the calls; empty in the last turn.
    """

    text: str
    calls: tuple[Call, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Response:
    """A response row: the tokens after the prompt.

    Attributes:
        tokens: token ids of the response.
        mask: for each token, 1 if the policy writes it and 0 if a tool or the chat template does.
        turns: number of turns of the policy.
        answers: number of tools' answers.
    """

    tokens: list[int]
    mask: list[int]
    turns: int = 0
    answers: int = 0

    @property
    def num_turns(self) -> int:
        """The number of turns as verl counts them: the question, the policy's turns, and one for the tools' answers
        between two of those."""
        return 2 * self.turns

    def written(self, tokens: Sequence[int]) -> Response:
        """The response with one more turn of the policy, `tokens`, at its end."""
        return Response([*self.tokens, *tokens], [*self.mask, *[1] * len(tokens)], self.turns + 1, self.answers)


def demonstration_turns(value: Any) -> list[Turn] | Refusal:
    """Parse a data set's demonstration into turns, or give the reason why it is refused.

    Args:
        value: the assistant's text, or a sequence of chat messages that starts and ends with an assistant's message,
            with messages of tools between two of those; `None` for a row without a demonstration. An assistant's
            message may have `tool_calls`, each with `function.name` and `function.arguments`: a JSON object as text,
            or a mapping. Null values of a mapping are dropped, since parquet writes one for every key of the column.
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
    """The items of a list, tuple or array (parquet files give arrays); None for any other value."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else None


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether the value is a string that can be tokenized: JSON may contain half a surrogate pair, which cannot."""
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
    """Build the response of a demonstration, or give the first reason why that fails.

    Args:
        turns: the assistant's turns, in order.
        write: a turn → its tokens.
        answer: (response so far, tokens of its last turn, that turn) → the response with the tools' answers and the
            opening of the next turn added; unchanged after the last turn.
        max_tokens: `response_length`, tools' answers included.
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
    """The tokens of one turn, end of sequence included, or the reason why it is refused.

    Args:
        text: the assistant's text.
        encode: text → token ids, without special tokens added.
        generation_prompt: what the chat template writes before the policy's first token; see `thought.continued`.
        end_token: id that ends an assistant's turn in this run.
        end_tokens: all ids at which generation stops; none may occur inside the demonstration.
        max_tokens: `response_length`, end of sequence included.
        calls: what the chat template writes after the text for the turn's tool calls.
        stop_tokens: further ids at which generation stops, such as the closing tag of a call. Everything that the
            template writes after one is dropped.
        control_tokens: ids that must not occur in a text, such as the header of another turn.
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
        # The template may have closed the turn already: keep the tokens up to the first stop.
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
        turn_tokens: the tokens that the template writes for an assistant's message, starting at its text.
        end_tokens: the ids at which generation stops.
        default: the tokenizer's end-of-sequence id, returned if the template closes a turn with none of `end_tokens`.
    """
    return next((token for token in turn_tokens if token in end_tokens), default)
