"""A demonstration as the exact tokens that are trained on.

    tokens = encode(text) ⊕ ⟨end of sequence⟩          what the policy itself would have sampled

The text follows the generation prompt of the run's chat template; the end-of-sequence token stands there exactly once,
at the end; nothing is ever truncated. A demonstration that cannot be written this way is not used, with a reason.
(Synthetic Success Injection, arXiv 2603.11321v1, section 4.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Why a group that the gate wanted to inject was not injected.
REASONS = ("missing", "empty", "overlong", "malformed", "rejected", "error")


@dataclass(frozen=True)
class Refusal:
    """Why there is no demonstration row; `reason` is one of `REASONS`."""

    reason: str


def demonstration_text(value: Any) -> str | Refusal:
    """The assistant's text of a data set's demonstration.

    Args:
        value: a string, or a sequence with one chat message of the assistant; `None` where the row has none.
    """
    if value is None:
        return Refusal("missing")
    if not isinstance(value, str):
        messages = list(value)
        if not messages:
            return Refusal("missing")
        message = messages[0]
        if len(messages) > 1 or not isinstance(message, Mapping) or message.get("role") != "assistant":
            return Refusal("malformed")
        value = message.get("content")
        if not isinstance(value, str):
            return Refusal("malformed")
    return value if value.strip() else Refusal("empty")


def demonstration_tokens(
    text: str,
    *,
    encode: Callable[[str], list[int]],
    generation_prompt: str,
    end_token: int,
    end_tokens: Collection[int],
    max_tokens: int,
) -> list[int] | Refusal:
    """The demonstration's response tokens, end of sequence included.

    Args:
        text: the assistant's text.
        encode: text → token ids, without special tokens of its own.
        generation_prompt: what the chat template writes before the policy's first token; an opening that it already
            contains (`<think>\\n`) is not repeated.
        end_token: id that ends an assistant's turn in this run.
        end_tokens: all ids at which generation stops; none may stand inside the demonstration.
        max_tokens: `response_length`, end of sequence included.
    """
    tokens = encode(_without_repeated_opening(text, generation_prompt))
    while tokens and tokens[-1] in end_tokens:
        tokens = tokens[:-1]
    if not tokens:
        return Refusal("empty")
    if any(token in end_tokens for token in tokens):
        return Refusal("malformed")
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


def _without_repeated_opening(text: str, generation_prompt: str) -> str:
    opening = next(
        (
            text[:size]
            for size in range(min(len(text), len(generation_prompt)), 0, -1)
            if generation_prompt.endswith(text[:size])
        ),
        "",
    )
    # One equal character is chance ("\n" before "\n"); a tag that both sides write is not.
    return text[len(opening) :] if opening.startswith("<") and ">" in opening else text
