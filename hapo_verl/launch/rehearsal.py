"""Checks of a launch from its configuration, files and tokenizer, so that its errors are found before it is queued.

Nothing is started. Only the last check loads the model, and it can be left out. Each check is one line of
`python -m hapo_verl.doctor`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hapo_verl.algo.demonstration import Refusal, Response
from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.launch.checks import check_demonstrations, check_launch
from hapo_verl.launch.files import check_columns, check_files, local_files
from hapo_verl.launch.head_memory import (
    GIB,
    linear_logprob_bytes,
    policy_head_bytes,
    rows_of_launch,
    verl_head_bytes,
)
from hapo_verl.launch.sizes import check_sizes, tokens_at_a_time
from hapo_verl.launch.teachable import (
    Asked,
    does_not_fit,
    least_likely,
    score,
    untaught,
)
from hapo_verl.launch.weight_bucket import check_bucket
from hapo_verl.protocol.shape import judged_shape, untaught_below
from hapo_verl.rollout.reward import success_of
from hapo_verl.rollout.tokens import ChatFormat

LOOKED_AT, SCORED, ASKED = 256, 10, 32
# Seconds for scoring demonstrations with the model.
ASKED_FOR = 60.0
_NO_COLUMN = "not looked at: hapo.demonstrations.source=own takes what the policy itself will have written"


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a launch with these overrides."""
    import verl  # noqa: F401
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


