"""The run's chat template and tokenizer, reduced to what a demonstration needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hapo_verl.algo.demonstration import Refusal, demonstration_text, demonstration_tokens, turn_end_token

_MARK = "hapo-marks-the-assistant"


@dataclass(frozen=True)
class ChatFormat:
    """How this run writes an assistant's turn.

    Attributes:
        encode: text → token ids, nothing added.
        generation_prompt: what the template writes before the policy's first token.
        end_token: id that closes a turn.
        end_tokens: ids at which generation stops.
    """

    encode: Callable[[str], list[int]]
    generation_prompt: str
    end_token: int
    end_tokens: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, *, generation_config: Any, template_kwargs: dict[str, Any]) -> ChatFormat:
        """The format of a Hugging Face tokenizer.

        Args:
            tokenizer: with a chat template and an end-of-sequence token.
            generation_config: the model's, whose `eos_token_id` (an id or several) vLLM stops at; or None.
            template_kwargs: `data.apply_chat_template_kwargs`.
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
        )

    def demonstration(self, value: Any, *, max_tokens: int) -> list[int] | Refusal:
        """A data set's demonstration as this run's response tokens, end of sequence included, or why there is none.

        Args:
            value: a string, or a list with one message of the assistant.
            max_tokens: `data.max_response_length`.
        """
        text = demonstration_text(value)
        if isinstance(text, Refusal):
            return text
        return demonstration_tokens(
            text,
            encode=self.encode,
            generation_prompt=self.generation_prompt,
            end_token=self.end_token,
            end_tokens=self.end_tokens,
            max_tokens=max_tokens,
        )
