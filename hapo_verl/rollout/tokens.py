"""The run's chat template and tokenizer, reduced to what a demonstration needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hapo_verl.algo.demonstration import (
    Refusal,
    Response,
    Turn,
    demonstration_response,
    demonstration_tokens,
    demonstration_turns,
    turn_end_token,
)
from hapo_verl.algo.thought import THOUGHTS
from hapo_verl.rollout.tool_loop import Conversation, ToolLoop, texts_of

_MARK, _QUESTION = "hapo-marks-the-assistant", "hapo-marks-the-question"


@dataclass(frozen=True)
class ChatFormat:
    """How this run writes an assistant's turn.

    Attributes:
        encode: text → token ids, nothing added.
        generation_prompt: what the template writes between the question and the policy's first token.
        end_token: id that closes a turn.
        end_tokens: ids at which generation stops.
        control_tokens: ids that no text of an assistant's turn is made of.
        tool_loop: what demonstrations with several turns go through; None where there is none.
    """

    encode: Callable[[str], list[int]]
    generation_prompt: str
    end_token: int
    end_tokens: frozenset[int]
    control_tokens: frozenset[int] = frozenset()
    tool_loop: ToolLoop | None = None

    @classmethod
    def of_launch(cls, config: DictConfig, tokenizer: Any) -> ChatFormat:
        """The format of a launch, outside of its agent loop workers.

        Args:
            config: the whole configuration.
            tokenizer: the run's.
        """
        return cls.of(
            tokenizer,
            generation_config=_generation_config(str(config.actor_rollout_ref.model.path)),
            template_kwargs=dict(OmegaConf.select(config, "data.apply_chat_template_kwargs") or {}),
            tool_loop=ToolLoop.of_launch(config, tokenizer),
        )

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        *,
        generation_config: Any,
        template_kwargs: dict[str, Any],
        tool_loop: ToolLoop | None = None,
    ) -> ChatFormat:
        """The format of a Hugging Face tokenizer.

        Args:
            tokenizer: with a chat template and an end-of-sequence token.
            generation_config: the model's, whose `eos_token_id` (an id or several) vLLM stops at; or None.
            template_kwargs: `data.apply_chat_template_kwargs`.
            tool_loop: the run's.
        """

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

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
            tool_loop=tool_loop,
        )

    def demonstration(self, value: Any, row: Mapping[str, Any], *, max_tokens: int) -> Response | Refusal:
        """A data set's demonstration as this run's response, or why there is none.

        Several turns are malformed where the row's agent loop calls no tools, and overlong beyond the limits of its
        `multi_turn`.

        Args:
            value: as in `demonstration_turns`.
            row: of the data, the demonstration's own.
            max_tokens: `data.max_response_length`.
        """
        turns = demonstration_turns(value)
        if isinstance(turns, Refusal):
            return turns
        conversation = self.tool_loop.conversation(row) if self.tool_loop else None
        if conversation is None and len(turns) > 1:
            return Refusal("malformed")
        if conversation is not None and not conversation.admits(turns):
            return Refusal("overlong")
        return demonstration_response(
            turns,
            write=lambda turn: self._turn(turn, conversation, max_tokens),
            answer=conversation.answered if conversation else lambda response, tokens, turn: response,
            max_tokens=max_tokens,
        )

    def _turn(self, turn: Turn, conversation: Conversation | None, max_tokens: int) -> list[int] | Refusal:
        calls, stop_tokens, end_token, control_tokens = "", frozenset(), self.end_token, self.control_tokens
        if conversation and self.tool_loop:
            calls = conversation.calls_text(turn)
            if isinstance(calls, Refusal):
                return calls
            if any(token in control_tokens for text in texts_of(turn.calls) for token in self.encode(text)):
                return Refusal("malformed")
            stop_tokens = frozenset(self.tool_loop.parser.stop_token_ids)
            if turn.answers:
                # A call may also stand in the text, as the run's parser reads it.
                control_tokens -= conversation.tokens_of_calls()
                # Some templates stop behind a call with what opens the answer.
                end_token = turn_end_token(self.tool_loop.behind_a_call, self.end_tokens | stop_tokens, end_token)
        return demonstration_tokens(
            turn.text,
            encode=self.encode,
            generation_prompt=self.generation_prompt,
            end_token=end_token,
            end_tokens=self.end_tokens,
            max_tokens=max_tokens,
            calls=calls,
            stop_tokens=stop_tokens,
            control_tokens=control_tokens,
        )


def _generation_config(model_path: str) -> Any:
    """verl's of this model; None where there is neither one nor a model's configuration to make it of."""
    from verl.utils.fs import copy_to_local
    from verl.utils.model import get_generation_config

    try:
        return get_generation_config(copy_to_local(model_path))
    except (OSError, ValueError):
        return None


def _control_tokens(tokenizer: Any, chat: Sequence[int]) -> frozenset[int]:
    """What a Hugging Face tokenizer calls special, and what stands around the messages of a chat.

    Some name the headers of turns special, some do not. Tags of thoughts are text.
    """
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items()}
    special = {*tokenizer.all_special_ids, *(t for t, entry in tokenizer.added_tokens_decoder.items() if entry.special)}
    headers = {token for token in chat if token in added and not added[token].isalnum()}
    thoughts = {*THOUGHTS, *THOUGHTS.values()}
    return frozenset(token for token in special | headers if added.get(token) not in thoughts)
