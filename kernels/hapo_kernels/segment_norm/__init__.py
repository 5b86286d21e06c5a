"""Group-relative normalisation: how much better a row's score is than the scores of its group.

    Aᵢ = (rᵢ - mean_g) / (std_g + ε)      or      Aᵢ = rᵢ - mean_g,      g = group of row i

with std_g the unbiased standard deviation (N-1) of the rows of group g: GRPO, arXiv 2402.03300, equation 3, and without
the deviation Dr. GRPO, arXiv 2503.20783. Groups may have any size, and their rows may be in any order. A group of one
row, or of equal scores, gets exactly 0. Otherwise one rounding error in the mean, divided by an ε of 1e-6, would give a
wrong advantage of .1 to .4.

`segment_norm_tokens` writes each row's advantage to its tokens, for rows of any length without padding.
`segment_stats` gives the statistics themselves, for rules that use different rows for the mean and the deviation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hapo_kernels.dispatch import Impl, debug, use_triton
from hapo_kernels.segment_norm import reference
from hapo_kernels.segment_norm.reference import SegmentStats

__all__ = ["SegmentStats", "segment_ids", "segment_norm", "segment_norm_tokens", "segment_stats"]


def segment_norm(
    score_B: Tensor,
    segment_B: Tensor | None = None,
    *,
    scale_by_std: bool,
    eps: float = 1e-6,
    keep_B: Tensor | None = None,
    offset_S1: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Aᵢ = (rᵢ - mean) / (std + ε), or rᵢ - mean, within the group of row i.

    Args:
        score_B: scores, any floating dtype; half precision is computed and returned in fp32. No gradient flows.
        segment_B: int64 group id of each row: any values, any order.
        scale_by_std: divide by (std + ε); False leaves rᵢ - mean.
        eps: added to the deviation, in units of the score.
        keep_B: bool, rows that count in the statistics, default all. Another row is normalised by its group's
            statistics and does not change them. With segment_B only.
        offset_S1: instead of segment_B, bounds of contiguous groups: rows offset[s] to offset[s+1] are group s. Groups
            may be empty. The first is 0, the last B, none smaller than the one before: HAPO_KERNELS_DEBUG=1 checks.

    Returns:
        advantage_B. If the counted rows of a group have equal scores, or there is only one, they get exactly 0.
        A NaN or infinite score makes its own group NaN and no other.

    The reference gives the same bits as verl's `grpo` in fp32. The kernel agrees within rounding: it sums in another
    order, and after subtracting the group's first score, which is more exact for scores with a large common offset.
    """
    _check(score_B, segment_B, keep_B, offset_S1)
    if use_triton(impl, score_B):
        from hapo_kernels.segment_norm import kernel  # not before it is needed: Triton may be absent on a CPU

        return kernel.segment_norm(score_B, segment_B, keep_B, offset_S1, scale_by_std=scale_by_std, eps=eps)
    stats = reference.segment_stats(score_B, _ids(score_B, segment_B, offset_S1), keep_B)
    return reference.normalise(score_B, stats, scale_by_std=scale_by_std, eps=eps)


