"""Group-relative normalisation: how much better is a row than the rows it was sampled with.

    Aᵢ = (rᵢ - mean_g) / (std_g + ε)      or      Aᵢ = rᵢ - mean_g,      g = group of row i

with std_g the unbiased deviation (N-1) of the rows of group g: GRPO, arXiv 2402.03300, equation 3, and without the
deviation Dr. GRPO, arXiv 2503.20783. Groups have any size and their rows lie anywhere. A group of one row, or of equal
scores, gets exactly 0: a mean that is off by one rounding, divided by an ε of 1e-6, would otherwise be an advantage
of .1 to .4 for nothing.

`segment_stats` gives the statistics themselves, for rules that take the mean from some rows and the deviation from
others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hapo_kernels.dispatch import Impl, use_triton
from hapo_kernels.segment_norm import reference
from hapo_kernels.segment_norm.reference import SegmentStats

__all__ = ["SegmentStats", "segment_ids", "segment_norm", "segment_stats"]


def segment_norm(
    score_B: Tensor,
    segment_B: Tensor,
    *,
    scale_by_std: bool,
    eps: float = 1e-6,
    keep_B: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Aᵢ = (rᵢ - mean) / (std + ε), or rᵢ - mean, within the group of row i.

    Args:
        score_B: scores, any floating dtype; half precision is computed and returned in fp32. No gradient flows.
        segment_B: int64 group of each row: any values, any order.
        scale_by_std: divide by (std + ε); False leaves rᵢ - mean.
        eps: added to the deviation, in units of the score.
        keep_B: rows that count in the statistics, default all. A row outside is normalised by its group's statistics
            and does not change them.

    Returns:
        advantage_B. Equal scores, and a group in which one row counts, give that group's counted rows exactly 0.
        A NaN or infinite score makes its own group NaN and no other.
    """
    stats = segment_stats(score_B, segment_B, keep_B=keep_B, impl=impl)
    return reference.normalise(score_B, stats, scale_by_std=scale_by_std, eps=eps)


def segment_stats(
    score_B: Tensor, segment_B: Tensor, *, keep_B: Tensor | None = None, impl: Impl = "auto"
) -> SegmentStats:
    """Mean, unbiased deviation and number of the kept rows of each row's group, given to every row of that group.

    With keep_B = on-policy rows, the teacher row of a group receives the on-policy mean without taking part in it:

        on, everyone = segment_stats(r, g, keep_B=~teacher), segment_stats(r, g)
        advantage = (r - on.mean_B) / (torch.where(teacher, everyone.std_B, on.std_B) + eps)

    Args and dtypes as for `segment_norm`.
    """
    _check(score_B, segment_B, keep_B)
    if use_triton(impl, score_B):
        raise NotImplementedError("segment_stats: impl='triton' is not built yet. Use impl='reference'.")
    return reference.segment_stats(score_B, segment_B, keep_B)


def segment_ids(label_B: Any) -> Tensor:
    """int64 ids, numbered in order of first appearance, of hashable labels such as verl's `uid` strings."""
    number_of: dict[Any, int] = {}
    return torch.tensor([number_of.setdefault(label, len(number_of)) for label in label_B], dtype=torch.int64)


def _check(score_B: Tensor, segment_B: Tensor, keep_B: Tensor | None) -> None:
    if score_B.ndim != 1 or not score_B.is_floating_point():
        raise ValueError(
            f"score_B: {score_B.dtype} of shape {tuple(score_B.shape)}: one floating-point score a row. "
            "Use reward_BT.sum(-1), or .float()."
        )
    if segment_B.shape != score_B.shape or segment_B.dtype != torch.int64:
        raise ValueError(
            f"segment_B: {segment_B.dtype} of shape {tuple(segment_B.shape)}: one int64 id for each of the "
            f"{score_B.shape[0]} rows. Use segment_ids(labels)."
        )
    if keep_B is not None and (keep_B.shape != score_B.shape or keep_B.dtype != torch.bool):
        raise ValueError(
            f"keep_B: {keep_B.dtype} of shape {tuple(keep_B.shape)}: one bool for each of the {score_B.shape[0]} rows. "
            "Use mask.bool()."
        )
