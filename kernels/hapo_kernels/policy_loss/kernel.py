"""The policy loss in one Triton launch: loss, gradient and metrics from one read of the per-token inputs.

A program handles BLOCK tokens of one row and writes their gradient and ten partial sums; the partial sums are then
added in fp64. There are no atomic operations, so two runs give the same bits. The mathematics is in `token_loss`, which
the language-model head of `policy_head` shares.

Traffic per token with fp32 log-probabilities: 4 B policy, 4 B behaviour, 1 B mask, 4 B gradient, and 4 B for each of
teacher, importance weight, reference and entropy, if given.
"""

# Triton passes ints and bools for constexpr parameters and adds num_warps to every launch; pyright knows neither.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hapo_kernels.dispatch import refuse_double_backward
from hapo_kernels.launch import launch_of
from hapo_kernels.policy_loss.reference import row_weight
from hapo_kernels.policy_loss.terms import (
    Aggregation,
    Clip,
    EntropyBonus,
    KLPenalty,
    PolicyLoss,
    PolicyLossMetrics,
    Teacher,
)
from hapo_kernels.upstream import consumes, eager, times_upstream

PARTIALS = tl.constexpr(16)  # ten sums, padded to a power of two, so that a program stores them as one vector

KL_CODE = {"": 0, "k1": 1, "kl": 1, "abs": 2, "k2": 3, "mse": 3, "k3": 4, "low_var_kl": 4}


@triton.jit
def clamp(x, low, high):
    """Clamp x to [low, high]; NaN stays NaN, as in torch.clamp."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def surrogate(log_ratio_raw, advantage, low_edge, high_edge, dual):
    """The clipped surrogate, its ∂/∂log π, whether clip and dual clip hold, and the log-ratio.

    At ties the gradient is shared as in torch's maximum and min.
    """
    log_ratio = clamp(log_ratio_raw, -20.0, 20.0)
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * clamp(ratio, low_edge, high_edge)
    pessimistic = tl.where(clipped > unclipped, clipped, unclipped)
    bound = -advantage * dual
    bounded = (advantage < 0) & (pessimistic > bound)
    loss = tl.where(bounded, bound, pessimistic)
    # Inside the clip range both branches are the same function; outside it the clipped one is flat.
    slope = tl.where(clipped > unclipped, 0.0, unclipped)
    slope = tl.where((log_ratio_raw < -20.0) | (log_ratio_raw > 20.0), 0.0, slope)
    slope = tl.where(bounded, 0.0, tl.where((advantage < 0) & (pessimistic == bound), 0.5 * slope, slope))
    return loss, slope, clipped > unclipped, bounded, log_ratio


# The case that `shaped` computes is fixed when the kernel is compiled, so that exponents 0 and 1 need no pow.
SIGMOID, LOG_SIGMOID, POWER, LIKELIHOOD, LOG_LIKELIHOOD, LIKELIHOOD_POWER, TRSFT, CHORD = map(tl.constexpr, range(8))


def shape_code(shape: str, shaping: float, exponent: float) -> int:
    """The constant above for a teacher's shape."""
    if shape != "power":
        return {"trsft": TRSFT, "chord": CHORD}[shape].value
    one, zero, between = (
        (LIKELIHOOD, LOG_LIKELIHOOD, LIKELIHOOD_POWER) if shaping == math.inf else (SIGMOID, LOG_SIGMOID, POWER)
    )
    return (one if exponent == 1 else zero if exponent == 0 else between).value


def shape_of(teacher: Teacher | None) -> tuple[float, float, str]:
    """λ, κ and shape for the custom ops; without a teacher the values do not matter."""
    return (teacher.shaping, teacher.exponent, teacher.shape) if teacher else (1.0, 1.0, "power")


def log_of(shaping: float) -> float:
    """log λ for the kernels; 0 for λ = inf, where they do not read it."""
    return 0.0 if shaping == math.inf else math.log(shaping)


@triton.jit
def log1p(x):
    """log(1 + x) to fp32 rounding, x >= 0."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / tl.where(sum == 1.0, 1.0, sum - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 to fp32 rounding, x <= 0."""
    y = tl.exp(x)
    # Below 2^-25 the result rounds to -1, and the formula would be inexact there.
    small = y < 2.0e-8
    quotient = x / tl.log(tl.where(small | (y == 1.0), 0.5, y))
    return tl.where(y == 1.0, x, tl.where(small, -1.0, (y - 1.0) * quotient))


