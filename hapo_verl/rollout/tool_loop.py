"""Builds the tokens of a demonstration with tool calls exactly as verl's tool loop would have written them.

    turn ⊕ answers ⊕ turn ⊕ ... ⊕ turn        mask 1 on the turns, 0 on the answers and the template's text around them

verl's own parser (`multi_turn.format`) finds the calls of a turn, and verl's own builder turns the answers into tokens.
The loop of a row, its tools and its limits are read from the launch. The tests compare the result with verl's
`ToolAgentLoop`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from omegaconf import DictConfig, OmegaConf

from hapo_verl.algo.demonstration import Call, Refusal, Response, Turn
from hapo_verl.config import ConfigError

_ROLLOUT = "actor_rollout_ref.rollout"
_QUESTION = {"role": "user", "content": "?"}
_MARK = "hapo-marks-the-text"
_CALLED = "hapo-marks-the-call"

# Errors that a chat template may raise on messages that it cannot render.
_UNRENDERED = (TemplateError, TypeError)


class ToolLoop:
    """The tool loop of a launch; its parser, tools and builder are made when a demonstration first needs them."""

    def __init__(
        self,
        config: DictConfig,
        tokenizer: Any,
        *,
        load_tools: Callable[[], list[Any]],
        load_model: Callable[[], tuple[str | None, Any]],
    ) -> None:
        """Read the launch's limits; nothing else is loaded yet.

        Args:
            config: the whole configuration.
            tokenizer: the tokenizer of the run.
            load_tools: returns the tools that an agent loop worker has.
            load_model: returns the model's `model_type`, and its processor or None, by which verl chooses its builder.

        Raises:
            ConfigError: if `multi_turn` has keys that verl does not know.
        """
        self._config, self.tokenizer = config, tokenizer
        self._load_tools, self._load_model = load_tools, load_model
        self.limits = _limits(_select(config, "multi_turn") or {})

    @classmethod
    def of_launch(cls, config: DictConfig, tokenizer: Any) -> ToolLoop:
        """The tool loop for a process that is not an agent loop worker and must load tools and model config itself."""

        def load_tools() -> list[Any]:
            from verl.tools.tool_registry import load_all_tools
            from verl.utils.import_utils import resolve_config_path

            files = {key: _select(config, f"multi_turn.{key}") for key in ("tool_config_path", "function_tool_path")}
            return load_all_tools(**{key: resolve_config_path(file) if file else None for key, file in files.items()})

        def load_model() -> tuple[str | None, Any]:
            from transformers import AutoConfig
            from verl.utils import hf_processor
            from verl.utils.fs import copy_to_local

            folder = copy_to_local(str(config.actor_rollout_ref.model.path))
            return getattr(AutoConfig.from_pretrained(folder), "model_type", None), hf_processor(folder)

        return cls(config, tokenizer, load_tools=load_tools, load_model=load_model)

    def conversation(self, row: Mapping[str, Any]) -> Conversation | None:
        """A new `Conversation` for a row's demonstration; None if the row's agent loop has no tools.

        Args:
            row: a row of the data set; its `agent_name` and `extra_info.tool_selection` are read, as in verl.
        """
        name = row.get("agent_name") or _select(self._config, "agent.default_agent_loop")
        if not self._is_tool_loop(name):
            return None
        selection = (row.get("extra_info") or {}).get("tool_selection")
        return Conversation(self, [] if selection is None else list(selection))

    def _is_tool_loop(self, name: str | None) -> bool:
        from hydra.utils import get_class
        from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop

        return name in self._loops and issubclass(get_class(self._loops[name]), ToolAgentLoop)

    @cached_property
    def _loops(self) -> dict[str, str]:
        """Name → class, for verl's agent loops and those that the launch adds."""
        from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
        from verl.utils.import_utils import resolve_config_path

        path = _select(self._config, "agent.agent_loop_config_path")
        added: Any = OmegaConf.load(resolve_config_path(path)) if path else []
        return {name: entry["_target_"] for name, entry in _agent_loop_registry.items()} | {
            entry["name"]: entry["_target_"] for entry in added
        }

    @cached_property
    def tools(self) -> dict[str, Any]:
        return {tool.name: tool for tool in self._load_tools()}

    @cached_property
    def parser(self) -> Any:
        from verl.experimental.agent_loop.tool_parser import ToolParser

        return ToolParser.get_tool_parser(self.limits.format, self.tokenizer)

    @cached_property
    def builder(self) -> Any:
        from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

        model_type, processor = self._load_model()
        return create_continuous_token_builder(
            self.tokenizer,
            hf_model_type=model_type,
            chat_template_kwargs=self._template_kwargs,
            mm_processor_kwargs=OmegaConf.select(self._config, "data.mm_processor_kwargs") or {},
            processor=processor,
        )

    @cached_property
    def _template_kwargs(self) -> dict[str, Any]:
        return dict(OmegaConf.select(self._config, "data.apply_chat_template_kwargs") or {})

    @cached_property
    def closing(self) -> str:
        """The text that the chat template writes after a turn's text."""
        return self.render([_QUESTION, {"role": "assistant", "content": _MARK}]).rpartition(_MARK)[2]

    @cached_property
    def behind_a_call(self) -> list[int]:
        """The tokens that the chat template writes between a call and its answer; empty if it cannot write calls."""
        called = _assistant("", [Call(_CALLED, {}, _CALLED)])
        try:
            written = self.render([_QUESTION, called, {"role": "tool", "content": _MARK}])
        except _UNRENDERED:
            return []
        between = written.rpartition(_MARK)[0].rpartition(_CALLED)[2]
        return list(self.tokenizer.encode(between, add_special_tokens=False))

    def render(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **self._template_kwargs, **kwargs)


