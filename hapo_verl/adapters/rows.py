"""The fields by which HAPO's parts know each other's work.

hapo_situation           of a prompt, from the trainer to the agent loop: what the gate is to judge its group by
hapo_demonstration       of a row, from the agent loop to the loss: () bool, it is a demonstration
hapo_group               of a row, to the trainer: what the gate saw and did, the same mapping on every row of a group
hapo_appended            tag of a row, to the trainer: it is one row more than the group has rollouts
hapo_likelihood_weight   of a row, from the engine to the loss: W of the objective in this optimizer step
hapo_objective_loss      of a batch, from the engine to the loss: the objective's own loss in this optimizer step
hapo_single_update       of a batch, from the trainer to the engine: the step's only update, so that π is π_old
hapo_own_old_log_probs   of a batch, from the trainer to the loss: no row has old log-probs, they are the update's
hapo_traced              of a batch, from the trainer to the loss: uids of the groups whose rows are traced
hapo_mini_batch          of a row, from the trainer to the loss: (4,) int64, `MiniBatch`
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor

DEMONSTRATION = "hapo_demonstration"
GROUP = "hapo_group"
SITUATION = "hapo_situation"
APPENDED = "hapo_appended"
LIKELIHOOD_WEIGHT = "hapo_likelihood_weight"
OBJECTIVE_LOSS = "hapo_objective_loss"
SINGLE_UPDATE = "hapo_single_update"
OWN_OLD_LOG_PROBS = "hapo_own_old_log_probs"
MINI_BATCH = "hapo_mini_batch"
TRACED = "hapo_traced"


class MiniBatch(NamedTuple):
    """The optimizer step that a row belongs to, over all ranks and with the rows that are left out of it.

    Attributes:
        rows: what the `seq-mean-*` aggregations divide by, padding included.
        tokens: what `token-mean` divides by.
        on_policy_tokens: of them those that train and are not a demonstration's.
        groups: prompts with a token that trains.
    """

    rows: int
    tokens: int
    on_policy_tokens: int
    groups: int


def mini_batch(data: TensorDict) -> MiniBatch | None:
    """That of these rows, which are one's; None where nothing is left out."""
    if MINI_BATCH not in data:
        return None
    counts = cast("torch.Tensor", data[MINI_BATCH])
    return MiniBatch(*counts.unbind()[0].tolist())


def demonstration_flags(data: TensorDict) -> Tensor:
    """(B,) bool: which rows are demonstrations.

    Raises:
        RuntimeError: when the field is absent. A field that one row of a batch lacks disappears for all of them, so
            this is what a row from another agent loop looks like.
    """
    if DEMONSTRATION not in data:
        raise RuntimeError(
            f"{DEMONSTRATION}: a row of the batch lacks this field, so it was not written by HAPO's agent loop. "
            "Set actor_rollout_ref.rollout.agent.agent_loop_manager_class="
            "hapo_verl.adapters.rollout.HapoAgentLoopManager."
        )
    flags = cast("torch.Tensor", data[DEMONSTRATION])
    return torch.stack(flags.unbind()).reshape(len(data)).bool()


def plain_values(column: Iterable[Any]) -> list[Any]:
    """A field's rows as plain Python values: TransferQueue hands them out as tensors, stacks or linked lists."""
    rows = (row if isinstance(row, torch.Tensor) else getattr(row, "data", row) for row in column)
    return [row.tolist() if hasattr(row, "tolist") else row for row in rows]
