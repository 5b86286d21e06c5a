"""TRL's GRPOConfig with a `hapo` block, whose keys, defaults and errors are those of `hapo_verl.config`.

One default differs from a verl run. TRL's groups have a fixed number of rows, so a demonstration always replaces the
worst completion (`injection.mode=replace`). The group's own completions are then compared with each other only
(`advantage.statistics=on_policy`), as they are in the mode `append` of a verl run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter, ne
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig  # pyright: ignore[reportAttributeAccessIssue]  takes this folder for it

from hapo_verl.config import ConfigError, HapoConfig, Rule, check_rules

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
        check_rules(_BLOCK_RULES, lambda key: attrgetter(key.removeprefix("hapo."))(hapo))
        check_rules(_GRPO_RULES, lambda key: getattr(self, key))
        if hapo.advantage.statistics is None:
            return dataclasses.replace(hapo, advantage=dataclasses.replace(hapo.advantage, statistics="on_policy"))
        return hapo


_GROUPS = "TRL's groups have a fixed number of rows."
_BLOCK_RULES: tuple[Rule, ...] = (
    (
        "hapo.injection.mode",
        lambda v: v != "replace",
        f"{_GROUPS} Use hapo.injection.mode=replace, here with hapo.advantage.statistics=on_policy.",
    ),
    (
        "hapo.demonstrations.source",
        lambda v: v != "column",
        "TRL's trainer keeps no successes of the policy. Use hapo.demonstrations.source=column, or verl's trainer.",
    ),
    (
        "hapo.rollouts.allocate",
        lambda v: v != "uniform",
        f"{_GROUPS} Use hapo.rollouts.allocate=uniform, or verl's trainer.",
    ),
    (
        "hapo.objective.name",
        lambda v: v != "surrogate",
        "TRL's loss is PPO's surrogate. Use hapo.objective.name=surrogate, or verl's trainer.",
    ),
    (
        "hapo.kernels.head",
        lambda v: v != "off",
        "TRL computes log-probabilities with a head of its own. Use hapo.kernels.head=off.",
    ),
    *(
        (f"hapo.{key}", partial(ne, getattr(HapoConfig(), key)), "a key of verl's trainer only. Remove it.")
        for key in UNREAD
    ),
)
_GRPO_RULES: tuple[Rule, ...] = (
    (
        "loss_type",
        lambda v: v not in LOSS_TYPES,
        "demonstrations need a loss of weighted tokens that does not depend on the micro-batch. "
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