def segment_norm_tokens(
    score_B: Tensor,
    segment_B: Tensor | None = None,
    *,
    mask_T: Tensor,
    token_offset_B1: Tensor,
    scale_by_std: bool,
    eps: float = 1e-6,
    keep_B: Tensor | None = None,
    offset_S1: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`segment_norm` with the result written to the tokens of a jagged batch, without a padded (B, T) tensor.

    Args:
        mask_T: mask of all rows' tokens, one row after the other; where it is 0 the result is exactly 0, even if the
            row's advantage is NaN.
        token_offset_B1: bounds of the rows: tokens offset[i] to offset[i+1] are row i. Rows may be empty. The first is
            0, the last T, none smaller than the one before: HAPO_KERNELS_DEBUG=1 checks.
        score_B ... offset_S1: as for `segment_norm`.

    Returns:
        advantage_T.
    """
    _check(score_B, segment_B, keep_B, offset_S1)
    _check_tokens(score_B, mask_T, token_offset_B1)
    given = {"scale_by_std": scale_by_std, "eps": eps}
    if use_triton(impl, score_B):
        from hapo_kernels.segment_norm import kernel

        advantage_B = kernel.segment_norm(score_B, segment_B, keep_B, offset_S1, **given)
        return kernel.spread(advantage_B, mask_T, token_offset_B1)
    stats = reference.segment_stats(score_B, _ids(score_B, segment_B, offset_S1), keep_B)
    return reference.spread(reference.normalise(score_B, stats, **given), mask_T, token_offset_B1)


def segment_stats(
    score_B: Tensor,
    segment_B: Tensor | None = None,
    *,
    keep_B: Tensor | None = None,
    offset_S1: Tensor | None = None,
    impl: Impl = "auto",
) -> SegmentStats:
    """Mean, unbiased deviation and number of the kept rows of a group, given to every row of that group.

    With keep_B = on-policy rows, the teacher row of a group gets the on-policy mean without taking part in it:

        on, everyone = segment_stats(r, g, keep_B=~teacher), segment_stats(r, g)
        advantage = (r - on.mean_B) / (torch.where(teacher, everyone.std_B, on.std_B) + eps)

    Arguments and dtypes are those of `segment_norm`.
    """
    _check(score_B, segment_B, keep_B, offset_S1)
    if use_triton(impl, score_B):
        from hapo_kernels.segment_norm import kernel

        return kernel.segment_stats(score_B, segment_B, keep_B, offset_S1)
    return reference.segment_stats(score_B, _ids(score_B, segment_B, offset_S1), keep_B)


def segment_ids(label_B: Any) -> Tensor:
    """int64 ids for hashable labels such as verl's `uid` strings, numbered in the order of first appearance."""
    number_of: dict[Any, int] = {}
    return torch.tensor([number_of.setdefault(label, len(number_of)) for label in label_B], dtype=torch.int64)


def _ids(score_B: Tensor, segment_B: Tensor | None, offset_S1: Tensor | None) -> Tensor:
    if offset_S1 is None:
        assert segment_B is not None
        return segment_B
    return torch.repeat_interleave(offset_S1.diff(), output_size=score_B.shape[0])


def _check(score_B: Tensor, segment_B: Tensor | None, keep_B: Tensor | None, offset_S1: Tensor | None) -> None:
    rows = tuple(score_B.shape)
    if score_B.ndim != 1 or not score_B.is_floating_point():
        raise ValueError(
            f"score_B: {score_B.dtype} of shape {rows}: one floating-point score a row. "
            "Use reward_BT.sum(-1), or .float()."
        )
    if (segment_B is None) == (offset_S1 is None):
        raise ValueError("segment_B and offset_S1: groups are given once. Pass ids a row, or bounds, not both.")
    if segment_B is not None and (segment_B.shape != score_B.shape or segment_B.dtype != torch.int64):
        raise ValueError(
            f"segment_B: {segment_B.dtype} of shape {tuple(segment_B.shape)}: one int64 id for each of the "
            f"{rows[0]} rows. Use segment_ids(labels)."
        )
    if keep_B is not None and (keep_B.shape != score_B.shape or keep_B.dtype != torch.bool):
        raise ValueError(
            f"keep_B: {keep_B.dtype} of shape {tuple(keep_B.shape)}: one bool for each of the {rows[0]} rows. "
            "Use mask.bool()."
        )
    if offset_S1 is None:
        return
    if offset_S1.ndim != 1 or len(offset_S1) == 0 or offset_S1.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offset_S1: {offset_S1.dtype} of shape {tuple(offset_S1.shape)}: S+1 integer bounds of S groups. "
            "Use an int64 tensor that starts with 0."
        )
    if keep_B is not None:
        raise ValueError(
            "keep_B with offset_S1: rows that do not count are sorted behind the others, by id. Pass segment_B."
        )
    if debug() and (offset_S1[0] != 0 or offset_S1[-1] != rows[0] or (offset_S1.diff() < 0).any()):
        raise ValueError(
            f"offset_S1={offset_S1.tolist()}: bounds rise from 0 to the number of rows, {rows[0]}. "
            "Use cumsum of the sizes."
        )


def _check_tokens(score_B: Tensor, mask_T: Tensor, token_offset_B1: Tensor) -> None:
    rows = score_B.shape[0]
    if mask_T.ndim != 1:
        raise ValueError(
            f"mask_T of shape {tuple(mask_T.shape)}: the tokens of all rows, one after the other. "
            "Use mask.values() of a jagged mask."
        )
    if token_offset_B1.shape != (rows + 1,) or token_offset_B1.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"token_offset_B1: {token_offset_B1.dtype} of shape {tuple(token_offset_B1.shape)}: integer bounds of "
            f"{rows} rows. Use mask.offsets() of a jagged mask."
        )
    bounds = token_offset_B1
    if debug() and (bounds[0] != 0 or bounds[-1] != len(mask_T) or (bounds.diff() < 0).any()):
        raise ValueError(
            f"token_offset_B1={bounds.tolist()}: bounds rise from 0 to the number of tokens, {len(mask_T)}. "
            "Use cumsum of the rows' lengths."
        )
