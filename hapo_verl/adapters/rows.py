"""The fields by which HAPO's parts know each other's work.

hapo_situation           of a prompt, from the trainer to the agent loop: what the gate is to judge its group by
hapo_demonstration       of a row, from the agent loop to the loss: () bool, it is a demonstration
hapo_group               of a row, to the trainer: what the gate saw and did, the same mapping on every row of a group
hapo_appended            tag of a row, to the trainer: it is one row more than the group has rollouts
hapo_likelihood_weight   of a row, from the engine to the loss: W of the objective in this optimizer step
hapo_objective_loss      of a batch, from the engine to the loss: the objective's own loss in this optimizer step
hapo_single_update       of a batch, from the trainer to the engine: the step's only update, so that π is π_old
hapo_rows_left_out       of a batch, from the trainer to loss and engine: only its rows with a gradient are there, and
hapo_optimizer_step      of a row of it, from the trainer to loss and engine: (3,) int64, how many tokens that train,
                         rows and groups its optimizer step has, those left out among them
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

DEMONSTRATION = "hapo_demonstration"
GROUP = "hapo_group"
SITUATION = "hapo_situation"
APPENDED = "hapo_appended"
LIKELIHOOD_WEIGHT = "hapo_likelihood_weight"
OBJECTIVE_LOSS = "hapo_objective_loss"
SINGLE_UPDATE = "hapo_single_update"
ROWS_LEFT_OUT = "hapo_rows_left_out"
OPTIMIZER_STEP = "hapo_optimizer_step"


class OptimizerStep(NamedTuple):
    """What an optimizer step has, its rows without a gradient among them: what losses are divided by."""

    tokens: int  # that train
    rows: int  # padding among them
    groups: int  # with a token that trains


def whole_step(data: TensorDict) -> OptimizerStep | None:
    """The optimizer step that rows were left out of; None where none was, and verl counts right.

    Args:
        data: rows of one optimizer step.
    """
    if not tu.get_non_tensor_data(data=data, key=ROWS_LEFT_OUT, default=False):
        return None
    counts: Any = data[OPTIMIZER_STEP]
    # TransferQueue hands out rows of one size as jagged ones.
    counts = counts.values() if counts.is_nested else counts
    return OptimizerStep(*counts.flatten()[:3].tolist())


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
