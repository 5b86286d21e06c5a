"""Advantages relative to the group, demonstrations included.

    A_i = (r_i − mean) / (std + ε)      over the rows of the group after injection, std with N − 1, ε = 1e-6
    A_i =  r_i − mean                   without the division (Dr. GRPO, arXiv 2503.20783)

A group of one row, or with equal scores, gets exactly 0. With no injected row this is GRPO (arXiv 2402.03300).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hapo_kernels.segment_norm import segment_norm


def group_advantage(score_B: Tensor, group_B: Tensor, *, scale_by_std: bool) -> Tensor:
    """Advantage of every row.

    Args:
        score_B: (B,) rewards; of a demonstration the reward that verified it.
        group_B: (B,) int64 id of each row's prompt, in any order.
        scale_by_std: `algorithm.norm_adv_by_std_in_grpo`.

    Returns:
        (B,) advantages in the scores' dtype.
    """
    return segment_norm(score_B, group_B, scale_by_std=scale_by_std)


def session_advantage(
    score_B: Tensor, group_B: Tensor, session_B: Tensor, output_B: Tensor, *, scale_by_std: bool
) -> Tensor:
    """`group_advantage` where a session may have written several outputs: the last one counts, the others inherit.

    Args:
        score_B: (B,) rewards.
        group_B: (B,) int64 id of each row's prompt.
        session_B: (B,) int64 id of each row's session, unique over the batch.
        output_B: (B,) int64 position of the row among its session's outputs.
        scale_by_std: `algorithm.norm_adv_by_std_in_grpo`.

    Returns:
        (B,) advantages.
    """
    session_B = torch.unique(session_B, return_inverse=True)[1]
    sessions = int(session_B.max()) + 1 if session_B.numel() else 0
    last_S = torch.full((sessions,), -1, dtype=output_B.dtype).scatter_reduce(0, session_B, output_B, "amax")
    final_B = output_B == last_S[session_B]
    advantage_S = torch.zeros(sessions, dtype=score_B.dtype)
    advantage_S[session_B[final_B]] = group_advantage(score_B[final_B], group_B[final_B], scale_by_std=scale_by_std)
    return advantage_S[session_B]
