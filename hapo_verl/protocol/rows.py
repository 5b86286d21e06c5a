"""The fields that HAPO adds to verl's batches: for each one its writer, readers and type. `FIELDS` lists them all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor


class Field(NamedTuple):
    """A field of this protocol.

    Attributes:
        key: its name in verl's batches.
        of: what it is attached to: a prompt, a row (a rollout or a demonstration), or a whole batch.
        writer: the folder of `hapo_verl` whose process writes it.
        readers: the folders of `hapo_verl` whose processes read it.
        type: type of one value.
        meaning: its meaning in one sentence.
    """

    key: str
    of: str
    writer: str
    readers: tuple[str, ...]
    type: str
    meaning: str


SITUATION = "hapo_situation"
ROLLOUTS = "__rollout_n__"
DEMONSTRATION = "hapo_demonstration"
GROUP = "hapo_group"
APPENDED = "hapo_appended"
OWN_SUCCESS = "hapo_own_success"
MINI_BATCH = "hapo_mini_batch"
SINGLE_UPDATE = "hapo_single_update"
OWN_OLD_LOG_PROBS = "hapo_own_old_log_probs"
TRACED = "hapo_traced"
LIKELIHOOD_WEIGHT = "hapo_likelihood_weight"
OBJECTIVE_LOSS = "hapo_objective_loss"

FIELDS = (
    Field(
        SITUATION,
        "prompt",
        "driver",
        ("rollout",),
        "mapping",
        "What the gate knows before it judges the group, and an earlier success of the policy.",
    ),
    Field(
        ROLLOUTS,
        "prompt",
        "driver",
        ("rollout",),
        "int",
        "verl's own: number of the prompt's rollouts, where it is not actor_rollout_ref.rollout.n.",
    ),
    Field(DEMONSTRATION, "row", "rollout", ("driver", "actor"), "() bool", "The row is a demonstration."),
    Field(
        GROUP, "row", "rollout", ("driver",), "mapping", "What the gate saw and did. All rows of a group hold the same."
    ),
    Field(
        APPENDED, "tag of a row", "rollout", ("driver",), "bool", "The row is an extra one beside the group's rollouts."
    ),
    Field(
        OWN_SUCCESS,
        "tag of a row",
        "rollout",
        ("driver",),
        "[int, int]",
        "Numbers of turns and of tools' answers, on a success that may be injected later.",
    ),
    Field(
        MINI_BATCH, "row", "driver", ("actor",), "(4,) int64", "Counts of the row's optimizer step, see `MiniBatch`."
    ),
    Field(
        SINGLE_UPDATE,
        "batch",
        "driver",
        ("actor",),
        "bool",
        "The step has one update, so the policy is the old policy.",
    ),
    Field(
        OWN_OLD_LOG_PROBS,
        "batch",
        "driver",
        ("actor",),
        "bool",
        "The rows have no old log-probs; the update uses its own.",
    ),
    Field(TRACED, "batch", "driver", ("actor",), "str", "Uids of the groups whose rows are traced, joined by commas."),
    Field(
        LIKELIHOOD_WEIGHT, "row", "actor", ("actor",), "() float", "The objective's weight W of the row in this update."
    ),
    Field(OBJECTIVE_LOSS, "batch", "actor", ("actor",), "float", "The objective's own loss in this update."),
)


class MiniBatch(NamedTuple):
    """Counts of the optimizer step that a row belongs to, over all ranks, including the rows left out of the update.

    Attributes:
        rows: number of rows, padding included; divisor of the `seq-mean-*` aggregations.
        tokens: number of tokens; divisor of `token-mean`.
        on_policy_tokens: number of these tokens that train and belong to the policy's own rows.
        groups: number of prompts with a token that trains.
    """

    rows: int
    tokens: int
    on_policy_tokens: int
    groups: int


def mini_batch(data: TensorDict) -> MiniBatch | None:
    """The `MiniBatch` of these rows, which must belong to one optimizer step; None if no rows are left out."""
    if MINI_BATCH not in data:
        return None
    counts = cast("torch.Tensor", data[MINI_BATCH])
    return MiniBatch(*counts.unbind()[0].tolist())


def demonstration_flags(data: TensorDict) -> Tensor:
    """Whether each row is a demonstration, (B,) bool.

    Raises:
        RuntimeError: if the field is absent. If a single row lacks a field, the field disappears from the whole batch;
            so the cause is a row from another agent loop than HAPO's.
    """
    if DEMONSTRATION not in data:
        raise RuntimeError(
            f"{DEMONSTRATION}: a row of the batch lacks this field, so it was not written by HAPO's agent loop. "
            "Set actor_rollout_ref.rollout.agent.agent_loop_manager_class="
            "hapo_verl.rollout.worker.HapoAgentLoopManager."
        )
    flags = cast("torch.Tensor", data[DEMONSTRATION])
    return torch.stack(flags.unbind()).reshape(len(data)).bool()


def plain_values(column: Iterable[Any]) -> list[Any]:
    """A field's rows as plain Python values; TransferQueue returns them as tensors, stacks or linked lists."""
    rows = (row if isinstance(row, torch.Tensor) else getattr(row, "data", row) for row in column)
    return [row.tolist() if hasattr(row, "tolist") else row for row in rows]
