"""TRL's GRPOConfig with a `hapo` block, whose keys, defaults and errors are those of `hapo_verl.config`.

One default differs from a verl run. TRL's groups have a fixed number of rows, so a demonstration always replaces the
worst completion (`injection.mode=replace`). The group's own completions are then compared with each other only
(`advantage.statistics=on_policy`), as they are in the mode `append` of a verl run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig  # pyright: ignore[reportAttributeAccessIssue]  takes this folder for it

from hapo_verl.config import ConfigError, HapoConfig

# Keys of the block that only verl's trainer uses.
UNREAD = (
    *("skip_idle_rows", "old_log_probs", "poll_interval", "watch_interval", "stall_report", "stall_limit"),
    *("reward_timeout", "trace_dir", "trace_groups", "trace_limit"),
)
# Losses of TRL that are a sum over tokens with weights that do not depend on the micro-batch.
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "cispo", "sapo")


@dataclass
class HapoGRPOConfig(GRPOConfig):
    """TRL's GRPOConfig with the `hapo:` block.

    Attributes:
        hapo: the block as nested mappings, or on a command line as a JSON string.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "hapo"]  # noqa: RUF012  as TRL writes it

    hapo: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Keys of HAPO, as documented under `hapo:` for verl."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parsed_hapo()

    def parsed_hapo(self) -> HapoConfig:
        """The checked block, with TRL's default for `advantage.statistics`.

        Raises:
            ConfigError: for the first key that is unknown, out of range, or not supported by this trainer.
        """
        block: Any = self.hapo or {}
        hapo = HapoConfig.parse(block)
        _check_block(hapo)
        _check_grpo(self)
        if hapo.advantage.statistics is None:
            return dataclasses.replace(hapo, advantage=dataclasses.replace(hapo.advantage, statistics="on_policy"))
        return hapo


def _check_block(hapo: HapoConfig) -> None:
    default = HapoConfig()
    if hapo.injection.mode != "replace":
        raise ConfigError(
            f"hapo.injection.mode={hapo.injection.mode}: TRL's groups have a fixed number of rows. "
            "Use hapo.injection.mode=replace, here with hapo.advantage.statistics=on_policy."
        )
    if hapo.demonstrations.source != "column":
        raise ConfigError(
            f"hapo.demonstrations.source={hapo.demonstrations.source}: TRL's trainer keeps no successes of the policy. "
            "Use hapo.demonstrations.source=column, or verl's trainer."
        )
    if hapo.rollouts.allocate != "uniform":
        raise ConfigError(
            f"hapo.rollouts.allocate={hapo.rollouts.allocate}: TRL's groups have a fixed number of rows. "
            "Use hapo.rollouts.allocate=uniform, or verl's trainer."
        )
    if hapo.objective.name != "surrogate":
        raise ConfigError(
            f"hapo.objective.name={hapo.objective.name}: TRL's loss is PPO's surrogate. "
            "Use hapo.objective.name=surrogate, or verl's trainer."
        )
    if hapo.kernels.head != "off":
        raise ConfigError(
            f"hapo.kernels.head={hapo.kernels.head}: TRL computes log-probabilities with a head of its own. "
            "Use hapo.kernels.head=off."
        )
    for key in UNREAD:
        if getattr(hapo, key) != getattr(default, key):
            raise ConfigError(f"hapo.{key}={getattr(hapo, key)}: a key of verl's trainer only. Remove it.")


# (key of GRPOConfig, predicate that is true for a wrong value, text with the rule and the fix)
_RULES = (
    (
        "loss_type",
        lambda v: v not in LOSS_TYPES,
        "a demonstration is weighed token by token, in a sum that no micro-batch changes. "
        f"Use one of {', '.join(LOSS_TYPES)}.",
    ),
    (
        "scale_rewards",
        lambda v: v not in ("group", "none"),
        "advantages are relative to the group. Use scale_rewards=group or none.",
    ),
    (
        "multi_objective_aggregation",
        lambda v: v != "sum_then_normalize",
        "the gate and the advantages need one score a completion. Use multi_objective_aggregation=sum_then_normalize.",
    ),
    (
        "remove_unused_columns",
        bool,
        "the demonstrations are a column of the data set. Use remove_unused_columns=False.",
    ),
)


def _check_grpo(args: GRPOConfig) -> None:
    for key, wrong, advice in _RULES:
        if wrong(getattr(args, key)):
            raise ConfigError(f"{key}={getattr(args, key)}: {advice}")


def check_trainer(trainer: Any, hapo: HapoConfig) -> None:
    """Raise `ConfigError` if a trainer has tools, data or other arguments that demonstrations do not support."""
    for name, used in (
        ("processing_class", not isinstance(trainer.processing_class, PreTrainedTokenizerBase)),
        ("tools", bool(trainer._standalone_tools)),
        ("environment_factory", trainer.environment_factories is not None),
        ("rollout_func", trainer.rollout_func is not None),
    ):
        if used:
            raise ConfigError(
                f"{name}: a demonstration is one turn of text here, without tools, environments or images. "
                "Use a tokenizer and TRL's own generation, or verl's trainer."
            )
    if any(getattr(trainer._tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
        raise ConfigError(
            "processing_class.response_template: a demonstration is scored as text, not as a parsed message. "
            "Set response_template and response_schema of the tokenizer to None."
        )
    columns, key = getattr(trainer.train_dataset, "column_names", None), hapo.demonstration_key
    if columns is not None and key not in columns and hapo.gate.name != "never":
        raise ConfigError(
            f"hapo.demonstration_key={key}: no such column in train_dataset ({', '.join(columns)}). "
            "Name the column with the worked solutions."
        )
    if columns is None and hapo.gate.name in ("posterior", "thompson"):
        raise ConfigError(
            f"hapo.gate.name={hapo.gate.name}: a stream has no list of its prompts to remember. "
            "Use hapo.gate.name=annealed, or a data set that is not a stream."
        )
