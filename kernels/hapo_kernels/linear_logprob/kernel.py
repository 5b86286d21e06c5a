"""The language-model head: the vendor's GEMMs of `chunked`, with one Triton program per row between them.

`sweep` is the online softmax of one row, `write_dlogits` its gradient; `policy_head` computes the loss between the two.
The offset of a row is int64, since N·V exceeds 2³¹ at 16k tokens. No length is a constexpr, so a new length needs no
compilation. There are no atomic operations.

A row kernel reads fp32 logits, 4 B per element; its backward reads 4 B and writes the storage dtype.
"""

# Triton passes ints and bools for constexpr parameters, adds num_warps to every launch and iterates over its own range;
# pyright knows none of this.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

# A custom op takes the name of a process group.
from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]

from hapo_kernels.counted import rows_where
from hapo_kernels.dispatch import refuse_double_backward
from hapo_kernels.launch import launch_of
from hapo_kernels.linear_logprob import reference
from hapo_kernels.linear_logprob.chunked import Gradients, Head
from hapo_kernels.memory import Rows

LOWEST = tl.constexpr(-3.0e38)  # start of the running maximum; finite, because -inf - -inf is NaN
FLOOR = tl.constexpr(-1.0e30)  # e^FLOOR is 0, and FLOOR · 0 is 0, while -inf · 0 is NaN