@triton.jit
def shaped(log_q, advantage, log_shaping, exponent, SHAPE: tl.constexpr):
    """-A F(q) and its ∂/∂log π for the teacher's shape; the formulas are those of `reference.shaped`."""
    u = log_q - log_shaping
    if SHAPE == SIGMOID:
        # f (1-f), multiplied in this order: another one would change the bits.
        value = tl.sigmoid(u)
        return -advantage * value, -advantage * value * tl.sigmoid(-u)
    if SHAPE == LIKELIHOOD:
        value = tl.exp(log_q)
        weight = value
    elif SHAPE == LOG_LIKELIHOOD:
        value, weight = log_q, tl.full(log_q.shape, 1.0, tl.float32)
    elif SHAPE == LIKELIHOOD_POWER:
        value, weight = expm1(exponent * log_q) / exponent, tl.exp(exponent * log_q)
    elif SHAPE == TRSFT:
        value = tl.where(u < 0, tl.exp(tl.where(u < 0, u, 0.0)), 1.0 + u)
        weight = tl.where(u < 0, value, 1.0)
    elif SHAPE == CHORD:
        rest = -expm1(log_q)
        value, weight = 0.5 - 0.5 * rest * rest, tl.exp(log_q) * rest
    else:
        log_f = tl.where(u < 0, u, 0.0) - log1p(tl.exp(-tl.abs(u)))
        if SHAPE == LOG_SIGMOID:
            value, weight = log_f, tl.sigmoid(-u)
        else:
            value, weight = expm1(exponent * log_f) / exponent, tl.exp(exponent * log_f) * tl.sigmoid(-u)
    return -advantage * value, -advantage * weight


