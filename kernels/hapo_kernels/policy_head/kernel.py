"""Computes statistics, loss and dlogits of a row in one Triton program, between the GEMMs of a chunk.

The mathematics is imported: `sweep` and `write_dlogits` from the head, `token_loss` from the loss. If the vocabulary is
spread over ranks, the head's statistics kernel sweeps each slice, two small all-reduces per chunk combine the slices,
and the program here starts from the result.
"""

# Triton passes ints and bools for constexpr parameters and adds num_warps to every launch; pyright knows neither.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from hapo_kernels.counted import rows_where
from hapo_kernels.dispatch import refuse_double_backward
from hapo_kernels.linear_logprob.chunked import Gradients, Head, RowKernel
from hapo_kernels.linear_logprob.kernel import (
    empty_or,
    group_of,
    name_of,
    row_settings,
    row_stats,
    slice_of,
    sweep,
    write_dlogits,
    write_zeros,
)
from hapo_kernels.linear_logprob.reference import clamped, combine
from hapo_kernels.memory import Rows
from hapo_kernels.policy_loss.kernel import KL_CODE, PARTIALS, log_of, shape_code, shape_of, token_loss
from hapo_kernels.policy_loss.reference import row_weight
from hapo_kernels.policy_loss.terms import Aggregation, Clip, KLPenalty, PolicyLossMetrics, Teacher
from hapo_kernels.upstream import consumes, eager, times_upstream