class Conversation:
    """One demonstration in the tool loop: holds the messages so far and adds the tools' answers after each turn."""

    def __init__(self, loop: ToolLoop, selection: Sequence[str]) -> None:
        """Start with the tools that the row selects, or with all tools if `selection` is empty."""
        self._loop, self._selection = loop, selection
        # verl has the row's prompt here, but the tokens after an answer do not depend on it.
        self._messages: list[dict[str, Any]] = [_QUESTION]

    @cached_property
    def _tools(self) -> dict[str, Any]:
        tools = self._loop.tools
        return {name: tools[name] for name in self._selection if name in tools} if self._selection else tools

    @cached_property
    def schemas(self) -> list[dict[str, Any]]:
        """The schemas of the row's tools, as verl passes them to the chat template."""
        return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in self._tools.values()]

    def admits(self, turns: Sequence[Turn]) -> bool:
        """Whether the loop's limits allow all of these turns and calls."""
        limits = self._loop.limits
        return (
            len(turns) <= (limits.max_assistant_turns or len(turns))
            and len(turns) - 1 <= (limits.max_user_turns or len(turns))
            and all(len(turn.answers) <= limits.max_parallel_calls for turn in turns)
        )

    def calls_text(self, turn: Turn) -> str | Refusal:
        """The text that the chat template writes after a turn's text for its calls.

        The turn is malformed if the template cannot write calls, or drops the text beside them. For such a template the
        data set must have the calls in the turn's text.
        """
        if not turn.calls:
            return ""
        loop, tools = self._loop, {"tools": self.schemas}
        try:
            head, mark, calls = loop.render([_QUESTION, _assistant(_MARK, turn.calls)], **tools).rpartition(_MARK)
            if mark and not turn.text:
                calls = calls.lstrip()
            elif not mark and not turn.text:
                asked = loop.render([_QUESTION], add_generation_prompt=True, **tools)
                head, _, calls = loop.render([_QUESTION, _assistant("", turn.calls)], **tools).partition(asked)
                if head:
                    return Refusal("malformed")
            elif not mark:
                return Refusal("malformed")
        except _UNRENDERED:
            return Refusal("malformed")
        return calls.removesuffix(loop.closing) or Refusal("malformed")

    def tokens_of_calls(self) -> frozenset[int]:
        """The tokens around a call, as written by the chat template and as read by the run's parser."""
        mark = self.calls_text(Turn("", (Call(_CALLED, {_CALLED: _CALLED}, _CALLED),)))
        parser = vars(self._loop.parser)
        texts = [text for name, text in parser.items() if name.endswith("_token") and isinstance(text, str)]
        texts += [] if isinstance(mark, Refusal) else [mark]
        encode = self._loop.tokenizer.encode
        return frozenset(token for text in texts for token in encode(text, add_special_tokens=False))

    def answered(self, response: Response, tokens: Sequence[int], turn: Turn) -> Response | Refusal:
        """Add the tools' answers to the last turn, and the opening of the next turn; the last turn is not changed.

        The demonstration is malformed if the run's parser does not find one call per answer in the turn, or if this
        run's tools would not accept a call: verl itself would then write another answer.

        Args:
            response: the response up to the end of this turn.
            tokens: the tokens of this turn.
            turn: this turn.
        """
        # Tools may be expensive to make, and a turn without answers needs none.
        schemas = [tool.tool_schema for tool in self._tools.values()] if turn.answers else []
        content, calls = _result_of(self._loop.parser.extract_tool_calls(list(tokens), schemas))
        if turn.calls and [call.name for call in calls] != [call.name for call in turn.calls]:
            return Refusal("malformed")
        if len(calls) != len(turn.answers) or not all(call.name in self._tools and _is_json(call) for call in calls):
            return Refusal("malformed")
        if not calls:
            return response
        loop = self._loop
        own = _assistant(content, [Call(c.name, json.loads(c.arguments), c.tool_call_id) for c in calls])
        answers = [
            {"role": "tool", "content": _shortened(answer, loop.limits)}
            | ({} if call.tool_call_id is None else {"tool_call_id": call.tool_call_id})
            for call, answer in zip(calls, turn.answers, strict=True)
        ]
        before = [*self._messages, own]
        self._messages = [*before, *answers]
        merged = loop.builder.merge_context_tokens(before, self._messages, response.tokens, tools=self.schemas)
        mask, _ = loop.builder.align_response_metadata(merged, response.mask)
        return Response(merged.token_ids, mask, response.turns, response.answers + len(answers))