class Rehearsal:
    """The checks of a launch that is not started.

    What several checks need is made once, by the first of them. If it cannot be made, each of these checks fails.
    """

    def __init__(self, overrides: Sequence[str], *, model: bool = True) -> None:
        """Prepare the checks.

        Args:
            overrides: the launch's overrides, as on verl's command line.
            model: whether to load the model for the last check.
        """
        self._overrides, self._with_model = overrides, model

    def checks(self) -> list[tuple[str, Callable[[], str]]]:
        """The names and checks, in order; a check returns what it found, or raises an error if that is wrong."""
        return [
            ("launch", self.launch),
            ("sizes", self.sizes),
            ("columns", self.columns),
            ("weights", self.weights),
            ("demonstrations", self.demonstrations),
            ("reward function", self.reward),
            ("model", self.model),
            ("memory of the head", self.memory),
            *([("what the loss can teach", self.teachable)] if self._with_model else []),
        ]

    @cached_property
    def config(self) -> DictConfig:
        return composed(self._overrides)

    @cached_property
    def hapo(self) -> HapoConfig:
        return check_launch(self.config)

    @cached_property
    def rows(self) -> Any:
        import datasets

        return datasets.Dataset.from_parquet([str(file) for file in local_files(self.config, "train_files")])

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.config.actor_rollout_ref.model.path)

    @cached_property
    def chat(self) -> ChatFormat:
        return ChatFormat.of_launch(self.config, self.tokenizer)

    @cached_property
    def injectable(self) -> tuple[list[tuple[int, Response]], Counter[str]]:
        """The injectable demonstrations in a sample of rows (row number, response), and counts of others' reasons."""
        limit, found, reasons = int(self.config.data.max_response_length), [], Counter()
        for number in range(0, len(self.rows), max(1, len(self.rows) // LOOKED_AT)):
            row = self.rows[number]
            response = self.chat.demonstration(row[self.hapo.demonstration_key], row, max_tokens=limit)
            if isinstance(response, Refusal):
                reasons[response.reason] += 1
            else:
                found.append((number, response))
        return found, reasons

    def launch(self) -> str:
        gate = self.hapo.gate
        keys = ", ".join(f"{name} {value}" for name, value in vars(gate).items() if name != "name")
        return f"gate {gate.name}{' with ' + keys if keys else ''}; {self.hapo.injection.mode}"

    def sizes(self) -> str:
        return check_sizes(self.config)

    def columns(self) -> str:
        """Check the columns of the data files."""
        return check_columns(self.config, self.hapo)

    def demonstrations(self) -> str:
        rows = self.rows  # A missing file is named first, whatever else is wrong.
        if not self.hapo.demonstrations.needs_column:
            return _NO_COLUMN
        check_demonstrations(rows, self.tokenizer, self.config, self.hapo, sample=LOOKED_AT)
        found, reasons = self.injectable
        looked_at = len(found) + reasons.total()
        others = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common() if reason != "overlong")
        longest = max(len(response.tokens) for _, response in found)
        return (
            f"{len(found)} of {looked_at} looked at can be injected, {reasons['overlong'] / looked_at:.1%} do not fit "
            f"data.max_response_length={self.config.data.max_response_length} (longest that fits: {longest} tokens)"
            f"{'; ' + others if others else ''}; {len(rows)} rows"
        )

    def reward(self) -> str:
        """Score the first injectable demonstrations with the run's own reward function, decoded as in the run."""
        if not self.hapo.demonstrations.needs_column:
            return _NO_COLUMN
        succeeds = success_of(self.config, self.hapo.success_threshold)
        tried = self.injectable[0][:SCORED]

        def scored() -> list[bool]:
            texts = (self.tokenizer.decode(response.tokens, skip_special_tokens=True) for _, response in tried)
            return [
                succeeds(self.rows[number], text, response.num_turns)
                for (number, response), text in zip(tried, texts, strict=True)
            ]

        first, second = scored(), scored()
        successes, unsteady = sum(first), sum(a != b for a, b in zip(first, second, strict=True))
        path = OmegaConf.select(self.config, "reward.custom_reward_function.path")
        if unsteady:
            raise ConfigError(
                f"reward.custom_reward_function.path={path}: {unsteady} of {len(tried)} demonstrations are a success "
                "in one call and none in the next. Make it reproducible."
            )
        if not successes:
            raise ConfigError(
                f"reward.custom_reward_function.path={path}: none of {len(tried)} demonstrations is a success, so none "
                "would be injected. Use the reward function that these data were verified with."
            )
        return f"{successes} of {len(tried)} demonstrations are successes"

    def model(self) -> str:
        """Check that prompts and responses fit the model's maximum length."""
        positions, data = self._hf_config.max_position_embeddings, self.config.data
        longest = data.max_prompt_length + data.max_response_length
        longest = max(longest, self.config.actor_rollout_ref.rollout.max_model_len or longest)
        if longest > positions:
            path = self.config.actor_rollout_ref.model.path
            raise ConfigError(
                f"actor_rollout_ref.model.path={path}: it has {positions} positions and the launch asks for {longest}. "
                "Use a model with more of them, or shorter prompts and responses."
            )
        return f"{self._hf_config.model_type} with {positions} positions, {longest} asked for"

    def weights(self) -> str:
        """Check the bucket by which an update sends the weights to the rollout engine."""
        check_files(self.config, self.hapo)
        return check_bucket(self.config)

    def memory(self) -> str:
        """Estimate the head's memory (`head_memory`); fails if it alone exceeds the memory of a GPU of this machine."""
        import torch

        tokens, text = tokens_at_a_time(self.config), self._hf_config.get_text_config()
        sizes = (tokens, text.hidden_size, text.vocab_size)
        rows = rows_of_launch(self.hapo, text.hidden_size, text.vocab_size)
        estimates = {
            "off": verl_head_bytes(*sizes, temperature=self.config.actor_rollout_ref.rollout.temperature),
            "linear_logprob": linear_logprob_bytes(*sizes, rows=rows),
            "policy_head": policy_head_bytes(*sizes, rows=rows),
        }
        chosen = self.hapo.kernels.head
        detail = ", ".join(f"{head} {size / GIB:.2f} GiB" for head, size in estimates.items())
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            if estimates[chosen] > total:
                raise ConfigError(
                    f"hapo.kernels.head={chosen}: at {tokens} tokens a rank {detail}, and the GPU has "
                    f"{total / GIB:.2f} GiB. Use hapo.kernels.head=policy_head, or fewer tokens at a time."
                )
        return f"{chosen} is chosen; at {tokens} tokens a rank, estimated: {detail}"

    def teachable(self) -> str:
        """Score demonstrations with the model, and count those with a token that the launch's loss cannot teach."""
        import torch

        model = self.config.actor_rollout_ref.model
        path, place = Path(model.path), f"actor_rollout_ref.model.path={model.path}"
        if not path.is_dir():
            return f"not looked at: {place} is no folder on this machine"
        if self.hapo.gate.name == "never":
            return "not looked at: hapo.gate.name=never trains on no demonstration"
        if not self.hapo.demonstrations.needs_column:
            return _NO_COLUMN
        if reason := does_not_fit(path):
            return f"not looked at: {place} has {reason}"
        injectable, _ = self.injectable
        if not injectable:
            return "not looked at: no demonstration can be injected"
        chosen = injectable[:: max(1, len(injectable) // ASKED)][:ASKED]
        scored = score(
            path,
            [Asked(self._prompt(number), response.tokens, response.mask) for number, response in chosen],
            temperature=self.config.actor_rollout_ref.rollout.temperature,
            seconds=ASKED_FOR,
            trust_remote_code=bool(OmegaConf.select(self.config, "actor_rollout_ref.model.trust_remote_code")),
        )
        below, (logp, token), shape = untaught_below(self.hapo), least_likely(scored), judged_shape(self.hapo)
        count = untaught(scored, below)
        reach = f"down to a probability of {math.exp(below):.1e}" if math.isfinite(below) else "however improbable"
        found = (
            f"the least likely token of a demonstration (median: {self.tokenizer.decode([token])!r}) has "
            f"{math.exp(logp):.1e} and {shape.weight(torch.tensor(logp)).item() / shape.largest_weight:.0%} of the "
            "largest weight"
        )
        if not count:
            return f"every token of {len(scored)} demonstrations; the loss teaches tokens {reach}, {found}"
        loss = self.hapo.loss
        keys = "hapo.loss.exponent=0.0 hapo.loss.shaping=1.0"
        if loss.shape != "power":
            keys = f"hapo.loss.shape=power {keys}"
        return (
            f"{count} of {len(scored)} demonstrations ({count / len(scored):.0%}) have a token that the loss does not "
            f"teach, and may never be written: hapo.loss.shape={loss.shape} with exponent {loss.exponent} and shaping "
            f"{loss.shaping} teaches tokens {reach}, {found}. Use {keys}, which teaches every token."
        )

    def _prompt(self, number: int) -> list[int]:
        """The token ids of a row's prompt, as in the run."""
        row, kwargs = self.rows[number], dict(OmegaConf.select(self.config, "data.apply_chat_template_kwargs") or {})
        if self.chat.tool_loop and (conversation := self.chat.tool_loop.conversation(row)):
            kwargs["tools"] = conversation.schemas
        text = self.tokenizer.apply_chat_template(
            row[self.config.data.prompt_key], tokenize=False, add_generation_prompt=True, **kwargs
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def _hf_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.config.actor_rollout_ref.model.path)