@triton.jit
def floored(x):
    """max(x, FLOOR); NaN stays NaN."""
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def sweep(p_row, V, inverse_temperature, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """(m, Σ e^d, Σ d e^d) with d = (x - m)/τ over one row: first in each lane, then over all lanes."""
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(p_row + o, mask=o < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(m, x)
        shift = floored((m - larger) * inverse_temperature)
        d = floored((x - larger) * inverse_temperature)
        scale, e = tl.exp(shift), tl.exp(d)
        weighted = scale * (weighted + total * shift) + d * e
        total = scale * total + e
        m = larger
    row_max = tl.max(m)
    shift = floored((m - row_max) * inverse_temperature)
    scale = tl.exp(shift)
    return row_max, tl.sum(scale * total), tl.sum(scale * (weighted + total * shift))


@triton.jit
def write_dlogits(
    p_row, p_out, label, V, inverse_temperature, row_max, log_sum, entropy, slope, entropy_slope,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dlogits, (1/τ) [ g (1{v=y} - p) - g_H p (log p + H) ]; p_out may be p_row."""
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(p_row + o, mask=o < V, other=-float("inf")).to(tl.float32)
        logp = floored((x - row_max) * inverse_temperature - log_sum)
        p = tl.exp(logp)
        dlogits = slope * (tl.where(o == label, 1.0, 0.0) - p)
        if HAS_ENTROPY:
            dlogits -= entropy_slope * p * (logp + entropy)
        tl.store(p_out + o, (dlogits * inverse_temperature).to(p_out.dtype.element_ty), mask=o < V)


@triton.jit
def write_zeros(p_out, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        o = start + tl.arange(0, BLOCK)
        tl.store(p_out + o, tl.zeros((BLOCK,), p_out.dtype.element_ty), mask=o < V)


@triton.jit
def stats_row_kernel(
    row_ptr, logits_ptr, label_ptr, temperature_ptr, stats_ptr, V, first_label, N,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write maximum, Σ e^d, Σ d e^d and label logit of the row row_ptr[program] into the program's column of (4, N).

    The label logit is 0 if the label is not in this slice of the vocabulary, which begins with the token first_label.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_row = tl.load(row_ptr + i_program)
    p_row = logits_ptr + i_program * V
    inverse_temperature = 1.0 / tl.load(temperature_ptr + i_row)
    label = tl.load(label_ptr + i_row) - first_label
    here = (label >= 0) & (label < V)
    label_logit = tl.load(p_row + label, mask=here, other=0.0).to(tl.float32)
    row_max, total, weighted = sweep(p_row, V, inverse_temperature, BLOCK, STAGES)
    p_stats = stats_ptr + i_program
    tl.store(p_stats, row_max)
    tl.store(p_stats + N, total)
    tl.store(p_stats + 2 * N, weighted)
    tl.store(p_stats + 3 * N, label_logit)


@triton.jit
def dlogits_row_kernel(
    row_ptr, logits_ptr, out_ptr, label_ptr, temperature_ptr, max_ptr, log_sum_ptr, entropy_ptr, slope_ptr,
    entropy_slope_ptr, V, first_label, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write dlogits of the row row_ptr[program]; its logits are row number `program` of the chunk."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row = tl.load(row_ptr + i_program)
    entropy, entropy_slope = 0.0, 0.0
    if HAS_ENTROPY:
        entropy, entropy_slope = tl.load(entropy_ptr + i_row), tl.load(entropy_slope_ptr + i_row)
    write_dlogits(
        logits_ptr + i_program * V, out_ptr + i_program * V, tl.load(label_ptr + i_row) - first_label, V,
        1.0 / tl.load(temperature_ptr + i_row),
        tl.load(max_ptr + i_row), tl.load(log_sum_ptr + i_row), entropy, tl.load(slope_ptr + i_row), entropy_slope,
        HAS_ENTROPY, BLOCK, STAGES,
    )  # fmt: skip


def row_settings(kernel: str, written: Tensor) -> dict[str, int]:
    """The launch settings of a row kernel, for rows with this dtype and device."""
    block, warps, stages = launch_of(kernel, written.device, written.dtype)
    return {"BLOCK": block, "num_warps": warps, "STAGES": stages}


def row_stats(
    row: Tensor, logits: Tensor, label_N: Tensor, temperature_N: Tensor, first_label: int, stats: Tensor
) -> None:
    """Write max, Σ e^d, Σ d e^d and label logit of the rows `row` into the first columns of stats (4, ...)."""
    settings = row_settings("stats_row", logits)
    V, N = logits.shape[1], stats.stride(0)
    stats_row_kernel[(len(row),)](row, logits, label_N, temperature_N, stats, V, first_label, N, **settings)


def row_dlogits(
    row: Tensor,
    logits: Tensor,
    dlogits: Tensor,
    label_N: Tensor,
    temperature_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    entropy_N: Tensor,
    slope_N: Tensor,
    entropy_slope_N: Tensor | None,
    first_label: int,
) -> None:
    """Write the gradients of the rows `row` into the first rows of dlogits; entropy_N needs entropy_slope_N."""
    dlogits_row_kernel[(len(row),)](
        row,
        logits,
        dlogits,
        label_N,
        temperature_N,
        max_N,
        log_sum_N,
        entropy_N,
        slope_N,
        slope_N if entropy_slope_N is None else entropy_slope_N,
        logits.shape[1],
        first_label,
        HAS_ENTROPY=entropy_slope_N is not None,
        **row_settings("dlogits_row", dlogits),
    )


def group_of(name: str) -> dist.ProcessGroup | None:
    return _resolve_process_group(name) if name else None


def name_of(group: dist.ProcessGroup | None) -> str:
    return group.group_name if group else ""


def slice_of(group: dist.ProcessGroup | None, V: int) -> tuple[int, int]:
    """This rank's first token, and the size of the whole vocabulary."""
    return (0, V) if group is None else (dist.get_rank(group) * V, group.size() * V)


def empty_or(value: Tensor | None, like: Tensor) -> Tensor:
    """The value, or an empty tensor for None, which a custom op cannot return."""
    return like.new_empty(0) if value is None else value


@torch.library.custom_op("hapo_kernels::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    label_N: Tensor,
    temperature_N: Tensor,
    bias_V: Tensor | None,
    keep_N: Tensor,
    with_entropy: bool,
    group: str,
    rows: list[int],
    main_grad_VH: Tensor | None,
    kept_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logp_N, entropy_N, max_N, log_sum_N; the backward pass needs the last two.

    `main_grad_VH` is only passed on to the backward pass.
    """
    N, V = hidden_NH.shape[0], weight_VH.shape[0]
    process_group = group_of(group)
    first, size = slice_of(process_group, V)
    row = rows_where(keep_N, kept_rows)
    stats = torch.empty(4, len(row), dtype=torch.float32, device=hidden_NH.device)

    def row_kernel(piece: Tensor, done: int, logits: Tensor, _: Tensor | None) -> None:
        row_stats(piece, logits, label_N, temperature_N, first, stats[:, done:])

    Head(hidden_NH, weight_VH, bias_V, Rows(*rows)).run(row, row_kernel)
    row_max, total, weighted, label_logit = stats
    temperature = temperature_N[row]
    if process_group is not None:
        row_max, total, weighted, label_logit = reference.combine(
            row_max, total, weighted, label_logit, temperature, process_group
        )
    log_sum = total.log()
    inside = reference.clamped(label_N[row], size)[1]
    logp = torch.where(inside, (label_logit - row_max) / temperature - log_sum, torch.nan)
    zero_N = torch.zeros(N, dtype=torch.float32, device=hidden_NH.device)
    return (
        zero_N.index_put((row,), logp),
        zero_N.index_put((row,), log_sum - weighted / total) if with_entropy else zero_N.clone(),
        zero_N.index_put((row,), row_max),
        zero_N.index_put((row,), log_sum),
    )


@linear_logprob_op.register_fake
def _(hidden_NH, *args):
    return tuple(hidden_NH.new_empty(hidden_NH.shape[0], dtype=torch.float32) for _ in range(4))


@torch.library.custom_op("hapo_kernels::linear_logprob_backward", mutates_args=("main_grad_VH",))
def linear_logprob_backward_op(
    slope_N: Tensor,
    entropy_slope_N: Tensor | None,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    label_N: Tensor,
    temperature_N: Tensor,
    bias_V: Tensor | None,
    keep_N: Tensor,
    entropy_N: Tensor,
    max_N: Tensor,
    log_sum_N: Tensor,
    main_grad_VH: Tensor | None,
    group: str,
    rows: list[int],
    kept_rows: int | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ∂hidden, ∂weight and ∂bias; empty if not wanted.

    Rows with upstream gradient 0 are left out, unless `kept_rows` is given: their number would need a wait.
    """
    V = weight_VH.shape[0]
    process_group = group_of(group)
    first, _ = slice_of(process_group, V)
    if kept_rows is None:
        active_N = slope_N != 0
        if entropy_slope_N is not None:
            active_N = active_N | (entropy_slope_N != 0)
        keep_N = keep_N & active_N
    row = rows_where(keep_N, kept_rows)

    numbers = (label_N, temperature_N, max_N, log_sum_N, entropy_N, slope_N, entropy_slope_N)

    def row_kernel(piece: Tensor, _: int, logits: Tensor, dlogits: Tensor | None) -> None:
        assert dlogits is not None
        row_dlogits(piece, logits, dlogits, *numbers, first)

    # What the caller adds to is in fp32, so there is no memory of a sum that more rows could use.
    sizes = Rows(*rows) if main_grad_VH is not None else Rows(*rows).for_count(len(row))
    gradients = Gradients(hidden_NH, weight_VH, bias_V, wanted, main_grad_VH, single=sizes.in_one(len(row)))
    Head(hidden_NH, weight_VH, bias_V, sizes).run(row, row_kernel, gradients)
    dhidden_NH, dweight_VH, dbias_V = gradients.result(process_group)
    return (
        empty_or(dhidden_NH, hidden_NH),
        empty_or(None if dweight_VH is None else dweight_VH.to(weight_VH.dtype), weight_VH),
        empty_or(None if dbias_V is None or bias_V is None else dbias_V.to(bias_V.dtype), weight_VH),
    )


@linear_logprob_backward_op.register_fake
def _(slope_N, entropy_slope_N, hidden_NH, weight_VH, label_N, temperature_N, bias_V, *args):
    *_, main_grad_VH, _, _, _, wanted = args
    wanted = [wanted[0], wanted[1] and main_grad_VH is None, wanted[2]]
    like = (hidden_NH, weight_VH, weight_VH if bias_V is None else bias_V)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else tensor.new_empty(0)
        for tensor, want in zip(like, wanted, strict=True)
    )


def _save(ctx, inputs, output):
    hidden_NH, weight_VH, label_N, temperature_N, bias_V, keep_N, ctx.with_entropy, *settings = inputs
    ctx.group, ctx.rows, ctx.main_grad_VH, ctx.kept_rows = settings
    ctx.save_for_backward(hidden_NH, weight_VH, label_N, temperature_N, bias_V, keep_N, *output[1:])
    # main_grad_VH is not saved as a tensor of the forward pass, because its owner may change it before the backward.
    ctx.set_materialize_grads(False)  # an entropy that no loss uses costs nothing


def _backward(ctx, slope_N, entropy_slope_N, _max, _log_sum):
    refuse_double_backward("linear_logprob")
    if slope_N is None and entropy_slope_N is None:
        return (None,) * 11
    need = ctx.needs_input_grad
    wanted = [need[0], need[1], need[4]]
    gradients = torch.ops.hapo_kernels.linear_logprob_backward(
        torch.zeros_like(entropy_slope_N) if slope_N is None else slope_N.contiguous(),
        entropy_slope_N.contiguous() if ctx.with_entropy and entropy_slope_N is not None else None,
        *ctx.saved_tensors,
        ctx.main_grad_VH,
        ctx.group,
        ctx.rows,
        ctx.kept_rows,
        wanted,
    )
    returned = [wanted[0], wanted[1] and ctx.main_grad_VH is None, wanted[2]]
    hidden, weight, bias = (gradient if want else None for gradient, want in zip(gradients, returned, strict=True))
    return hidden, weight, None, None, bias, *[None] * 6


linear_logprob_op.register_autograd(_backward, setup_context=_save)


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    label_N: Tensor,
    temperature_N: Tensor,
    bias_V: Tensor | None,
    keep_N: Tensor,
    with_entropy: bool,
    group: dist.ProcessGroup | None,
    rows: Rows,
    main_grad_VH: Tensor | None,
    kept_rows: int | None,
) -> tuple[Tensor, Tensor]:
    """See `hapo_kernels.linear_logprob.linear_logprob`."""
    logp_N, entropy_N, _, _ = torch.ops.hapo_kernels.linear_logprob(
        hidden_NH,
        weight_VH,
        label_N.contiguous(),
        temperature_N,
        bias_V,
        keep_N,
        with_entropy,
        name_of(group),
        list(rows),
        main_grad_VH,
        kept_rows,
    )
    return logp_N, entropy_N
