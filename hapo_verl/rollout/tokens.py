"""Turns demonstrations into tokens with the run's chat template, tokenizer and tool loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hapo_verl.algo.chat import TurnFormat
from hapo_verl.algo.demonstration import (
    Refusal,
    Response,
    Turn,
    demonstration_response,
    demonstration_tokens,
    demonstration_turns,
    turn_end_token,
)
from hapo_verl.rollout.tool_loop import Conversation, ToolLoop, texts_of


@dataclass(frozen=True)
class ChatFormat(TurnFormat):
    """The format of an assistant's turn in this run, and its tool loop.

    Attributes:
        tool_loop: the tool loop for demonstrations with several turns; None for none.
    """

    tool_loop: ToolLoop | None = None

    @classmethod
    def of_launch(cls, config: DictConfig, tokenizer: Any) -> ChatFormat:
        """The format of a launch, for a process that is not an agent loop worker.

        Args:
            config: the whole configuration.
            tokenizer: the tokenizer of the run.
        """
        return cls.of(
            tokenizer,
            generation_config=_generation_config(str(config.actor_rollout_ref.model.path)),
            template_kwargs=dict(OmegaConf.select(config, "data.apply_chat_template_kwargs") or {}),
            tool_loop=ToolLoop.of_launch(config, tokenizer),
        )

    def demonstration(self, value: Any, row: Mapping[str, Any], *, max_tokens: int) -> Response | Refusal:
        """Turn a data set's demonstration into a response of this run, or give the reason why that fails.

        A demonstration of several turns is malformed if the row's agent loop has no tools, and overlong if it exceeds
        the limits of the run's `multi_turn`.

        Args:
            value: as in `demonstration_turns`.
            row: the row of the data set that the demonstration belongs to.
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
                # A call may also be part of the text, in the form that the run's parser reads.
                control_tokens -= conversation.tokens_of_calls()
                # With some templates generation stops after a call at the token that opens the answer.
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
    """The generation config that verl uses for this model; None if the model has no config to make one from."""
    from verl.utils.fs import copy_to_local
    from verl.utils.model import get_generation_config

    try:
        return get_generation_config(copy_to_local(model_path))
    except (OSError, ValueError):
        return None
