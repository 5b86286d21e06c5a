"""Statistics, loss and dlogits of a row in one Triton program, between the GEMMs of a chunk.

The mathematics is imported: `sweep` and `write_dlogits` from the head, `token_loss` from the loss.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hapo_kernels.dispatch import refuse_double_backward
from hapo_kernels.linear_logprob.kernel import (
    Chunks,
    Gradients,
    dlogits_buffer,
    empty_or,
    logits_of,
    row_settings,
    rows_a_chunk,
    sweep,
    write_dlogits,
)
from hapo_kernels.policy_loss.kernel import KL_CODE, PARTIALS, token_loss
from hapo_kernels.policy_loss.reference import row_weight
from hapo_kernels.policy_loss.terms import Aggregation, Clip, KLPenalty, PolicyLossMetrics, Teacher


@triton.jit
def head_row_kernel(
    logits_ptr, out_ptr, label_ptr, temperature_ptr, behaviour_ptr, advantage_ptr, row_weight_ptr, is_teacher_ptr,
    teacher_ptr, weight_ptr, reference_ptr, logp_ptr, entropy_ptr, partial_ptr, V,
    low_edge, high_edge, dual, log_shaping, kl_coefficient, entropy_coefficient,
    HAS_TEACHER_LOGP: tl.constexpr, HAS_WEIGHT: tl.constexpr, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + i_row * V
    inverse_temperature = 1.0 / tl.load(temperature_ptr + i_row)
    label = tl.load(label_ptr + i_row)
    inside = (label >= 0) & (label < V)
    label_logit = tl.load(p_row + label, mask=inside, other=float("nan")).to(tl.float32)
    row_max, total, weighted = sweep(p_row, V, inverse_temperature, BLOCK)
    log_sum = tl.log(total)
    logp = (label_logit - row_max) * inverse_temperature - log_sum
    entropy = log_sum - weighted / total

    # One token, as a block of one: the same functions take blocks of tokens in `policy_loss`.
    o = i_row + tl.arange(0, 1)
    policy = logp + tl.zeros((1,), tl.float32)
    row_weight = tl.load(row_weight_ptr + o)
    is_teacher = tl.load(is_teacher_ptr + o) != 0
    teacher, weight, reference = 0.0, 1.0, policy
    if HAS_TEACHER_LOGP:
        teacher = tl.load(teacher_ptr + o).to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + o).to(tl.float32)
    if KL > 0:
        reference = tl.load(reference_ptr + o).to(tl.float32)
    loss, slope, kl, kl_slope, clipped, bounded, log_ratio = token_loss(
        policy, tl.load(behaviour_ptr + o).to(tl.float32), tl.load(advantage_ptr + o).to(tl.float32), is_teacher,
        teacher, weight, reference, low_edge, high_edge, dual, log_shaping, KL, STRAIGHT_THROUGH,
    )  # fmt: skip

    on = is_teacher == 0
    tl.store(logp_ptr + i_row, logp)
    tl.store(entropy_ptr + i_row, entropy)
    # The order of PolicyLossMetrics.
    p_partial = partial_ptr + i_row * PARTIALS + tl.arange(0, 1)
    tl.store(p_partial, tl.where(on, row_weight * loss, 0.0))
    tl.store(p_partial + 1, tl.where(on, 0.0, row_weight * loss))
    tl.store(p_partial + 2, tl.where(on, row_weight * kl, 0.0))
    tl.store(p_partial + 3, row_weight * entropy)
    tl.store(p_partial + 4, on.to(tl.float32))
    tl.store(p_partial + 5, is_teacher.to(tl.float32))
    tl.store(p_partial + 6, (on & clipped).to(tl.float32))
    tl.store(p_partial + 7, (on & bounded).to(tl.float32))
    tl.store(p_partial + 8, tl.where(on, -log_ratio, 0.0))
    tl.store(p_partial + 9, tl.where(on, 0.0, tl.exp(policy)))

    if HAS_GRADIENT:
        if KL > 0:
            slope += tl.where(on, kl_coefficient * kl_slope, 0.0)
        write_dlogits(
            p_row, out_ptr + i_row * V, label, V, inverse_temperature, row_max, log_sum, entropy,
            tl.sum(row_weight * slope), tl.sum(-entropy_coefficient * row_weight), HAS_ENTROPY, BLOCK,
        )  # fmt: skip


@torch.library.custom_op("hapo_kernels::policy_head", mutates_args=())
def policy_head_op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    label_N: Tensor,
    temperature_N: Tensor,
    active_N: Tensor,
    behaviour_logp_N: Tensor,
    advantage_N: Tensor,
    row_weight_N: Tensor,
    teacher_N: Tensor,
    teacher_logp_N: Tensor | None,
    importance_weight_N: Tensor | None,
    reference_logp_N: Tensor | None,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    shaping: float,
    kl_kind: str,
    kl_coefficient: float,
    entropy_coefficient: float,
    chunk_rows: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, sums in the order of PolicyLossMetrics, logp_N, entropy_N, ∂hidden, ∂weight (fp32), ∂bias (fp32)."""
    N, V = hidden_NH.shape[0], weight_VH.shape[0]
    fp32 = {"dtype": torch.float32, "device": hidden_NH.device}
    trains_N = active_N
    if not kl_kind and entropy_coefficient == 0:
        trains_N = active_N & (advantage_N != 0)
    if not any(wanted):
        trains_N = torch.zeros_like(active_N)
    gradients = Gradients(hidden_NH, weight_VH, bias_V, wanted)
    logp_N, entropy_N = torch.zeros(N, **fp32), torch.zeros(N, **fp32)
    sums = torch.zeros(PARTIALS.value, dtype=torch.float64, device=hidden_NH.device)
    for with_gradient, row in ((True, trains_N.nonzero()[:, 0]), (False, (active_N & ~trains_N).nonzero()[:, 0])):
        chunks = Chunks(row, chunk_rows)
        for piece in chunks:

            def take(value_N: Tensor | None, piece: Tensor = piece) -> Tensor:
                # A pointer that its flag switches off is never read; temperature_N stands in for it.
                return temperature_N if value_N is None else value_N[piece]

            hidden = chunks.gather(hidden_NH, piece)
            logits = logits_of(hidden, weight_VH, bias_V)
            dlogits = dlogits_buffer(logits, len(piece), hidden_NH.dtype) if with_gradient else logits
            logp, entropy = torch.empty(len(piece), **fp32), torch.empty(len(piece), **fp32)
            partial = torch.zeros(len(piece), PARTIALS.value, **fp32)
            head_row_kernel[(len(piece),)](
                logits,
                dlogits,
                take(label_N),
                take(temperature_N),
                take(behaviour_logp_N),
                take(advantage_N),
                take(row_weight_N),
                take(teacher_N).view(torch.uint8),
                take(teacher_logp_N),
                take(importance_weight_N),
                take(reference_logp_N),
                logp,
                entropy,
                partial,
                V,
                1.0 - clip_low,
                1.0 + clip_high,
                clip_dual,
                math.log(shaping),
                kl_coefficient,
                entropy_coefficient,
                HAS_TEACHER_LOGP=teacher_logp_N is not None,
                HAS_WEIGHT=importance_weight_N is not None,
                KL=KL_CODE[kl_kind.removesuffix("+")],
                STRAIGHT_THROUGH=kl_kind.endswith("+"),
                HAS_ENTROPY=entropy_coefficient != 0,
                HAS_GRADIENT=with_gradient,
                **row_settings(),
            )
            logp_N[piece], entropy_N[piece] = logp, entropy
            sums += partial.double().sum(0)
            if with_gradient:
                gradients.add(piece, hidden, dlogits)
    dhidden_NH, dweight_VH, dbias_V = gradients.result()
    sums = sums[: len(PolicyLossMetrics._fields)]
    loss = sums[0] + sums[1] + kl_coefficient * sums[2] - entropy_coefficient * sums[3]
    return (
        loss.float(),
        sums.float(),
        logp_N,
        entropy_N,
        empty_or(dhidden_NH, hidden_NH),
        empty_or(dweight_VH, logp_N),
        empty_or(dbias_V, logp_N),
    )


