"""HAPO in TRL's GRPOTrainer: TRL generates, scores and trains; in between, the gate is applied to the groups.

    completions → rewards → gate → demonstration replaces the worst completion → log-probs, masks, metrics of TRL
    loss = TRL's loss of the policy's own rows + the demonstrations' part of `algo.policy_loss`, in one aggregation

The rewards of completions are computed before the injection; when TRL asks for them after it, the stored ones are
returned. Every process applies the gate to all groups, with gathered rewards and the same random numbers; the process
that holds the worst completion replaces it by the demonstration.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer, is_conversational  # pyright: ignore[reportAttributeAccessIssue]  takes this folder for it

from hapo_verl.algo.advantage import scored_advantage
from hapo_verl.algo.chat import TurnFormat
from hapo_verl.algo.demonstration import Refusal, Response
from hapo_verl.algo.gate_state import GateState
from hapo_verl.algo.injection import Rollout
from hapo_verl.algo.judgement import Judgement, described
from hapo_verl.algo.posterior import prompt_key
from hapo_verl.config import ConfigError
from hapo_verl.trl.config import HapoGRPOConfig, check_trainer
from hapo_verl.trl.contract import check_contract
from hapo_verl.trl.loss import aggregation, demonstration_loss, without

# An additional field of TRL's batches: (B,) bool, True on demonstrations.
DEMONSTRATION = "hapo_demonstration"


@dataclass
class _Batch:
    """A generation batch: the inputs of this process, and the results for the B rows of all processes.

    Attributes:
        inputs: this process's rows of the data set, one per completion.
        reward_BF: (B, F) rewards of the F reward functions, after the injection.
        demonstration_B: (B,) bool, True on demonstrations.
    """

    inputs: list[dict[str, Any]]
    reward_BF: Tensor = field(default_factory=lambda: torch.empty(0))
    demonstration_B: Tensor = field(default_factory=lambda: torch.empty(0))


class HapoGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with a gate and verified demonstrations; takes the same arguments, with a `HapoGRPOConfig`."""

    # The batch that is being generated; None in evaluation.
    _batch: _Batch | None = None

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *more: Any, **kwargs: Any) -> None:
        check_contract()
        args = HapoGRPOConfig() if args is None else args
        if not isinstance(args, HapoGRPOConfig):
            raise ConfigError(f"args={type(args).__name__}: no keys of HAPO. Use hapo_verl.trl.HapoGRPOConfig.")
        self._hapo = args.parsed_hapo()
        super().__init__(model, reward_funcs, args, *more, **kwargs)
        check_trainer(self, self._hapo)
        if not self._hapo.loss.clip:
            self.epsilon_low = self.epsilon_high = math.inf
        self._gate_state = GateState(
            self._hapo, total_steps=args.max_steps, resume_key="resume_from_checkpoint", data_key="train_dataset"
        )
        if self._gate_state.remembers_prompts:
            rows: Any = self.train_dataset
            self._gate_state.know([_key(row) for row in rows], [_source(row) for row in rows])
        self._formats: dict[bool, TurnFormat] = {}

    # --- rows ---

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._batch = batch = _Batch(inputs) if self.model.training else None
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._batch = None
        if batch is not None:
            advantage_B = self._advantages(batch)
            # The log keeps a fixed number of entries, so these push TRL's own advantages out.
            self._logs["advantages"].extend(advantage_B.tolist())
            mine = self._my_rows(len(inputs))
            output["advantages"], output[DEMONSTRATION] = advantage_B[mine], batch.demonstration_B[mine]
        return output

    def _generate(self, prompts: list) -> tuple:
        generated = super()._generate(prompts)
        if self._batch is not None:
            _, completion_ids, _, completions, logprobs, *_ = generated
            self._inject(self._batch, prompts, completion_ids, completions, logprobs)
        return generated

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        if self._batch is not None:
            return self._batch.reward_BF
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _inject(self, batch: _Batch, prompts: list, ids: list, completions: list, logprobs: list | None) -> None:
        """Score completions, apply the gate, replace this process's worst completions by verified demonstrations."""
        batch.reward_BF = super()._calculate_rewards(batch.inputs, prompts, completions, ids)
        batch.demonstration_B = torch.zeros(len(batch.reward_BF), dtype=torch.bool, device=batch.reward_BF.device)
        keys = gather_object([_key(row) for row in batch.inputs]) if self._gate_state.remembers_prompts else None
        judgements = self._judge(batch.reward_BF, ids, keys)
        reward = self._scores(batch.reward_BF).nanmean().item()
        first, worst = self._my_rows(len(prompts)).start, [judgement.worst for judgement in judgements]
        mine = [row - first for row in worst if row is not None and 0 <= row - first < len(prompts)]
        found = {row: self._demonstration(batch.inputs[row]) for row in mine}
        responses = {row: response for row, response in found.items() if isinstance(response, Response)}
        reasons = gather_object([response.reason for response in found.values() if isinstance(response, Refusal)])
        texts = self._verify(batch, prompts, completions, ids, responses)
        for row, response in responses.items():
            if batch.demonstration_B[first + row]:
                ids[row], completions[row] = response.tokens, texts[row]
                if logprobs is not None:
                    # With NaN for the sampler's log-probability, TRL uses an importance ratio of 1.
                    logprobs[row] = [math.nan] * len(response.tokens)
        injected = int(batch.demonstration_B.sum())
        reasons += ["rejected"] * (sum(row is not None for row in worst) - injected - len(reasons))
        threshold = self._gate_state.threshold(self.state.global_step + 1)
        metrics = described(
            judgements, self.num_generations, injected=injected, reasons=reasons, threshold=threshold, reward=reward
        )
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _judge(self, reward_BF: Tensor, ids: list[list[int]], keys: list[int] | None) -> list[Judgement]:
        """The gate's decision on each group of all processes; `worst` counts the rows of all processes."""
        self._gate_state.total_steps = self.state.max_steps
        ends, per_group = {*self.eos_token_ids, self._tokenizer.pad_token_id}, self.num_generations
        facts = gather_object([(row[-1] not in ends, len(row)) for row in ids])
        scores = self._scores(reward_BF).tolist()
        rollouts = [
            Rollout(score, score >= self._hapo.success_threshold, *fact)
            for score, fact in zip(scores, facts, strict=True)
        ]
        of_groups = keys[::per_group] if keys else [None] * (len(rollouts) // per_group)
        # A step may generate more than once, so the trainer's count of passes tells the batches apart.
        return self._gate_state.judge(rollouts, per_group, of_groups, step=self.state.global_step + 1, seed=self._step)

    def _demonstration(self, row: dict[str, Any]) -> Response | Refusal:
        chat = is_conversational({"prompt": row["prompt"]})
        if chat not in self._formats:
            self._formats[chat] = (
                TurnFormat.of(
                    self._tokenizer,
                    generation_config=self.model.generation_config,
                    template_kwargs=dict(self.chat_template_kwargs),
                )
                if chat
                else TurnFormat.of_text(self._tokenizer, end_tokens=self.eos_token_ids)
            )
        value = row.get(self._hapo.demonstration_key)
        return self._formats[chat].single_turn(value, max_tokens=self.max_completion_length)

    def _verify(
        self, batch: _Batch, prompts: list, completions: list, ids: list, responses: dict[int, Response]
    ) -> dict[int, Any]:
        """Score demonstrations with the run's reward functions; those of successes replace the rewards of their rows.

        Returns:
            The demonstrations by row, in the form in which TRL passes completions to reward functions.
        """
        texts: dict[int, Any] = {}
        for row, response in responses.items():
            text = self._tokenizer.decode(response.tokens, skip_special_tokens=True)
            chat = is_conversational({"prompt": prompts[row]})
            texts[row] = [{"role": "assistant", "content": text}] if chat else text
        most = max(gather_object([len(responses)]))
        if not most:
            return texts
        # TRL gathers the same number of rewards from each process, so a process with fewer demonstrations scores a
        # completion again.
        rows = [*responses, *[0] * (most - len(responses))]
        as_scored = [(texts[r], responses[r].tokens) if r in responses else (completions[r], ids[r]) for r in rows]
        logged, self._pending_extra_logs = self._pending_extra_logs, defaultdict(list)
        metrics, self._pending_metrics = self._pending_metrics, defaultdict(list)
        reward_DF = super()._calculate_rewards(
            [batch.inputs[row] for row in rows],
            [prompts[row] for row in rows],
            *map(list, zip(*as_scored, strict=True)),
        )
        process, first = self.accelerator.process_index, self._my_rows(len(prompts)).start
        placed = gather_object([(first + row, process * most + place) for place, row in enumerate(responses)])
        successful_D = self._scores(reward_DF) >= self._hapo.success_threshold
        for row, place in placed:
            if successful_D[place]:
                batch.reward_BF[row], batch.demonstration_B[row] = reward_DF[place], True
        for column, values in logged.items():
            for place, row in enumerate(responses):
                if batch.demonstration_B[first + row] and place < len(self._pending_extra_logs[column]):
                    values[row] = self._pending_extra_logs[column][place]
        self._pending_extra_logs, self._pending_metrics = logged, metrics
        return texts

    def _scores(self, reward_BF: Tensor) -> Tensor:
        """The weighted sum of the reward functions, (B,); NaN for a row that none of them has scored."""
        score_B = (reward_BF * self.reward_weights.to(reward_BF.device)).nansum(dim=1)
        return score_B.masked_fill(reward_BF.isnan().all(dim=1), math.nan)

    def _advantages(self, batch: _Batch) -> Tensor:
        """The advantages of all processes' rows, (B,)."""
        score_B = self._scores(batch.reward_BF)
        return scored_advantage(
            score_B,
            torch.arange(len(score_B), device=score_B.device) // self.num_generations,
            batch.demonstration_B,
            apart=self._hapo.advantage.statistics == "on_policy",
            scale_by_std=self.scale_rewards == "group",
        )

    def _my_rows(self, count: int) -> slice:
        start = self.accelerator.process_index * count
        return slice(start, start + count)

    # --- loss ---

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._policy_logp_BT = scored[0]
        return scored

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        demonstration_B = inputs.get(DEMONSTRATION)
        if demonstration_B is None or not demonstration_B.any():
            return super()._compute_loss(model, inputs)
        loss = super()._compute_loss(model, without(inputs, demonstration_B))
        policy_logp_BT, self._policy_logp_BT = self._policy_logp_BT, None
        part = demonstration_loss(policy_logp_BT, inputs, demonstration_B, self._hapo, aggregation(self, inputs))
        tokens = part.metrics.teacher_tokens.clamp(min=1)
        self._metrics["train"]["hapo/loss/demonstration"].append(part.metrics.teacher_loss.item())
        self._metrics["train"]["hapo/demonstration/probability"].append(
            (part.metrics.teacher_probability_sum / tokens).item()
        )
        return loss + part.loss

    # --- checkpoints ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            self._gate_state.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._gate_state.load(Path(os.fspath(checkpoint)))


def _source(row: dict[str, Any]) -> str:
    return str(row.get("data_source") or "unknown")


def _key(row: dict[str, Any]) -> int:
    """The `prompt_key` of a row, from its data source and its prompt's text."""
    return prompt_key(_source(row), "text", json.dumps(row["prompt"], default=str))
