"""How a Hugging Face tokenizer writes an assistant's turn: what a demonstration needs of a chat template.

    prompt ⊕ generation prompt ⊕ text ⊕ ⟨end of turn⟩

Everything is read off the template by rendering a marked conversation with it, so no template is known by its name.
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
    """An assistant's turn, as a run writes it.

    Attributes:
        encode: text → token ids, nothing added.
        generation_prompt: what the template writes between the question and the policy's first token.
        end_token: id that closes a turn.
        end_tokens: ids at which generation stops.
        control_tokens: ids that no text of an assistant's turn is made of.
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
            generation_config: the model's, whose `eos_token_id` (an id or several) generation stops at; or None.
            template_kwargs: what the run gives its chat template.
            more: fields of a subclass.
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
        # Some templates know thoughts by one of these names, and write them in front of the text.
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
        """The format of prompts that are texts and no chats: the answer goes on from the prompt's last character.

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
        """A data set's demonstration as a response of one turn, or why there is none; several turns are malformed.

        Args:
            value: as in `demonstration_turns`.
            max_tokens: the longest response, its end of sequence included.
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
    """What a Hugging Face tokenizer calls special, and what stands around the messages of a chat.

    Some name the headers of turns special, some do not. Tags of thoughts are text.
    """
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    special = {*tokenizer.all_special_ids, *(t for t, entry in tokenizer.added_tokens_decoder.items() if entry.special)}
    headers = {token for token in chat if token in added and not added[token].isalnum()}
    thoughts = {*THOUGHTS, *THOUGHTS.values()}
    return frozenset(token for token in special | headers if added.get(token) not in thoughts)
