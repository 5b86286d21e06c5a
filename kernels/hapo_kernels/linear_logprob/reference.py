"""Log-probabilities and entropy of a language-model head in PyTorch, from whole logits, with autograd's gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    label_N: Tensor,
    temperature_N: Tensor,
    bias_V: Tensor | None,
    keep_N: Tensor,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """See `hapo_kernels.linear_logprob.linear_logprob`."""
    row = keep_N.nonzero()[:, 0]
    return from_logits(logits(hidden_NH[row], weight_VH, bias_V), label_N, temperature_N, row, with_entropy)


def from_logits(
    logits_RV: Tensor, label_N: Tensor, temperature_N: Tensor, row: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """logp_N and entropy_N from the logits of the rows `row`; 0 on the others."""
    logp_RV = torch.log_softmax(logits_RV / temperature_N[row, None], dim=-1)
    label, inside = clamped(label_N[row], logp_RV.shape[1])
    logp = torch.where(inside, logp_RV.gather(1, label[:, None])[:, 0], torch.nan)
    zero_N = logp_RV.new_zeros(len(label_N))
    if not with_entropy:
        return zero_N.index_put((row,), logp), zero_N
    # p log p is 0 for p = 0; with log p = -inf it would be NaN.
    finite_RV = logp_RV.masked_fill(logp_RV == -torch.inf, 0.0)
    return zero_N.index_put((row,), logp), zero_N.index_put((row,), -(logp_RV.exp() * finite_RV).sum(1))


def logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """The logits (N, V), in fp32 or, for fp64 input, in fp64."""
    dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    logits_NV = hidden_NH.to(dtype) @ weight_VH.to(dtype).T
    return logits_NV if bias_V is None else logits_NV + bias_V.to(dtype)


def clamped(label_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The labels clamped to valid ids, so that they can be gathered, and a mask of those that were valid."""
    return label_N.clamp(0, max(size - 1, 0)), (label_N >= 0) & (label_N < size)


def combine(
    max_N: Tensor, sum_N: Tensor, weighted_N: Tensor, label_logit_N: Tensor, temperature_N: Tensor, group
) -> tuple:
    """Combine the row statistics of the slices of a vocabulary into those of the whole vocabulary.

    max = max x,  sum = Σ e^d,  weighted = Σ d e^d  with  d = (x - max)/τ;  label_logit is 0 on ranks without the label.
    """
    whole_max_N = max_N.clone()
    dist.all_reduce(whole_max_N, dist.ReduceOp.MAX, group=group)
    # A slice with only -inf has sum 0; its shift is kept finite, so that 0 · shift is 0.
    shift_N = ((max_N - whole_max_N) / temperature_N).clamp(min=-1e30)
    scale_N = shift_N.exp()
    sums_3N = torch.stack([scale_N * sum_N, scale_N * (weighted_N + sum_N * shift_N), label_logit_N])
    dist.all_reduce(sums_3N, group=group)
    return whole_max_N, *sums_3N


class _VocabularyParallel(torch.autograd.Function):
    """The vocabulary-parallel head; its gradient is explicit, because autograd does not follow the all-reduces."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, label_N, temperature_N, bias_V, group):
        V = weight_VH.shape[0]
        logits_NV = logits(hidden_NH, weight_VH, bias_V)
        max_N = logits_NV.amax(1).clamp(min=torch.finfo(torch.float32).min)
        d_NV = ((logits_NV - max_N[:, None]) / temperature_N[:, None]).clamp(min=-1e30)
        label, here = clamped(label_N - dist.get_rank(group) * V, V)
        label_logit_N = torch.where(here, logits_NV.gather(1, label[:, None])[:, 0], 0.0)
        max_N, sum_N, weighted_N, label_logit_N = combine(
            max_N, d_NV.exp().sum(1), (d_NV * d_NV.exp()).sum(1), label_logit_N, temperature_N, group
        )
        log_sum_N = sum_N.log()
        inside = clamped(label_N, V * dist.get_world_size(group))[1]
        logp_N = torch.where(inside, (label_logit_N - max_N) / temperature_N - log_sum_N, torch.nan)
        entropy_N = log_sum_N - weighted_N / sum_N
        ctx.save_for_backward(hidden_NH, weight_VH, label, here, temperature_N, bias_V, max_N, log_sum_N, entropy_N)
        ctx.group = group
        return logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope_N, entropy_slope_N):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_NH, weight_VH, label, here, temperature_N, bias_V, max_N, log_sum_N, entropy_N = ctx.saved_tensors
        logp_NV = (logits(hidden_NH, weight_VH, bias_V) - max_N[:, None]) / temperature_N[:, None] - log_sum_N[:, None]
        p_NV = logp_NV.exp()
        dlogits_NV = -slope_N[:, None] * p_NV
        dlogits_NV -= entropy_slope_N[:, None] * p_NV * (logp_NV.clamp(min=-1e30) + entropy_N[:, None])
        dlogits_NV.scatter_add_(1, label[:, None], (slope_N * here)[:, None])
        dlogits_NV /= temperature_N[:, None]
        dhidden_NH = dlogits_NV @ weight_VH.to(dlogits_NV.dtype)
        dist.all_reduce(dhidden_NH, group=ctx.group)
        dweight_VH = (dlogits_NV.T @ hidden_NH.to(dlogits_NV.dtype)).to(weight_VH.dtype)
        dbias_V = None if bias_V is None else dlogits_NV.sum(0).to(bias_V.dtype)
        return dhidden_NH.to(hidden_NH.dtype), dweight_VH, None, None, dbias_V, None


class _AddsTo(torch.autograd.Function):
    """Returns the weight unchanged; its backward adds the gradient to a tensor of the caller."""

    @staticmethod
    def forward(ctx, weight_VH, main_grad_VH):
        ctx.main_grad_VH = main_grad_VH
        return weight_VH.view_as(weight_VH)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient_VH):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.main_grad_VH.add_(gradient_VH)
        return None, None


def adds_to(main_grad_VH: Tensor, weight_VH: Tensor) -> Tensor:
    """Returns `weight_VH` so that the backward pass adds its gradient to `main_grad_VH`, and to nothing else."""
    return _AddsTo.apply(weight_VH, main_grad_VH)


def vocabulary_parallel(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    label_N: Tensor,
    temperature_N: Tensor,
    bias_V: Tensor | None,
    keep_N: Tensor,
    with_entropy: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` with a slice of V on each rank of `group`; every rank gets the whole result and ∂hidden."""
    row = keep_N.nonzero()[:, 0]
    logp, entropy = _VocabularyParallel.apply(
        hidden_NH[row], weight_VH, label_N[row], temperature_N[row], bias_V, group
    )
    zero_N = logp.new_zeros(len(keep_N))
    entropy_N = zero_N.index_put((row,), entropy) if with_entropy else zero_N
    return zero_N.index_put((row,), logp), entropy_N
