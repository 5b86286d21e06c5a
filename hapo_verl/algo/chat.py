"""The format of an assistant's turn, read from a Hugging Face tokenizer and its chat template.

    prompt ⊕ generation prompt ⊕ text ⊕ ⟨end of turn⟩

The parts are found by rendering a conversation of marker texts, so any template works and none is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hapo_verl.algo.demonstration import (
    Refusal,
    Response,
    demonstration_response,
    demonstration_tokens,
    demonstration_turns,
    turn_end_token,
)
from hapo_verl.algo.thought import THOUGHTS

if TYPE_CHECKING:
    from typing_extensions import Self

_MARK, _QUESTION = "hapo-marks-the-assistant", "hapo-marks-the-question"


@dataclass(frozen=True)
class TurnFormat:
    """The format of an assistant's turn in a run.

    Attributes:
        encode: text → token ids, without special tokens added.
        generation_prompt: what the template writes between the question and the policy's first token.
        end_token: id that closes a turn.
        end_tokens: ids at which generation stops.
        control_tokens: ids that must not occur in the text of an assistant's turn, such as the header of another turn.
    """

    encode: Callable[[str], list[int]]
    generation_prompt: str
    end_token: int
    end_tokens: frozenset[int]
    control_tokens: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Any, *, generation_config: Any, template_kwargs: dict[str, Any], **more: Any) -> Self:
        """The format of a tokenizer with a chat template.

        Args:
            tokenizer: with a chat template and an end-of-sequence token.
            generation_config: the model's generation config, or None. Generation stops at its `eos_token_id` (an id or
                a list of ids).
            template_kwargs: the keyword arguments that the run passes to its chat template.
            more: values of a subclass's own fields.
        """
        encode = _encoder(tokenizer)

        def render(messages: list[dict[str, str]], **kwargs: Any) -> str:
            return tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs, **kwargs)

        question = [{"role": "user", "content": _QUESTION}]
        prompted = render(question, add_generation_prompt=True)

        def around_text(**more: str) -> tuple[str, str]:
            written, _, closing = render([*question, {"role": "assistant", "content": _MARK, **more}]).rpartition(_MARK)
            return written[len(prompted) :] if written.startswith(prompted) else "", closing

        chat = render([*question, {"role": "assistant", "content": _MARK}, *question], add_generation_prompt=True)
        opening, closing = around_text()
        # Some templates take the thought under one of these names and write it before the text.
        opening_with_thought, _ = around_text(reasoning_content="?", thinking="?")

        configured = getattr(generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list | tuple) else [configured]
        end_tokens = frozenset(token for token in [tokenizer.eos_token_id, *configured] if token is not None)
        return cls(
            encode=encode,
            generation_prompt=prompted.rpartition(_QUESTION)[2],
            end_token=turn_end_token(encode(closing), end_tokens, tokenizer.eos_token_id),
            end_tokens=end_tokens,
            control_tokens=_control_tokens(tokenizer, encode(chat)) - {*encode(opening), *encode(opening_with_thought)},
            **more,
        )

    @classmethod
    def of_text(cls, tokenizer: Any, *, end_tokens: Collection[int]) -> Self:
        """The format for prompts that are plain text, not chats: the answer continues right after the prompt.

        Args:
            tokenizer: with an end-of-sequence token.
            end_tokens: ids at which generation stops.
        """
        return cls(
            encode=_encoder(tokenizer),
            generation_prompt="",
            end_token=tokenizer.eos_token_id,
            end_tokens=frozenset(end_tokens),
            control_tokens=_control_tokens(tokenizer, []),
        )

    def single_turn(self, value: Any, *, max_tokens: int) -> Response | Refusal:
        """Turn a data set's demonstration into a response of one turn, or give the reason why that fails.

        A demonstration of several turns is refused as malformed.

        Args:
            value: as in `demonstration_turns`.
            max_tokens: the largest allowed number of response tokens, end of sequence included.
        """
        turns = demonstration_turns(value)
        if isinstance(turns, Refusal):
            return turns
        if len(turns) > 1:
            return Refusal("malformed")
        return demonstration_response(
            turns,
            write=lambda turn: demonstration_tokens(
                turn.text,
                encode=self.encode,
                generation_prompt=self.generation_prompt,
                end_token=self.end_token,
                end_tokens=self.end_tokens,
                max_tokens=max_tokens,
                control_tokens=self.control_tokens,
            ),
            answer=lambda response, tokens, turn: response,
            max_tokens=max_tokens,
        )


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return encode


def _control_tokens(tokenizer: Any, chat: Sequence[int]) -> frozenset[int]:
    """The ids of the tokenizer's special tokens and of the added tokens that the template writes around messages.

    Both are needed, since some tokenizers mark the headers of turns as special and some do not. Tags of thoughts
    (`<think>`) count as text, not as control tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat: the token ids of a rendered conversation.
    """
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    special = {*tokenizer.all_special_ids, *(t for t, entry in tokenizer.added_tokens_decoder.items() if entry.special)}
    headers = {token for token in chat if token in added and not added[token].isalnum()}
    thoughts = {*THOUGHTS, *THOUGHTS.values()}
    return frozenset(token for token in special | headers if added.get(token) not in thoughts)