@triton.jit
def head_row_kernel(
    row_ptr, logits_ptr, out_ptr, active_ptr, label_ptr, temperature_ptr, behaviour_ptr, advantage_ptr, row_weight_ptr,
    is_teacher_ptr, teacher_ptr, weight_ptr, reference_ptr, stats_ptr, logp_ptr, entropy_ptr, partial_ptr, V,
    first_label, low_edge, high_edge, dual, log_shaping, exponent, kl_coefficient, entropy_coefficient,
    WHOLE: tl.constexpr, EVERY: tl.constexpr, SLICE: tl.constexpr, HAS_BEHAVIOUR: tl.constexpr,
    HAS_TEACHER_LOGP: tl.constexpr, HAS_WEIGHT: tl.constexpr, SHAPE: tl.constexpr, KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics, loss and dlogits of one row of logits, which is row number `program` of them.

    They are a chunk, and the row belongs to the token row_ptr[program]; or all logits (WHOLE), of active tokens and
    others. There the gradient of a row is 0 if it is not active, or its advantage is 0, unless EVERY active row trains.
    With SLICE a chunk begins with the token first_label of the vocabulary, and stats (4, programs) holds the statistics
    of all of it; there the label logit is NaN if no slice has the label.
    """
    i_program = tl.program_id(0).to(tl.int64)
    p_row, p_out = logits_ptr + i_program * V, out_ptr + i_program * V
    i_row = i_program
    if WHOLE:
        if tl.load(active_ptr + i_row) == 0:
            if HAS_GRADIENT:
                write_zeros(p_out, V, BLOCK)
            return
    else:
        i_row = tl.load(row_ptr + i_program)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + i_row)
    label = tl.load(label_ptr + i_row)
    if SLICE:
        label -= first_label
        p_stats = stats_ptr + i_program
        rows = tl.num_programs(0)
        row_max, total = tl.load(p_stats), tl.load(p_stats + rows)
        weighted, label_logit = tl.load(p_stats + 2 * rows), tl.load(p_stats + 3 * rows)
    else:
        inside = (label >= 0) & (label < V)
        label_logit = tl.load(p_row + label, mask=inside, other=float("nan")).to(tl.float32)
        row_max, total, weighted = sweep(p_row, V, inverse_temperature, BLOCK, STAGES)
    log_sum = tl.log(total)
    logp = (label_logit - row_max) * inverse_temperature - log_sum
    entropy = log_sum - weighted / total

    # One token as a block of size one, since the functions shared with `policy_loss` take blocks of tokens.
    o = i_row + tl.arange(0, 1)
    policy = logp + tl.zeros((1,), tl.float32)
    row_weight = tl.load(row_weight_ptr + o)
    is_teacher = tl.load(is_teacher_ptr + o) != 0
    behaviour, teacher, weight, reference = policy, 0.0, 1.0, policy
    if HAS_BEHAVIOUR:
        behaviour = tl.load(behaviour_ptr + o).to(tl.float32)
    if HAS_TEACHER_LOGP:
        teacher = tl.load(teacher_ptr + o).to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + o).to(tl.float32)
    if KL > 0:
        reference = tl.load(reference_ptr + o).to(tl.float32)
    loss, slope, kl, kl_slope, clipped, bounded, log_ratio = token_loss(
        policy, behaviour, tl.load(advantage_ptr + o).to(tl.float32), is_teacher,
        teacher, weight, reference, low_edge, high_edge, dual, log_shaping, exponent, SHAPE, KL, STRAIGHT_THROUGH,
    )  # fmt: skip

    on = is_teacher == 0
    tl.store(logp_ptr + i_row, logp)
    tl.store(entropy_ptr + i_row, entropy)
    # The order of PolicyLossMetrics.
    p_partial = partial_ptr + i_program * PARTIALS + tl.arange(0, 1)
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
        slope, entropy_slope = tl.sum(row_weight * slope), tl.sum(-entropy_coefficient * row_weight)
        idle = False
        if WHOLE and not EVERY:
            idle = tl.load(advantage_ptr + i_row) == 0
        if idle:
            write_zeros(p_out, V, BLOCK)
        else:
            write_dlogits(
                p_row, p_out, label, V, inverse_temperature, row_max, log_sum, entropy, slope, entropy_slope,
                HAS_ENTROPY, BLOCK, STAGES,
            )  # fmt: skip


class Values(NamedTuple):
    """The outputs of the row kernel, except gradients."""

    logp_N: Tensor
    entropy_N: Tensor
    partial: Tensor  # (tokens, PARTIALS), the contribution of each token to the metrics

    @classmethod
    def of(cls, temperature_N: Tensor, tokens: int) -> Values:
        partial = temperature_N.new_zeros(tokens, PARTIALS.value)
        return cls(torch.zeros_like(temperature_N), torch.zeros_like(temperature_N), partial)

    def sums(self) -> Tensor:
        """The sums over all tokens in fp64, in the order of PolicyLossMetrics."""
        return self.partial.double().sum(0)[: len(PolicyLossMetrics._fields)]


class RowLoss(NamedTuple):
    """What the loss needs beside the logits: tensors with one value per token, and settings.

    The arguments of both custom ops end with these fields.
    """

    label_N: Tensor
    temperature_N: Tensor
    active_N: Tensor
    behaviour_logp_N: Tensor | None
    advantage_N: Tensor
    row_weight_N: Tensor
    teacher_N: Tensor
    teacher_logp_N: Tensor | None
    importance_weight_N: Tensor | None
    reference_logp_N: Tensor | None
    clip_low: float
    clip_high: float
    clip_dual: float
    shaping: float
    exponent: float
    shape: str
    kl_kind: str
    kl_coefficient: float
    entropy_coefficient: float

    @property
    def every_token_trains(self) -> bool:
        """Whether tokens with advantage 0 have a gradient too."""
        return bool(self.kl_kind) or self.entropy_coefficient != 0

    def most_rows(self, counts: list[int]) -> int:
        """The number of tokens that may have a gradient, as far as it is known without waiting for the device."""
        known = counts[:1] if self.every_token_trains else counts
        return known[-1] if known else self.label_N.shape[0]

    def rows(self, with_gradient: bool, counts: list[int]) -> tuple[Tensor, Tensor]:
        """The positions of tokens with a gradient, and of active tokens without one.

        `counts` has the number of active tokens and the number of those with a nonzero advantage, if known.
        """
        active, training = [*counts, None, None][:2]
        if not with_gradient:
            row = rows_where(self.active_N, active)
            return row[:0], row
        if self.every_token_trains or (active is not None and training is None):
            row = rows_where(self.active_N, active)
            return row, row[:0]
        trains_N, idle = self.active_N & (self.advantage_N != 0), None
        if active is not None and training is not None:
            idle = active - training
        return rows_where(trains_N, training), rows_where(self.active_N & ~trains_N, idle)

    def slice_stats(self, row: Tensor, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The statistics of the whole vocabulary, (4, rows), from the logits of all ranks' slices."""
        first, size = slice_of(group, logits.shape[1])
        stats = logits.new_empty(4, len(row))
        row_stats(row, logits, self.label_N, self.temperature_N, first, stats)
        stats = torch.stack(combine(*stats, self.temperature_N[row], group))
        stats[3].masked_fill_(~clamped(self.label_N[row], size)[1], torch.nan)
        return stats

    def launch(
        self,
        row: Tensor | None,
        logits: Tensor,
        dlogits: Tensor | None,
        into: Values,
        done: int,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Run the row kernel for the tokens `row`, or on the logits of all tokens if it is None.

        Fills dlogits, and `into` from its row `done` on.
        """
        rows = logits.shape[0] if row is None else len(row)
        if not rows:
            return
        # For absent inputs any pointer will do, since their flags keep the kernel from reading it.
        absent, written = self.temperature_N, logits if dlogits is None else dlogits
        stats = absent if group is None or row is None else self.slice_stats(row, logits, group)
        head_row_kernel[(rows,)](
            absent if row is None else row,
            logits,
            written,
            self.active_N.view(torch.uint8),
            self.label_N,
            self.temperature_N,
            absent if self.behaviour_logp_N is None else self.behaviour_logp_N,
            self.advantage_N,
            self.row_weight_N,
            self.teacher_N.view(torch.uint8),
            absent if self.teacher_logp_N is None else self.teacher_logp_N,
            absent if self.importance_weight_N is None else self.importance_weight_N,
            absent if self.reference_logp_N is None else self.reference_logp_N,
            stats,
            into.logp_N,
            into.entropy_N,
            into.partial[done:],
            logits.shape[1],
            slice_of(group, logits.shape[1])[0],
            1.0 - self.clip_low,
            1.0 + self.clip_high,
            self.clip_dual,
            log_of(self.shaping),
            self.exponent,
            self.kl_coefficient,
            self.entropy_coefficient,
            WHOLE=row is None,
            EVERY=self.every_token_trains,
            SLICE=group is not None,
            HAS_BEHAVIOUR=self.behaviour_logp_N is not None,
            HAS_TEACHER_LOGP=self.teacher_logp_N is not None,
            HAS_WEIGHT=self.importance_weight_N is not None,
            SHAPE=shape_code(self.shape, self.shaping, self.exponent),
            KL=KL_CODE[self.kl_kind.removesuffix("+")],
            STRAIGHT_THROUGH=self.kl_kind.endswith("+"),
            HAS_ENTROPY=self.entropy_coefficient != 0,
            HAS_GRADIENT=dlogits is not None,
            **row_settings("head_row", written),
        )

    def total(self, sums: Tensor) -> Tensor:
        return sums[0] + sums[1] + self.kl_coefficient * sums[2] - self.entropy_coefficient * sums[3]


def run_policy_head(
    head: Head, loss: RowLoss, gradients: Gradients | None, group: dist.ProcessGroup | None, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, sums in the order of PolicyLossMetrics, logp_N and entropy_N; fills `gradients`."""
    trains, rest = loss.rows(gradients is not None, counts)
    into = Values.of(loss.temperature_N, len(trains) + len(rest))

    def after(first: int) -> RowKernel:
        def row_kernel(piece: Tensor, done: int, logits: Tensor, dlogits: Tensor | None) -> None:
            loss.launch(piece, logits, dlogits, into, first + done, group=group)

        return row_kernel

    # With a vocabulary over ranks, the row kernel needs all-reduces and memory for them, so it must not overlap.
    head.run(trains, after(0), gradients, overlap=group is None)
    head.run(rest, after(len(trains)), overlap=group is None)
    sums = into.sums()
    return loss.total(sums).float(), sums.float(), into.logp_N, into.entropy_N


def run_head(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    group: str,
    rows: list[int],
    counts: list[int],
    wanted: list[bool],
    label_N: Tensor,
    temperature_N: Tensor,
    active_N: Tensor,
    behaviour_logp_N: Tensor | None,
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
    exponent: float,
    shape: str,
    kl_kind: str,
    kl_coefficient: float,
    entropy_coefficient: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, sums in the order of PolicyLossMetrics, logp_N, entropy_N, ∂hidden, ∂weight and fp32 ∂bias.

    ∂weight is in fp32 if it may be the sum of several GEMMs, and else in the dtype of the weight.
    """
    loss = RowLoss(
        label_N, temperature_N, active_N, behaviour_logp_N, advantage_N, row_weight_N, teacher_N, teacher_logp_N,
        importance_weight_N, reference_logp_N, clip_low, clip_high, clip_dual, shaping, exponent, shape,
        kl_kind, kl_coefficient, entropy_coefficient,
    )  # fmt: skip
    process_group, most = group_of(group), loss.most_rows(counts)
    sizes = Rows(*rows).for_count(most)
    single = sizes.in_one(most)
    gradients = Gradients(hidden_NH, weight_VH, bias_V, wanted, single=single) if any(wanted) else None
    head = Head(hidden_NH, weight_VH, bias_V, sizes)
    values = run_policy_head(head, loss, gradients, process_group, counts)
    dhidden_NH, dweight_VH, dbias_V = (None,) * 3 if gradients is None else gradients.result(process_group)
    return (
        *values,
        empty_or(dhidden_NH, hidden_NH),
        empty_or(dweight_VH, temperature_N),
        empty_or(dbias_V, temperature_N),
    )


def fake_values(temperature_N: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors of the shapes of loss, sums, logp_N and entropy_N."""
    shapes = ((), (len(PolicyLossMetrics._fields),), temperature_N.shape, temperature_N.shape)
    return tuple(temperature_N.new_empty(shape) for shape in shapes)


policy_head_op = torch.library.custom_op("hapo_kernels::policy_head", mutates_args=())(run_head)


@policy_head_op.register_fake
def _(hidden_NH, weight_VH, bias_V, group, rows, counts, wanted, *loss):
    dense, fp32 = {"memory_format": torch.contiguous_format}, {"dtype": torch.float32}
    temperature_N, most = loss[1], RowLoss(*loss).most_rows(counts)
    summed = {} if Rows(*rows).in_one(most) else fp32
    return (
        *fake_values(temperature_N),
        torch.empty_like(hidden_NH, **dense) if wanted[0] else hidden_NH.new_empty(0),
        torch.empty_like(weight_VH, **summed, **dense) if wanted[1] else temperature_N.new_empty(0),
        torch.empty_like(bias_V, **fp32, **dense) if wanted[2] else temperature_N.new_empty(0),
    )


def run_from_logits(
    logits_NV: Tensor,
    with_gradient: bool,
    label_N: Tensor,
    temperature_N: Tensor,
    active_N: Tensor,
    behaviour_logp_N: Tensor | None,
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
    exponent: float,
    shape: str,
    kl_kind: str,
    kl_coefficient: float,
    entropy_coefficient: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, sums in the order of PolicyLossMetrics, logp_N, entropy_N, ∂logits (empty without gradient)."""
    loss = RowLoss(
        label_N, temperature_N, active_N, behaviour_logp_N, advantage_N, row_weight_N, teacher_N, teacher_logp_N,
        importance_weight_N, reference_logp_N, clip_low, clip_high, clip_dual, shaping, exponent, shape,
        kl_kind, kl_coefficient, entropy_coefficient,
    )  # fmt: skip
    logits_NV = logits_NV.contiguous()
    into = Values.of(temperature_N, logits_NV.shape[0])
    dlogits_NV = logits_NV.new_empty(logits_NV.shape if with_gradient else 0)
    loss.launch(None, logits_NV, dlogits_NV if with_gradient else None, into, 0)
    sums = into.sums()
    return loss.total(sums).float(), sums.float(), into.logp_N, into.entropy_N, dlogits_NV


from_logits_op = torch.library.custom_op("hapo_kernels::policy_loss_from_logits", mutates_args=())(run_from_logits)


@from_logits_op.register_fake
def _(logits_NV, with_gradient, label_N, temperature_N, *args):
    return *fake_values(temperature_N), logits_NV.new_empty(logits_NV.shape if with_gradient else 0)


def _save(ctx, inputs, output):
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)  # or PyTorch fills a gradient with zeros for each of the outputs
    ctx.save_for_backward(*output[4:])


def _backward(ctx, upstream, *_):
    refuse_double_backward("policy_head")
    if upstream is None:
        return (None,) * ctx.inputs
    consume = consumes(ctx)
    gradients = [
        times_upstream(gradient, upstream, dtype, consume=consume) if needed else None
        for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*gradients, *[None] * (ctx.inputs - len(gradients)))


def _save_logits(ctx, inputs, output):
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[4])


def _backward_logits(ctx, upstream, *_):
    refuse_double_backward("policy_loss_from_logits")
    if upstream is None:
        return (None,) * ctx.inputs
    (dlogits_NV,) = ctx.saved_tensors
    gradient = times_upstream(dlogits_NV, upstream, dlogits_NV.dtype, consume=consumes(ctx))
    return (gradient, *[None] * (ctx.inputs - 1))


policy_head_op.register_autograd(_backward, setup_context=_save)
from_logits_op.register_autograd(_backward_logits, setup_context=_save_logits)
_policy_head = eager(policy_head_op, run_head, _save, _backward, outputs=4)
_policy_loss_from_logits = eager(from_logits_op, run_from_logits, _save_logits, _backward_logits, outputs=4)


def row_loss(
    label_BT: Tensor,
    behaviour_logp_BT: Tensor | None,
    advantage: Tensor,
    active_BT: Tensor,
    *,
    clip: Clip,
    aggregation: Aggregation,
    teacher: Teacher | None,
    importance_weight_BT: Tensor | None,
    kl: KLPenalty | None,
    entropy_coefficient: float,
    temperature_N: Tensor,
) -> RowLoss:
    """Convert the terms of the public functions to tensors with one value per token."""

    def per_token(value: Tensor) -> Tensor:
        value = value if value.ndim == 2 else value[:, None]
        return value.detach().expand_as(active_BT).flatten().contiguous()

    return RowLoss(
        per_token(label_BT),
        temperature_N,
        active_BT.flatten(),
        None if behaviour_logp_BT is None else per_token(behaviour_logp_BT),
        per_token(advantage),
        per_token(row_weight(active_BT, aggregation).float()),
        per_token(teacher.row_B if teacher else torch.zeros_like(active_BT)),
        per_token(teacher.logp_BT) if teacher and teacher.logp_BT is not None else None,
        None if importance_weight_BT is None else per_token(importance_weight_BT),
        per_token(kl.reference_logp_BT) if kl else None,
        clip.low,
        clip.high,
        clip.dual,
        *shape_of(teacher),
        kl.kind if kl else "",
        kl.coefficient if kl else 0.0,
        entropy_coefficient,
    )


def result_of(
    loss: Tensor, sums: Tensor, logp_N: Tensor, entropy_N: Tensor, shape: torch.Size
) -> tuple[Tensor, PolicyLossMetrics, Tensor, Tensor]:
    metrics = PolicyLossMetrics(*sums.detach().unbind())
    return loss, metrics, logp_N.detach().view(shape), entropy_N.detach().view(shape)


def policy_head(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    *tokens: Tensor | None,
    bias_V: Tensor | None,
    vocabulary_group: dist.ProcessGroup | None,
    rows: Rows,
    counts: list[int],
    main_grad_VH: Tensor | None,
    upstream: float,
    **terms,
) -> tuple[Tensor, PolicyLossMetrics, Tensor, Tensor]:
    """See `hapo_kernels.policy_head.policy_head`; tokens and terms are those of `row_loss`."""
    loss, head = row_loss(*tokens, **terms), (hidden_BTH.flatten(0, -2), weight_VH, bias_V)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in head]
    if main_grad_VH is not None and wanted[1]:
        from hapo_kernels.policy_head.main_grad import into_main_grad  # imports torch._dynamo, 3 s

        values = into_main_grad(*head, main_grad_VH, upstream, vocabulary_group, rows, counts, wanted, loss)
    else:
        values = _policy_head(*head, name_of(vocabulary_group), list(rows), counts, wanted, *loss)
    return result_of(*values[:4], hidden_BTH.shape[:-1])


def policy_loss_from_logits(
    logits_BTV: Tensor, *tokens: Tensor | None, **terms
) -> tuple[Tensor, PolicyLossMetrics, Tensor, Tensor]:
    """See `hapo_kernels.policy_head.policy_loss_from_logits`; tokens and terms are those of `row_loss`."""
    loss = row_loss(*tokens, **terms)
    with_gradient = torch.is_grad_enabled() and logits_BTV.requires_grad
    values = _policy_loss_from_logits(logits_BTV.flatten(0, -2), with_gradient, *loss)
    return result_of(*values[:4], logits_BTV.shape[:-1])