def texts_of(calls: Sequence[Call]) -> list[str]:
    """The parts of calls that come from the data set and not from the chat template: names, ids, arguments."""
    return [
        text
        for call in calls
        for text in (call.name, call.id or "", json.dumps(call.arguments, ensure_ascii=False, default=str))
    ]


def _limits(given: Any) -> Any:
    """`actor_rollout_ref.rollout.multi_turn` with verl's defaults."""
    from verl.workers.config import MultiTurnConfig

    known = OmegaConf.structured(MultiTurnConfig)
    for key in given:
        if key not in known:
            names = ", ".join(sorted(name for name in known if not name.startswith("_")))
            raise ConfigError(f"{_ROLLOUT}.multi_turn.{key}: no such key. Use one of {names}.")
    return OmegaConf.merge(known, given)


def _assistant(text: str, calls: Sequence[Call]) -> dict[str, Any]:
    tool_calls = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        | ({} if call.id is None else {"id": call.id})
        for call in calls
    ]
    return {"role": "assistant", "content": text, "tool_calls": tool_calls}


def _is_json(call: Any) -> bool:
    try:
        json.loads(call.arguments)
    except json.JSONDecodeError:
        return False
    return True


def _shortened(answer: str, limits: Any) -> str:
    """An answer cut as verl does it: to `max_tool_response_length` characters, with a mark for the missing ones."""
    size, side = limits.max_tool_response_length, limits.tool_response_truncate_side
    if len(answer) <= size:
        return answer
    if side in ("left", "right"):
        return f"(truncated)...{answer[-size:]}" if side == "left" else f"{answer[:size]}...(truncated)"
    return f"{answer[: size // 2]}...(truncated)...{answer[-(size // 2) :]}"


def _result_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    # In a separate thread, since the caller's thread may already have an event loop.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _select(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, f"{_ROLLOUT}.{key}")