@triton.jit
def kl_penalty(policy, reference, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """Estimate of KL(π || π_ref) and its ∂/∂log π; with STRAIGHT_THROUGH the gradient is k2's."""
    k1 = policy - reference
    if KL == 1:
        value, slope = k1, tl.full(k1.shape, 1.0, tl.float32)
    elif KL == 2:
        value = tl.abs(k1)
        slope = tl.where(k1 > 0, 1.0, tl.where(k1 < 0, -1.0, 0.0))
    elif KL == 3:
        value, slope = 0.5 * k1 * k1, k1
    else:
        log_r = clamp(-k1, -20.0, 20.0)
        r = tl.exp(log_r)
        unbounded = r - log_r - 1.0
        value = clamp(unbounded, -10.0, 10.0)
        slope = tl.where((k1 > 20.0) | (k1 < -20.0) | (unbounded > 10.0), 0.0, 1.0 - r)
    if STRAIGHT_THROUGH:
        slope = k1
    return value, slope


@triton.jit
def token_loss(
    policy,
    behaviour,
    advantage,
    is_teacher,
    teacher,
    weight,
    reference,
    low_edge,
    high_edge,
    dual,
    log_shaping,
    exponent,
    SHAPE: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
):
    """Per token: policy loss and its slope, KL and its slope, clip flags, log-ratio.

    Clip flags, log-ratio and KL are meaningful on on-policy tokens only; the caller must select these.
    """
    on_loss, on_slope, clipped, bounded, log_ratio = surrogate(policy - behaviour, advantage, low_edge, high_edge, dual)
    teacher_loss, teacher_slope = shaped(policy - teacher, advantage, log_shaping, exponent, SHAPE)
    loss = tl.where(is_teacher, teacher_loss, weight * on_loss)
    slope = tl.where(is_teacher, teacher_slope, weight * on_slope)
    if KL == 0:
        kl, kl_slope = tl.zeros_like(loss), tl.zeros_like(loss)
    else:
        kl, kl_slope = kl_penalty(policy, reference, KL, STRAIGHT_THROUGH)
    return loss, slope, kl, kl_slope, clipped, bounded, log_ratio


@triton.jit
def policy_loss_kernel(
    policy_ptr,
    behaviour_ptr,
    advantage_ptr,
    mask_ptr,
    row_weight_ptr,
    teacher_row_ptr,
    teacher_ptr,
    weight_ptr,
    reference_ptr,
    entropy_ptr,
    gradient_ptr,
    partial_ptr,
    T,
    advantage_stride,
    low_edge,
    high_edge,
    dual,
    log_shaping,
    exponent,
    kl_coefficient,
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_TEACHER_LOGP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SHAPE: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(T, BLOCK)
    i_row, i_block = i_program // blocks, i_program % blocks
    o_token = i_block * BLOCK + tl.arange(0, BLOCK)
    m_token = o_token < T
    o = i_row * T + o_token

    # Loads are masked only by the end of the row, since a mask from memory would prevent 128-bit loads. NaN and inf at
    # inactive tokens pass through the arithmetic and are dropped at the end.
    active = tl.load(mask_ptr + o, mask=m_token, other=0) != 0
    is_teacher = tl.full((BLOCK,), 0, tl.int1)
    if HAS_TEACHER:
        is_teacher = active & (tl.load(teacher_row_ptr + i_row) != 0)
    on = active & (is_teacher == 0)

    policy = tl.load(policy_ptr + o, mask=m_token, other=0.0).to(tl.float32)
    behaviour = tl.load(behaviour_ptr + o, mask=m_token, other=0.0).to(tl.float32)
    if ADVANTAGE_PER_TOKEN:
        advantage = tl.load(advantage_ptr + i_row * advantage_stride + o_token, mask=m_token, other=0.0).to(tl.float32)
    else:
        advantage = tl.load(advantage_ptr + i_row * advantage_stride).to(tl.float32) + tl.zeros_like(policy)
    teacher, weight, reference = 0.0, 1.0, policy
    if HAS_TEACHER_LOGP:
        teacher = tl.load(teacher_ptr + o, mask=m_token, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + o, mask=m_token, other=0.0).to(tl.float32)
    if KL > 0:
        reference = tl.load(reference_ptr + o, mask=m_token, other=0.0).to(tl.float32)

    loss, slope, kl, kl_slope, clipped, bounded, log_ratio = token_loss(
        policy, behaviour, advantage, is_teacher, teacher, weight, reference,
        low_edge, high_edge, dual, log_shaping, exponent, SHAPE, KL, STRAIGHT_THROUGH,
    )  # fmt: skip

    row_weight = tl.load(row_weight_ptr + i_row)
    o_partial = tl.arange(0, PARTIALS)
    sums = tl.zeros((PARTIALS,), tl.float32)
    sums = tl.where(o_partial == 0, row_weight * tl.sum(tl.where(on, loss, 0.0)), sums)
    sums = tl.where(o_partial == 4, tl.sum(on.to(tl.float32)), sums)
    sums = tl.where(o_partial == 6, tl.sum((on & clipped).to(tl.float32)), sums)
    sums = tl.where(o_partial == 7, tl.sum((on & bounded).to(tl.float32)), sums)
    sums = tl.where(o_partial == 8, -tl.sum(tl.where(on, log_ratio, 0.0)), sums)
    if HAS_TEACHER:
        sums = tl.where(o_partial == 1, row_weight * tl.sum(tl.where(is_teacher, loss, 0.0)), sums)
        sums = tl.where(o_partial == 5, tl.sum(is_teacher.to(tl.float32)), sums)
        sums = tl.where(o_partial == 9, tl.sum(tl.where(is_teacher, tl.exp(policy), 0.0)), sums)
    if KL > 0:
        sums = tl.where(o_partial == 2, row_weight * tl.sum(tl.where(on, kl, 0.0)), sums)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + o, mask=m_token, other=0.0).to(tl.float32)
        sums = tl.where(o_partial == 3, row_weight * tl.sum(tl.where(active, entropy, 0.0)), sums)
    tl.store(partial_ptr + i_program * PARTIALS + o_partial, sums)

    if HAS_GRADIENT:
        gradient = tl.where(active, row_weight * slope, 0.0)
        if KL > 0:
            gradient += tl.where(on, row_weight * kl_coefficient * kl_slope, 0.0)
        tl.store(gradient_ptr + o, gradient.to(gradient_ptr.dtype.element_ty), mask=m_token)


def run_policy_loss(
    policy_logp_BT: Tensor,
    behaviour_logp_BT: Tensor,
    advantage: Tensor,
    mask_BT: Tensor,
    row_weight_B: Tensor,
    teacher_row_B: Tensor | None,
    teacher_logp_BT: Tensor | None,
    importance_weight_BT: Tensor | None,
    reference_logp_BT: Tensor | None,
    entropy_BT: Tensor | None,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
    shaping: float,
    exponent: float,
    shape: str,
    kl_kind: str,
    kl_coefficient: float,
    entropy_coefficient: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss (0-d fp32), sums in the order of PolicyLossMetrics (fp32), ∂loss/∂policy_logp_BT (may be empty)."""
    B, T = policy_logp_BT.shape
    block, warps, _ = launch_of("policy_loss", policy_logp_BT.device, policy_logp_BT.dtype)
    gradient_BT = torch.empty_like(policy_logp_BT, memory_format=torch.contiguous_format) if with_gradient else None
    programs = B * triton.cdiv(T, block)
    partial = torch.empty(programs, PARTIALS.value, dtype=torch.float32, device=policy_logp_BT.device)
    if programs:
        # For absent inputs any pointer will do, since their flags keep the kernel from reading it.
        absent = policy_logp_BT
        policy_loss_kernel[(programs,)](
            policy_logp_BT.contiguous(),
            behaviour_logp_BT.contiguous(),
            advantage.contiguous(),
            mask_BT.bool().contiguous().view(torch.uint8),
            row_weight_B,
            absent if teacher_row_B is None else teacher_row_B.contiguous().view(torch.uint8),
            absent if teacher_logp_BT is None else teacher_logp_BT.contiguous(),
            absent if importance_weight_BT is None else importance_weight_BT.contiguous(),
            absent if reference_logp_BT is None else reference_logp_BT.contiguous(),
            absent if entropy_BT is None else entropy_BT.contiguous(),
            absent if gradient_BT is None else gradient_BT,
            partial,
            T,
            T if advantage.ndim == 2 else 1,
            1.0 - clip_low,
            1.0 + clip_high,
            clip_dual,
            log_of(shaping),
            exponent,
            kl_coefficient,
            ADVANTAGE_PER_TOKEN=advantage.ndim == 2,
            HAS_TEACHER=teacher_row_B is not None,
            HAS_TEACHER_LOGP=teacher_logp_BT is not None,
            HAS_WEIGHT=importance_weight_BT is not None,
            SHAPE=shape_code(shape, shaping, exponent),
            KL=KL_CODE[kl_kind.removesuffix("+")],
            STRAIGHT_THROUGH=kl_kind.endswith("+"),
            HAS_ENTROPY=entropy_BT is not None,
            HAS_GRADIENT=with_gradient,
            BLOCK=block,
            num_warps=warps,
        )
    sums = partial.double().sum(0)[: len(PolicyLossMetrics._fields)]
    loss = sums[0] + sums[1] + kl_coefficient * sums[2] - entropy_coefficient * sums[3]
    return loss.float(), sums.float(), partial.new_empty(0) if gradient_BT is None else gradient_BT


policy_loss_op = torch.library.custom_op("hapo_kernels::policy_loss", mutates_args=())(run_policy_loss)


@policy_loss_op.register_fake
def _(policy_logp_BT, *args):
    with_gradient = args[-1]
    gradient = torch.empty_like(policy_logp_BT, memory_format=torch.contiguous_format)
    fp32 = {"dtype": torch.float32, "device": policy_logp_BT.device}
    return (
        torch.empty((), **fp32),
        torch.empty(len(PolicyLossMetrics._fields), **fp32),
        gradient if with_gradient else torch.empty(0, **fp32),
    )


def _save(ctx, inputs, output):
    mask_BT, row_weight_B, entropy_BT, entropy_coefficient = inputs[3], inputs[4], inputs[9], inputs[18]
    ctx.entropy_coefficient, ctx.entropy_dtype = entropy_coefficient, None if entropy_BT is None else entropy_BT.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], mask_BT, row_weight_B)


def _backward(ctx, upstream, *_):
    refuse_double_backward("policy_loss")
    if upstream is None:
        return (None,) * 20
    gradient_BT, mask_BT, row_weight_B = ctx.saved_tensors
    policy = None
    if ctx.needs_input_grad[0]:
        policy = times_upstream(gradient_BT, upstream, gradient_BT.dtype, consume=consumes(ctx))
    entropy = None
    if ctx.needs_input_grad[9]:
        slope_B = -ctx.entropy_coefficient * upstream * row_weight_B
        entropy = torch.where(mask_BT.bool(), slope_B[:, None], 0.0).to(ctx.entropy_dtype)
    return (policy, *[None] * 8, entropy, *[None] * 10)


policy_loss_op.register_autograd(_backward, setup_context=_save)
_policy_loss = eager(policy_loss_op, run_policy_loss, _save, _backward, outputs=2)


def policy_loss(
    policy_logp_BT: Tensor,
    behaviour_logp_BT: Tensor,
    advantage: Tensor,
    mask_BT: Tensor,
    *,
    clip: Clip,
    aggregation: Aggregation,
    teacher: Teacher | None,
    importance_weight_BT: Tensor | None,
    kl: KLPenalty | None,
    entropy: EntropyBonus | None,
) -> PolicyLoss:
    """See `hapo_kernels.policy_loss.policy_loss`."""
    spent = None
    if entropy is not None:
        spent = entropy.entropy_BT if entropy.coefficient else entropy.entropy_BT.detach()
    loss, sums, *_ = _policy_loss(
        policy_logp_BT,
        behaviour_logp_BT.detach(),
        advantage.detach(),
        mask_BT,
        row_weight(mask_BT.bool(), aggregation).float(),
        teacher.row_B if teacher else None,
        teacher.logp_BT.detach() if teacher and teacher.logp_BT is not None else None,
        None if importance_weight_BT is None else importance_weight_BT.detach(),
        kl.reference_logp_BT.detach() if kl else None,
        spent,
        clip.low,
        clip.high,
        clip.dual,
        *shape_of(teacher),
        kl.kind if kl else "",
        kl.coefficient if kl else 0.0,
        entropy.coefficient if entropy else 0.0,
        torch.is_grad_enabled() and policy_logp_BT.requires_grad,
    )
    return PolicyLoss(loss, PolicyLossMetrics(*sums.detach().unbind()))
