"""Group-relative advantages for batches with demonstrations.

    A_i = (r_i − mean) / (std + ε)      over the rows of the group after injection, std with N − 1, ε = 1e-6
    A_i =  r_i − mean                   without the division (Dr. GRPO, arXiv 2503.20783)

A group with a single row, or with all scores equal, gets exactly 0. Without an injected row this is GRPO
(arXiv 2402.03300).

When a demonstration was appended instead of replacing a rollout, the policy's own rows are compared with each other
only (`on`), and the demonstration is compared with them:

    A_i = (r_i − mean_on) / (std_on + ε),    A_demonstration = (r − mean_on) / (std_all + ε)

std_all is over all N + 1 rows, because std_on is 0 exactly when the demonstration is needed. After N = 8 failures
std_all is 1/3, so the demonstration gets A = 3 and the failures get exactly 0. This rule is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hapo_kernels.segment_norm import segment_norm, segment_stats

EPS = 1e-6


def group_advantage(score_B: Tensor, group_B: Tensor, *, scale_by_std: bool) -> Tensor:
    """Advantage of every row.

    Args:
        score_B: (B,) rewards; for a demonstration, the reward it got when it was verified.
        group_B: (B,) int64 id of each row's prompt, in any order.
        scale_by_std: `algorithm.norm_adv_by_std_in_grpo`.

    Returns:
        (B,) advantages in the scores' dtype.
    """
    return segment_norm(score_B, group_B, scale_by_std=scale_by_std)


def appended_advantage(score_B: Tensor, group_B: Tensor, demonstration_B: Tensor, *, scale_by_std: bool) -> Tensor:
    """Advantage of every row when demonstrations are extra rows beside all N rollouts.

    Args:
        score_B: (B,) rewards.
        group_B: (B,) int64 id of each row's prompt, in any order.
        demonstration_B: (B,) bool, True on appended rows. An appended row in a group without rollouts gets exactly 0.
        scale_by_std: `algorithm.norm_adv_by_std_in_grpo`.

    Returns:
        (B,) advantages. For the policy's own rows they equal, bit for bit, `group_advantage` of those rows alone.
    """
    on_B = ~demonstration_B
    advantage_B = torch.empty_like(score_B)
    advantage_B[on_B] = group_advantage(score_B[on_B], group_B[on_B], scale_by_std=scale_by_std)
    on = segment_stats(score_B, group_B, keep_B=on_B)
    gap_B = score_B - on.mean_B
    if scale_by_std:
        gap_B = gap_B / (segment_stats(score_B, group_B).std_B + EPS)
    # A demonstration without rollouts in its group (a padding row) has nothing to be compared with.
    gap_B = torch.where(on.count_B > 0, gap_B, 0.0)
    advantage_B[demonstration_B] = gap_B[demonstration_B]
    return advantage_B


def scored_advantage(
    score_B: Tensor, group_B: Tensor, demonstration_B: Tensor, *, apart: bool, scale_by_std: bool
) -> Tensor:
    """Advantages when some rows have no score: such a row gets exactly 0 and is left out of the statistics.

    Args:
        score_B: (B,) rewards, NaN for a row without a score.
        group_B: (B,) int64 id of each row's prompt.
        demonstration_B: (B,) bool, True on demonstrations.
        apart: whether the policy's own rows are compared with each other only, as in `appended_advantage`.
        scale_by_std: whether to divide by the standard deviation.
    """
    known_B, advantage_B = ~score_B.isnan(), torch.zeros_like(score_B)
    score, group, demonstration = score_B[known_B], group_B[known_B], demonstration_B[known_B]
    if apart:
        advantage_B[known_B] = appended_advantage(score, group, demonstration, scale_by_std=scale_by_std)
    else:
        advantage_B[known_B] = group_advantage(score, group, scale_by_std=scale_by_std)
    return advantage_B


def session_advantage(
    score_B: Tensor,
    group_B: Tensor,
    session_B: Tensor,
    output_B: Tensor,
    *,
    scale_by_std: bool,
    apart_B: Tensor | None = None,
) -> Tensor:
    """Advantages when a session (a multi-turn rollout) may consist of several rows.

    Only the last row of each session takes part in the statistics; the session's other rows get its advantage.

    Args:
        score_B: (B,) rewards.
        group_B: (B,) int64 id of each row's prompt.
        session_B: (B,) int64 id of each row's session, unique over the batch.
        output_B: (B,) int64 position of the row among its session's outputs.
        scale_by_std: `algorithm.norm_adv_by_std_in_grpo`.
        apart_B: (B,) bool, True on demonstrations that are treated as in `appended_advantage`. None: all rows of a
            group are compared with each other.

    Returns:
        (B,) advantages.
    """
    session_B = torch.unique(session_B, return_inverse=True)[1]
    sessions = int(session_B.max()) + 1 if session_B.numel() else 0
    last_S = torch.full((sessions,), -1, dtype=output_B.dtype).scatter_reduce(0, session_B, output_B, "amax")
    final_B = output_B == last_S[session_B]
    score_F, group_F = score_B[final_B], group_B[final_B]
    if apart_B is None:
        advantage_F = group_advantage(score_F, group_F, scale_by_std=scale_by_std)
    else:
        advantage_F = appended_advantage(score_F, group_F, apart_B[final_B], scale_by_std=scale_by_std)
    advantage_S = torch.zeros(sessions, dtype=score_B.dtype)
    advantage_S[session_B[final_B]] = advantage_F
    return advantage_S[session_B]
