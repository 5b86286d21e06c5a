"""Group statistics in PyTorch, with one vectorised pass per group size.

Groups of equal size are gathered into a (G, N) matrix, with rows in their original order, and reduced along N. This is
the same reduction that `torch.mean` and `torch.std` run on a single group, so the bits are the same as in verl's loop
over the groups (`grpo`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentStats(NamedTuple):
    """Statistics of each row's group, over the group's kept rows."""

    mean_B: Tensor  # exactly the score if all kept scores are equal; 0 if no row is kept
    std_B: Tensor  # unbiased; exactly 0 if all kept scores are equal or fewer than two rows are kept
    count_B: Tensor  # int64, number of kept rows
    is_constant_B: Tensor  # bool, True if all kept scores are equal, so that all advantages are 0


@torch.no_grad()
def segment_stats(score_B: Tensor, segment_B: Tensor, keep_B: Tensor | None) -> SegmentStats:
    """See `hapo_kernels.segment_norm.segment_stats`."""
    score_B = score_B if score_B.dtype == torch.float64 else score_B.float()
    group_of_B = torch.unique(segment_B, return_inverse=True)[1]
    groups = int(group_of_B.max()) + 1 if len(group_of_B) else 0
    kept_row = torch.arange(len(score_B), device=score_B.device) if keep_B is None else keep_B.nonzero()[:, 0]

    # A stable sort keeps the rows of a group in their original order, on which the bits of a sum depend.
    row_by_group = kept_row[torch.sort(group_of_B[kept_row], stable=True)[1]]
    count_G = torch.bincount(group_of_B[kept_row], minlength=groups)
    start_G = count_G.cumsum(0) - count_G

    mean_G, std_G = score_B.new_zeros(groups), score_B.new_zeros(groups)
    constant_G = torch.ones(groups, dtype=torch.bool, device=score_B.device)
    for size in count_G.unique().tolist():
        if size == 0:
            continue
        group = (count_G == size).nonzero()[:, 0]
        member_GN = start_G[group, None] + torch.arange(size, device=score_B.device)
        score_GN = score_B[row_by_group[member_GN]]
        constant = (score_GN == score_GN[:, :1]).all(1)
        constant_G[group] = constant
        mean_G[group] = torch.where(constant, score_GN[:, 0], score_GN.mean(1))
        if size > 1:
            std_G[group] = score_GN.std(1).masked_fill(constant, 0.0)
    return SegmentStats(mean_G[group_of_B], std_G[group_of_B], count_G[group_of_B], constant_G[group_of_B])


@torch.no_grad()
def normalise(score_B: Tensor, stats: SegmentStats, *, scale_by_std: bool, eps: float) -> Tensor:
    """(r - mean) / (std + ε), or r - mean."""
    centred_B = score_B.to(stats.mean_B.dtype) - stats.mean_B
    return centred_B / (stats.std_B + eps) if scale_by_std else centred_B


@torch.no_grad()
def spread(value_B: Tensor, mask_T: Tensor, token_offset_B1: Tensor) -> Tensor:
    """Each row's value on its tokens, 0 where the mask is 0."""
    value_T = torch.repeat_interleave(value_B, token_offset_B1.diff(), output_size=mask_T.shape[0])
    return value_T.masked_fill(mask_T == 0, 0.0)
