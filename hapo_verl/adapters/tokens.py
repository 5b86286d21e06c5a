"""The run's chat template and tokenizer, reduced to what a demonstration needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hapo_verl.adapters.tool_loop import Conversation, ToolLoop
from hapo_verl.algo.demonstration import (
    Refusal,
    Response,
    Turn,
    demonstration_response,
    demonstration_tokens,
    demonstration_turns,
    turn_end_token,
)

_MARK = "hapo-marks-the-assistant"


@dataclass(frozen=True)
class ChatFormat:
    """How this run writes an assistant's turn.

    Attributes:
        encode: text → token ids, nothing added.
        generation_prompt: what the template writes before the policy's first token.
        end_token: id that closes a turn.
        end_tokens: ids at which generation stops.
        tool_loop: what demonstrations with several turns go through; None where there is none.
    """

    encode: Callable[[str], list[int]]
    generation_prompt: str
    end_token: int
    end_tokens: frozenset[int]
    tool_loop: ToolLoop | None = None

    @classmethod
    def of_launch(cls, config: DictConfig, tokenizer: Any, *, generation_config: Any = None) -> ChatFormat:
        """The format of a launch, outside of its agent loop workers.

        Args:
            config: the whole configuration.
            tokenizer: the run's.
            generation_config: as in `of`.
        """
        return cls.of(
            tokenizer,
            generation_config=generation_config,
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

        question = [{"role": "user", "content": "?"}]
        asked, prompted = render(question), render(question, add_generation_prompt=True)
        answered = render([*question, {"role": "assistant", "content": _MARK}])
        closing = answered.rpartition(_MARK)[2]

        configured = getattr(generation_config, "eos_token_id", None)
        configured = configured if isinstance(configured, list | tuple) else [configured]
        end_tokens = frozenset(token for token in [tokenizer.eos_token_id, *configured] if token is not None)
        return cls(
            encode=encode,
            generation_prompt=prompted[len(asked) :] if prompted.startswith(asked) else "",
            end_token=turn_end_token(encode(closing), end_tokens, tokenizer.eos_token_id),
            end_tokens=end_tokens,
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
        calls, stop_tokens, end_token = "", frozenset(), self.end_token
        if conversation and self.tool_loop:
            calls = conversation.calls_text(turn)
            if isinstance(calls, Refusal):
                return calls
            stop_tokens = frozenset(self.tool_loop.parser.stop_token_ids)
            if turn.answers:
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
        )
