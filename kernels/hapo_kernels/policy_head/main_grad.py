"""The head for a caller who keeps the gradient of the weight in a tensor of its own.

A module of its own because it needs `torch.compiler.disable`, which imports torch._dynamo: 3 s.
"""

from __future__ import annotations

import torch

from hapo_kernels.dispatch import refuse_double_backward
from hapo_kernels.linear_logprob.chunked import Gradients, Head
from hapo_kernels.policy_head.kernel import run_policy_head
from hapo_kernels.upstream import times_upstream


class _IntoMainGrad(torch.autograd.Function):
    """`policy_head_op`, but adds `upstream · ∂weight` to a tensor of the caller, which a functional op must not do."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, main_grad_VH, upstream, group, rows, counts, wanted, loss):
        gradients = Gradients(hidden_NH, weight_VH, bias_V, wanted, main_grad_VH, upstream)
        values = run_policy_head(Head(hidden_NH, weight_VH, bias_V, rows), loss, gradients, group, counts)
        dhidden_NH, _, dbias_V = gradients.result(group)
        ctx.upstream, ctx.dtypes = (
            upstream,
            (hidden_NH.dtype, loss.temperature_N.dtype if bias_V is None else bias_V.dtype),
        )
        ctx.save_for_backward(dhidden_NH, dbias_V)
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx, upstream, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_double_backward("policy_head")
        message = (
            f"policy_head: main_grad_VH was given upstream={ctx.upstream}, and the backward pass brings another one."
        )
        torch.ops.aten._assert_async.msg(torch.isclose(upstream, torch.full_like(upstream, ctx.upstream)), message)
        hidden, bias = (
            None if gradient is None else times_upstream(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden, None, bias, *[None] * 7


# torch.compile must not trace into the kernels, which are not inside a custom op here.
into_main_grad = torch.compiler.disable(_IntoMainGrad.apply)
