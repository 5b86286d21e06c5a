"""Group statistics and normalisation over segments, contiguous or gathered, in one Triton launch.

A segment is divided into CHUNKs, counted from its own start. Each chunk gives (n, mean, Σ(x - mean)²), and chunks are
merged in order (Chan, Golub, LeVeque 1979). All of this is computed on x - x₀, with x₀ the segment's first score, so
that a common offset of 1e6 costs no precision. The result of a segment depends only on its own scores in their order.

Usually one program per segment computes statistics and output (`segment_kernel`). If segments are long and few, the
same arithmetic runs in three launches with chunks in parallel (`chunk_kernel`, `merge_kernel`, `write_kernel`), and
gives the same bits. Neither uses atomic operations.
"""

# Triton passes ints and bools for constexpr parameters and adds num_warps to every launch; pyright knows neither.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hapo_kernels.launch import launch_of
from hapo_kernels.segment_norm.reference import SegmentStats

# With more chunks per segment on average than this, chunks run in parallel; the bits are the same either way.
SPLIT_ABOVE = 16


@triton.jit
def load_scores(score_ptr, row_ptr, o, m, GATHER: tl.constexpr):
    if GATHER:
        o = tl.load(row_ptr + o, mask=m, other=0)
    return tl.load(score_ptr + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def chunk_moments(score_ptr, row_ptr, first, i, kept_end, GATHER: tl.constexpr, CHUNK: tl.constexpr):
    """(n, mean, Σ(d - mean)², number of rows unequal to the first) of d = x - first over rows i .. i+CHUNK."""
    o = i + tl.arange(0, CHUNK)
    m = o < kept_end
    x = load_scores(score_ptr, row_ptr, o, m, GATHER)
    d = tl.where(m, x - first, 0.0)
    n = tl.minimum(kept_end - i, CHUNK).to(tl.float32)
    mean = tl.sum(d) / n
    residual = tl.where(m, d - mean, 0.0)
    return n, mean, tl.sum(residual * residual), tl.sum((m & (x != first)).to(tl.float32))


@triton.jit
def merge(n, mean, square, differ, n_2, mean_2, square_2, differ_2):
    total = n + n_2
    step = mean_2 - mean
    return total, mean + step * (n_2 / total), square + square_2 + step * step * (n * n_2 / total), differ + differ_2


@triton.jit
def finish(n, mean, square, differ):
    """Mean and unbiased deviation of d; both are exactly 0 for a constant or empty segment."""
    std = tl.where(n > 1, tl.sqrt(square / tl.maximum(n - 1.0, 1.0)), 0.0)
    return tl.where(differ > 0, mean, 0.0), tl.where(differ > 0, std, 0.0)


@triton.jit
def write_chunk(
    score_ptr, row_ptr, out_ptr, first, mean, std, eps, i, end,
    GATHER: tl.constexpr, BY_STD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    o = i + tl.arange(0, CHUNK)
    m = o < end
    centred = load_scores(score_ptr, row_ptr, o, m, GATHER) - first - mean
    if BY_STD:
        centred = centred / (std + eps)
    if GATHER:
        o = tl.load(row_ptr + o, mask=m, other=0)
    tl.store(out_ptr + o, centred, mask=m)


@triton.jit
def write_stats(mean_ptr, std_ptr, constant_ptr, i_segment, first, mean, std, differ):
    tl.store(mean_ptr + i_segment, first + mean)
    tl.store(std_ptr + i_segment, std)
    tl.store(constant_ptr + i_segment, (differ == 0).to(tl.int8))


@triton.jit
def segment_kernel(
    score_ptr, row_ptr, offset_ptr, kept_ptr, out_ptr, mean_ptr, std_ptr, constant_ptr, eps,
    GATHER: tl.constexpr, BY_STD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offset_ptr + i_segment), tl.load(offset_ptr + i_segment + 1)
    kept_end = start + tl.load(kept_ptr + i_segment)
    first = tl.sum(load_scores(score_ptr, row_ptr, start + tl.arange(0, 1), start + tl.arange(0, 1) < kept_end, GATHER))
    zero = tl.full((), 0.0, tl.float32)
    n, mean, square, differ = zero, zero, zero, zero
    for i in range(start, kept_end, CHUNK):
        n_2, mean_2, square_2, differ_2 = chunk_moments(score_ptr, row_ptr, first, i, kept_end, GATHER, CHUNK)
        n, mean, square, differ = merge(n, mean, square, differ, n_2, mean_2, square_2, differ_2)
    mean, std = finish(n, mean, square, differ)
    write_stats(mean_ptr, std_ptr, constant_ptr, i_segment, first, mean, std, differ)
    for i in range(start, end, CHUNK):
        write_chunk(score_ptr, row_ptr, out_ptr, first, mean, std, eps, i, end, GATHER, BY_STD, CHUNK)


@triton.jit
def chunk_kernel(
    score_ptr, row_ptr, offset_ptr, kept_ptr, chunk_segment_ptr, chunk_start_ptr, moment_ptr,
    GATHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0).to(tl.int64)
    i_segment = tl.load(chunk_segment_ptr + i_chunk)
    start = tl.load(offset_ptr + i_segment)
    kept_end = start + tl.load(kept_ptr + i_segment)
    i = tl.load(chunk_start_ptr + i_chunk)
    if i < kept_end:
        first = tl.sum(
            load_scores(score_ptr, row_ptr, start + tl.arange(0, 1), start + tl.arange(0, 1) < kept_end, GATHER)
        )
        n, mean, square, differ = chunk_moments(score_ptr, row_ptr, first, i, kept_end, GATHER, CHUNK)
        tl.store(moment_ptr + 4 * i_chunk, n)
        tl.store(moment_ptr + 4 * i_chunk + 1, mean)
        tl.store(moment_ptr + 4 * i_chunk + 2, square)
        tl.store(moment_ptr + 4 * i_chunk + 3, differ)


@triton.jit
def merge_kernel(
    score_ptr, row_ptr, offset_ptr, kept_ptr, chunk_offset_ptr, moment_ptr, first_ptr, shift_ptr,
    mean_ptr, std_ptr, constant_ptr, GATHER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_segment = tl.program_id(0).to(tl.int64)
    start = tl.load(offset_ptr + i_segment)
    kept_end = start + tl.load(kept_ptr + i_segment)
    first = tl.sum(load_scores(score_ptr, row_ptr, start + tl.arange(0, 1), start + tl.arange(0, 1) < kept_end, GATHER))
    zero = tl.full((), 0.0, tl.float32)
    n, mean, square, differ = zero, zero, zero, zero
    p_moment = moment_ptr + 4 * tl.load(chunk_offset_ptr + i_segment)
    for _ in range(start, kept_end, CHUNK):
        n_2, mean_2 = tl.load(p_moment), tl.load(p_moment + 1)
        square_2, differ_2 = tl.load(p_moment + 2), tl.load(p_moment + 3)
        n, mean, square, differ = merge(n, mean, square, differ, n_2, mean_2, square_2, differ_2)
        p_moment += 4
    mean, std = finish(n, mean, square, differ)
    write_stats(mean_ptr, std_ptr, constant_ptr, i_segment, first, mean, std, differ)
    tl.store(first_ptr + i_segment, first)
    tl.store(shift_ptr + i_segment, mean)


@triton.jit
def write_kernel(
    score_ptr, row_ptr, offset_ptr, chunk_segment_ptr, chunk_start_ptr, first_ptr, shift_ptr, std_ptr, out_ptr, eps,
    GATHER: tl.constexpr, BY_STD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0).to(tl.int64)
    i_segment = tl.load(chunk_segment_ptr + i_chunk)
    first, mean, std = tl.load(first_ptr + i_segment), tl.load(shift_ptr + i_segment), tl.load(std_ptr + i_segment)
    i, end = tl.load(chunk_start_ptr + i_chunk), tl.load(offset_ptr + i_segment + 1)
    write_chunk(score_ptr, row_ptr, out_ptr, first, mean, std, eps, i, end, GATHER, BY_STD, CHUNK)


@triton.jit
def spread_kernel(value_ptr, token_offset_ptr, mask_ptr, out_ptr, CHUNK: tl.constexpr):
    """A row's value on its tokens, 0 where the mask is 0."""
    i_row = tl.program_id(0).to(tl.int64)
    value = tl.load(value_ptr + i_row)
    end = tl.load(token_offset_ptr + i_row + 1)
    for i in range(tl.load(token_offset_ptr + i_row), end, CHUNK):
        o = i + tl.arange(0, CHUNK)
        m = o < end
        tl.store(out_ptr + o, tl.where(tl.load(mask_ptr + o, mask=m, other=0) != 0, value, 0.0), mask=m)


class Segments(NamedTuple):
    """Rows sorted by segment; in a segment the rows that count come first, both parts in their original order."""

    row_N: Tensor | None  # int64, position of each sorted row in the input; None if the input is already sorted
    offset_S1: Tensor  # int64, S+1 bounds
    kept_S: Tensor  # int64, number of rows of each segment that count
    segment_N: Tensor | None  # int64, segment of each input row; None if the input is already sorted


def segments_of_ids(segment_N: Tensor, keep_N: Tensor | None) -> Segments:
    """Sort rows by segment id, with stable sorts; the host waits once for the device, for the number of segments."""
    if keep_N is None:
        row_N = torch.sort(segment_N, stable=True)[1]
    else:
        kept_first_N = torch.sort((~keep_N).to(torch.uint8), stable=True)[1]
        row_N = kept_first_N[torch.sort(segment_N[kept_first_N], stable=True)[1]]
    _, index_N, count_S = torch.unique_consecutive(segment_N[row_N], return_inverse=True, return_counts=True)
    segment_of_N = torch.empty_like(index_N).scatter_(0, row_N, index_N)
    if keep_N is None:
        kept_S = count_S
    else:
        kept_S = torch.zeros_like(count_S).scatter_add_(0, segment_of_N, keep_N.to(torch.int64))
    return Segments(row_N, offsets(count_S), kept_S, segment_of_N)


def offsets(count_S: Tensor) -> Tensor:
    return torch.cat([count_S.new_zeros(1), count_S.cumsum(0)])


def run(
    score_N: Tensor, segments: Segments, *, scale_by_std: bool, eps: float, split: bool | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns advantage_N, mean_S, std_S, is_constant_S. `split` overrides the choice between one launch and three."""
    score_N = score_N.contiguous()
    N, S = score_N.shape[0], segments.offset_S1.shape[0] - 1
    out_N = torch.empty(N, dtype=torch.float32, device=score_N.device)
    mean_S, std_S = out_N.new_empty(S), out_N.new_empty(S)
    constant_S = torch.empty(S, dtype=torch.int8, device=score_N.device)
    chunk, warps, _ = launch_of("segment_norm", score_N.device, score_N.dtype)
    if split is None:
        split = S * SPLIT_ABOVE * chunk < N
    # No fused multiply-adds, which the compiler might place differently in one launch than in three.
    flags = {"GATHER": segments.row_N is not None, "CHUNK": chunk, "num_warps": warps, "enable_fp_fusion": False}
    rows = (score_N, segments.offset_S1 if segments.row_N is None else segments.row_N, segments.offset_S1)
    if S and not split:
        segment_kernel[(S,)](
            *rows, segments.kept_S, out_N, mean_S, std_S, constant_S, eps, BY_STD=scale_by_std, **flags
        )
    elif S:
        count_S = segments.offset_S1.diff()
        chunk_offset_S1 = offsets((count_S + chunk - 1) // chunk)
        # The host would have to wait for the number of chunks. It launches the most there can be; those too many start
        # behind the end of the last segment, and do nothing.
        chunks = N // chunk + S
        chunk_C = torch.arange(chunks, device=score_N.device)
        segment_C = (torch.searchsorted(chunk_offset_S1, chunk_C, right=True) - 1).clamp_(max=S - 1)
        start_C = segments.offset_S1[segment_C] + chunk * (chunk_C - chunk_offset_S1[segment_C])
        moment_C = out_N.new_empty(4 * chunks)
        first_S, shift_S = out_N.new_empty(S), out_N.new_empty(S)
        if chunks:
            chunk_kernel[(chunks,)](*rows, segments.kept_S, segment_C, start_C, moment_C, **flags)
        merge_kernel[(S,)](
            *rows, segments.kept_S, chunk_offset_S1, moment_C, first_S, shift_S, mean_S, std_S, constant_S, **flags
        )
        if chunks:
            write_kernel[(chunks,)](
                *rows, segment_C, start_C, first_S, shift_S, std_S, out_N, eps, BY_STD=scale_by_std, **flags
            )
    return out_N, mean_S, std_S, constant_S.bool()


def segments_of(segment_N: Tensor | None, keep_N: Tensor | None, offset_S1: Tensor | None) -> Segments:
    if segment_N is not None:
        return segments_of_ids(segment_N, keep_N)
    assert offset_S1 is not None
    return Segments(None, offset_S1.to(torch.int64).contiguous(), offset_S1.diff().to(torch.int64), None)


@torch.library.custom_op("hapo_kernels::segment_norm", mutates_args=())
def segment_norm_op(
    score_N: Tensor,
    segment_N: Tensor | None,
    keep_N: Tensor | None,
    offset_S1: Tensor | None,
    scale_by_std: bool,
    eps: float,
) -> Tensor:
    segments = segments_of(segment_N, keep_N, offset_S1)
    return run(score_N, segments, scale_by_std=scale_by_std, eps=eps)[0]


@segment_norm_op.register_fake
def _(score_N, *args):
    return score_N.new_empty(score_N.shape, dtype=torch.float32)


@torch.library.custom_op("hapo_kernels::segment_spread", mutates_args=())
def spread_op(value_B: Tensor, mask_T: Tensor, token_offset_B1: Tensor) -> Tensor:
    out_T = torch.empty(mask_T.shape, dtype=torch.float32, device=value_B.device)
    if value_B.shape[0]:
        offset_B1 = token_offset_B1.to(torch.int64).contiguous()
        chunk, warps, _ = launch_of("segment_norm", value_B.device, value_B.dtype)
        spread_kernel[(value_B.shape[0],)](
            value_B, offset_B1, (mask_T != 0).view(torch.uint8), out_T, CHUNK=chunk, num_warps=warps
        )
    return out_T


@spread_op.register_fake
def _(value_B, mask_T, *args):
    return value_B.new_empty(mask_T.shape, dtype=torch.float32)


@torch.library.custom_op("hapo_kernels::segment_stats", mutates_args=())
def segment_stats_op(
    score_N: Tensor, segment_N: Tensor | None, keep_N: Tensor | None, offset_S1: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    segments = segments_of(segment_N, keep_N, offset_S1)
    _, mean_S, std_S, constant_S = run(score_N, segments, scale_by_std=False, eps=0.0)
    of_N = segments.segment_N
    if of_N is None:
        of_N = torch.repeat_interleave(segments.offset_S1.diff(), output_size=score_N.shape[0])
    return mean_S[of_N], std_S[of_N], segments.kept_S[of_N], constant_S[of_N]


@segment_stats_op.register_fake
def _(score_N, *args):
    dtypes = (torch.float32, torch.float32, torch.int64, torch.bool)
    return tuple(score_N.new_empty(score_N.shape, dtype=dtype) for dtype in dtypes)


def segment_norm(
    score_N: Tensor,
    segment_N: Tensor | None,
    keep_N: Tensor | None,
    offset_S1: Tensor | None,
    *,
    scale_by_std: bool,
    eps: float,
) -> Tensor:
    """See `hapo_kernels.segment_norm.segment_norm`."""
    return torch.ops.hapo_kernels.segment_norm(score_N.detach(), segment_N, keep_N, offset_S1, scale_by_std, eps)


def spread(value_B: Tensor, mask_T: Tensor, token_offset_B1: Tensor) -> Tensor:
    """See `hapo_kernels.segment_norm.segment_norm_tokens`."""
    return torch.ops.hapo_kernels.segment_spread(value_B, mask_T, token_offset_B1)


def segment_stats(
    score_N: Tensor, segment_N: Tensor | None, keep_N: Tensor | None, offset_S1: Tensor | None
) -> SegmentStats:
    """See `hapo_kernels.segment_norm.segment_stats`."""
    return SegmentStats(*torch.ops.hapo_kernels.segment_stats(score_N.detach(), segment_N, keep_N, offset_S1))
