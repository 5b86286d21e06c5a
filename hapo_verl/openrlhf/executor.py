"""An agent executor for OpenRLHF's `--train.agent_func_path`: a group's samples, judged together.

    samples and their rewards (OpenRLHF) → gate → demonstration, scored like a sample → in the worst sample's place

OpenRLHF calls `execute` once a sample. The samples of a prompt are started together in one vLLM actor, with one object
of sampling parameters: that is how a group is known, and it is judged once for all. Nothing of OpenRLHF is patched, so
demonstrations train with its own loss.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from openrlhf.utils.agent import SingleTurnAgentExecutor
from transformers import GenerationConfig

from hapo_verl.algo.chat import TurnFormat
from hapo_verl.algo.demonstration import Refusal
from hapo_verl.algo.gate_state import GateState
from hapo_verl.algo.injection import Rollout, is_success
from hapo_verl.algo.judgement import Judgement, described
from hapo_verl.config import ConfigError
from hapo_verl.openrlhf.settings import Settings


class HapoAgentExecutor(SingleTurnAgentExecutor):
    """OpenRLHF's executor for single turns, with a gate and verified demonstrations; `config` names its settings."""

    config: str | os.PathLike[str] = ""

    def __init__(self) -> None:
        self._settings = Settings.read(self.config)
        super().__init__(self._settings.reward)
        self._gate_state = GateState(self._settings.hapo, total_steps=0, resume_key="", data_key="")
        # Of groups in flight: the samples that have been asked for, and what becomes the list of their rows.
        self._sizes: Counter[int] = Counter()
        self._groups: dict[int, asyncio.Task[list[dict]]] = {}
        self._started = 0  # groups of training
        self._formats: list[TurnFormat] = []

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None) -> dict:
        """One row of the group, as OpenRLHF's own executor returns it."""
        key = id(sampling_params)
        place, self._sizes[key] = self._sizes[key], self._sizes[key] + 1
        if place == 0:
            call = {"prompt": prompt, "sampling_params": sampling_params, "max_length": max_length}
            call |= {"hf_tokenizer": hf_tokenizer, "images": images}
            self._groups[key] = asyncio.ensure_future(self._rows(key, label, llm_engine, call))
        return (await self._groups[key])[place]

    async def _rows(self, key: int, label: Any, llm_engine: Any, call: dict[str, Any]) -> list[dict]:
        try:
            await asyncio.sleep(0)  # until all samples of the group are counted
            fields = _fields(label)
            call = {**call, "label": fields["label"]}
            size, training = self._sizes[key], self._settings.hapo.demonstration_key in fields
            if training:
                _check_group(size, call)
            self._started += training
            step = self._step(self._started)
            samples = [super(HapoAgentExecutor, self).execute(**call, llm_engine=llm_engine) for _ in range(size)]
            rows = list(await asyncio.gather(*samples))
        finally:
            del self._sizes[key], self._groups[key]
        judgement = self._judged(rows, call["prompt"], step) if training else Judgement(gated=False)
        reward, refused = sum(_number(row["reward"]) for row in rows) / size, None
        if judgement.worst is not None:
            value = fields[self._settings.hapo.demonstration_key]
            row = await self._demonstration(value, call, prompt_tokens=rows[0]["action_ranges"][0][0])
            if isinstance(row, Refusal):
                refused = row.reason
            else:
                rows[judgement.worst] = row
        injected = judgement.worst is not None and refused is None
        reasons, threshold = [refused] if refused else [], self._gate_state.threshold(step)
        logs = described([judgement], size, injected=injected, reasons=reasons, threshold=threshold, reward=reward)
        for row in rows:
            row["extra_logs"] = {**row["extra_logs"], **logs}
        return rows

    def _judged(self, rows: list[dict[str, Any]], prompt: str, step: int) -> Judgement:
        rollouts = [
            Rollout(_number(row["reward"]), self._success(row), row["truncated"], end - start)
            for row in rows
            for start, end in row["action_ranges"]
        ]
        return self._gate_state.judge(rollouts, len(rows), [None], step=step, seed=prompt)[0]

    async def _demonstration(self, value: Any, call: dict[str, Any], *, prompt_tokens: int) -> dict[str, Any] | Refusal:
        """The demonstration's row, made and scored by OpenRLHF as if the engine had written it."""
        most = call["sampling_params"].max_tokens or max(1, call["max_length"] - prompt_tokens)
        self._formats = self._formats or _formats(call["hf_tokenizer"])
        written = next(form for form in self._formats if call["prompt"].endswith(form.generation_prompt))
        response = written.single_turn(value, max_tokens=most)
        if isinstance(response, Refusal):
            return response

        async def write(*_: Any, **__: Any) -> Any:
            output = SimpleNamespace(token_ids=response.tokens, text="", logprobs=None, finish_reason="stop")
            return SimpleNamespace(outputs=[output])

        row = await super().execute(**call, llm_engine=SimpleNamespace(generate=write))
        return row if self._success(row) else Refusal("rejected")

    def _step(self, group: int) -> int:
        """The step of this engine's n-th group, n from 1."""
        return self._settings.first_step + max(0, group - 1) // (self._settings.groups_per_engine or 1)

    def _success(self, row: dict[str, Any]) -> bool:
        return is_success(_number(row["reward"]), _number(row["scores"]), self._settings.hapo.success_threshold)


def _fields(label: Any) -> Mapping[str, Any]:
    """A label's fields: `label`, and on rows of training the demonstration."""
    try:
        fields = json.loads(label) if isinstance(label, str) else label
    except ValueError:
        fields = None
    if not isinstance(fields, Mapping) or "label" not in fields:
        raise ConfigError(
            f"--data.label_key: {label!r:.80} is no JSON object with the key label. Write "
            '{"label": ..., "demonstration": ...} into that column, and no demonstration on held-out rows.'
        )
    return fields


def _check_group(size: int, call: dict[str, Any]) -> None:
    logprobs = call["sampling_params"].logprobs
    for wrong, said in (
        (size < 2, f"--rollout.n_samples_per_prompt={size}: a demonstration joins a group of samples. Use 8."),
        (logprobs is not None, "--algo.advantage.is_correction_enable: a demonstration was not sampled. Remove it."),
        (call["images"], "--data.image_key: a demonstration is one turn of text. Use prompts without images."),
    ):
        if wrong:
            raise ConfigError(said)


def _formats(tokenizer: Any) -> list[TurnFormat]:
    """How answers are written: as a turn of a chat, for prompts that the chat template has written, and as text."""
    if not tokenizer.chat_template:
        return [TurnFormat.of_text(tokenizer, end_tokens=[tokenizer.eos_token_id])]
    try:
        generation_config = GenerationConfig.from_pretrained(tokenizer.name_or_path)
    except OSError:
        generation_config = None
    chat = TurnFormat.of(tokenizer, generation_config=generation_config, template_kwargs={})
    return [chat, TurnFormat.of_text(tokenizer, end_tokens=chat.end_tokens)]


def _number(value: Any) -> float:
    """A reward as OpenRLHF hands it on, a number or a tensor of one; NaN where the reward function has failed."""
    return math.nan if value is None else torch.as_tensor(value).reshape(-1)[0].item()
