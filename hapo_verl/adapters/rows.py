"""The two fields that every row of a HAPO run carries from the agent loop to the loss.

hapo_demonstration   () bool: the row is a demonstration
hapo_group           what the gate saw and did: the same mapping on every row of a group
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor

DEMONSTRATION = "hapo_demonstration"
GROUP = "hapo_group"


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