@policy_head_op.register_fake
def _(hidden_NH, weight_VH, bias_V, *args):
    wanted = args[-1]
    fp32 = {"dtype": torch.float32}
    N, fields = hidden_NH.shape[0], len(PolicyLossMetrics._fields)
    vectors = (hidden_NH.new_empty(shape, **fp32) for shape in ((), (fields,), (N,), (N,)))
    dense = {"memory_format": torch.contiguous_format}
    return (
        *vectors,
        torch.empty_like(hidden_NH, **dense) if wanted[0] else hidden_NH.new_empty(0),
        torch.empty_like(weight_VH, **fp32, **dense) if wanted[1] else hidden_NH.new_empty(0, **fp32),
        torch.empty_like(bias_V, **fp32, **dense) if wanted[2] else hidden_NH.new_empty(0, **fp32),
    )


def _save(ctx, inputs, output):
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.save_for_backward(*output[4:])


def _backward(ctx, upstream, *_):
    refuse_double_backward("policy_head")
    gradients = [
        (gradient * upstream).to(dtype) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*gradients, *[None] * 19)


policy_head_op.register_autograd(_backward, setup_context=_save)


def policy_head(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    label_BT: Tensor,
    behaviour_logp_BT: Tensor,
    advantage: Tensor,
    active_BT: Tensor,
    *,
    clip: Clip,
    aggregation: Aggregation,
    teacher: Teacher | None,
    importance_weight_BT: Tensor | None,
    kl: KLPenalty | None,
    entropy_coefficient: float,
    bias_V: Tensor | None,
    temperature_N: Tensor,
    chunk_rows: int | None,
) -> tuple[Tensor, PolicyLossMetrics, Tensor, Tensor]:
    """See `hapo_kernels.policy_head.policy_head`."""

    def per_token(value: Tensor) -> Tensor:
        value = value if value.ndim == 2 else value[:, None]
        return value.detach().expand_as(active_BT).flatten()

    graph = torch.is_grad_enabled()
    loss, sums, logp_N, entropy_N, *_ = torch.ops.hapo_kernels.policy_head(
        hidden_BTH.flatten(0, -2),
        weight_VH,
        bias_V,
        label_BT.flatten(),
        temperature_N,
        active_BT.flatten(),
        per_token(behaviour_logp_BT),
        per_token(advantage),
        per_token(row_weight(active_BT, aggregation).float()),
        per_token(teacher.row_B if teacher else torch.zeros_like(active_BT)),
        per_token(teacher.logp_BT) if teacher and teacher.logp_BT is not None else None,
        None if importance_weight_BT is None else per_token(importance_weight_BT),
        per_token(kl.reference_logp_BT) if kl else None,
        clip.low,
        clip.high,
        clip.dual,
        teacher.shaping if teacher else 1.0,
        kl.kind if kl else "",
        kl.coefficient if kl else 0.0,
        entropy_coefficient,
        chunk_rows or rows_a_chunk(weight_VH.shape[0]),
        [graph and tensor is not None and tensor.requires_grad for tensor in (hidden_BTH, weight_VH, bias_V)],
    )
    metrics = PolicyLossMetrics(*sums.detach().unbind())
    return loss, metrics, logp_N.detach().view(active_BT.shape), entropy_N.detach().view(active_BT.shape)
