"""The policy loss from hidden states and the language-model head, with the gradient computed in the forward pass.

The loss of a token depends only on its own log-probability (`hapo_kernels.policy_loss`), and the normalisers of the
global batch are known before the forward pass. So once a row's softmax statistics are computed, the gradient

    ∂loss/∂x_v = (w/τ) [ ℓ' (1{v=y} - p_v) + c_H p_v (log p_v + H) ],    ℓ' = ∂ℓ/∂log π of the token, w its row's weight

can be computed while the chunk's logits x are still in memory. This takes 3 GEMMs, 6NHV flops (4NHV with a frozen
weight); a head that computes the logits again in the backward pass takes 8NHV. N counts active tokens only. Tokens
whose gradient is exactly 0 (advantage 0, no KL, no entropy term) need only the forward GEMM, 2HV flops each. The
backward pass only multiplies by the upstream scalar.

For a loss that is not a sum over tokens, such as one with a ratio of whole sequences, the gradient of a row is not
known at that point. Use `linear_logprob`, whose backward pass computes the logits again, and any loss on its result.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from hapo_kernels.dispatch import Impl, use_triton
from hapo_kernels.linear_logprob import check_head, check_labels, check_main_grad, temperature_of, vocabulary_size
from hapo_kernels.memory import pieces
from hapo_kernels.policy_head import reference
from hapo_kernels.policy_loss import Aggregation, Clip, KLPenalty, PolicyLossMetrics, Teacher, check_tokens

__all__ = ["PolicyHead", "policy_head", "policy_loss_from_logits"]


class PolicyHead(NamedTuple):
    """The results of the head."""

    loss: Tensor  # 0-d, differentiable with respect to hidden, weight and bias, or to the logits
    metrics: PolicyLossMetrics
    logp_BT: Tensor  # nats, no gradient; 0 where mask_BT is 0
    entropy_BT: Tensor  # nats, no gradient; 0 where mask_BT is 0


def policy_head(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    label_BT: Tensor,
    behaviour_logp_BT: Tensor | None,
    advantage: Tensor,
    mask_BT: Tensor,
    *,
    clip: Clip,
    aggregation: Aggregation,
    teacher: Teacher | None = None,
    importance_weight_BT: Tensor | None = None,
    kl: KLPenalty | None = None,
    entropy_coefficient: float = 0.0,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocabulary_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    collect_rows: int | None = None,
    memory_gib: float | None = None,
    active_tokens: int | None = None,
    training_tokens: int | None = None,
    main_grad_VH: Tensor | None = None,
    upstream: float = 1.0,
    impl: Impl = "auto",
) -> PolicyHead:
    """`policy_loss` on the log-probabilities of `linear_logprob`, in one pass.

    Args:
        hidden_BTH: hidden states; the one at a position predicts label_BT at the same position.
        weight_VH: the head, or this rank's slice of it as for `linear_logprob`.
        label_BT: int32 or int64 ids of the chosen tokens; only active ones are read. A label outside [0, V) gives NaN,
            and an error with HAPO_KERNELS_DEBUG=1.
        behaviour_logp_BT ... kl: as for `policy_loss`.
        entropy_coefficient: c_H of - c_H · agg(H); with 0.0 the entropy is only measured.
        bias_V, chunk_rows, collect_rows, memory_gib: as for `linear_logprob`.
        active_tokens: the number of tokens that the mask keeps, if the caller knows it; else the host waits for the
            device once, or twice if tokens with advantage 0 need no gradient. A wrong number is an error; on a GPU it
            is checked by an assertion on the device, without waiting.
        training_tokens: the number of these tokens with a nonzero advantage. If only active_tokens is given, all active
            tokens enter every GEMM, and a gradient of 0 is computed for tokens with advantage 0.
        main_grad_VH: fp32 tensor of the caller. The forward pass adds `upstream` times the weight's gradient to it, and
            the weight gets no gradient from autograd. So every forward pass that tracks gradients must have its
            backward pass, and none may run twice (as with activation checkpointing).
        upstream: ∂(the tensor on which `backward` is called)/∂(this loss), used with main_grad_VH only. If the backward
            pass gets another value, that is an error; on a GPU it is checked on the device, without waiting.
        temperature: τ > 0, one number or one per token (B, T).
        vocabulary_group: ranks that each hold a slice of V. They must pass the same batch, and all get the whole loss,
            metrics and ∂hidden; a chunk costs two all-reduces of at most three numbers per row.

    Raises:
        ValueError, TypeError: if arguments do not fit together.
    """
    flat_hidden = hidden_BTH.flatten(0, -2)
    flat_temperature = temperature.flatten() if isinstance(temperature, Tensor) else temperature
    active_BT = mask_BT.bool()
    check_head(flat_hidden, weight_VH, label_BT.flatten(), bias_V, flat_temperature, active_BT.flatten())
    _check_tokens(behaviour_logp_BT, advantage, mask_BT, teacher, importance_weight_BT, kl)
    _check_positions("hidden_BTH", hidden_BTH, label_BT, mask_BT)
    V = vocabulary_size(weight_VH, vocabulary_group)
    check_labels("label_BT", label_BT, active_BT, V, "Switch the token off in mask_BT.")
    check_main_grad(main_grad_VH, weight_VH)
    if training_tokens is not None and active_tokens is None:
        raise ValueError(f"training_tokens={training_tokens}: without active_tokens it says nothing. Pass both.")
    if use_triton(impl, hidden_BTH, weight_VH, advantage):
        from hapo_kernels.policy_head import kernel  # not before it is needed: Triton may be absent on a CPU

        rows = pieces(weight_VH, chunk=chunk_rows, collected=collect_rows, memory_gib=memory_gib)
        counts = [count for count in (active_tokens, training_tokens) if count is not None]
        run = functools.partial(kernel.policy_head, rows=rows, counts=counts, upstream=upstream)
    else:
        run = reference.policy_head
    return PolicyHead(
        *run(
            hidden_BTH,
            weight_VH,
            label_BT.long(),
            behaviour_logp_BT,
            advantage,
            active_BT,
            clip=clip,
            aggregation=aggregation,
            teacher=teacher,
            importance_weight_BT=importance_weight_BT,
            kl=kl,
            entropy_coefficient=entropy_coefficient,
            bias_V=bias_V,
            temperature_N=temperature_of(flat_temperature, flat_hidden),
            vocabulary_group=vocabulary_group,
            main_grad_VH=main_grad_VH,
        )
    )


def policy_loss_from_logits(
    logits_BTV: Tensor,
    label_BT: Tensor,
    behaviour_logp_BT: Tensor | None,
    advantage: Tensor,
    mask_BT: Tensor,
    *,
    clip: Clip,
    aggregation: Aggregation,
    teacher: Teacher | None = None,
    importance_weight_BT: Tensor | None = None,
    kl: KLPenalty | None = None,
    entropy_coefficient: float = 0.0,
    temperature: float | Tensor = 1.0,
    impl: Impl = "auto",
) -> PolicyHead:
    """The same loss from existing logits, with two sweeps per row and no GEMM.

    Args:
        logits_BTV: the gradient flows here and has the same size; inactive positions are not read and get 0.
        label_BT ... temperature: as for `policy_head`.
    """
    active_BT = mask_BT.bool()
    flat_temperature = temperature.flatten() if isinstance(temperature, Tensor) else temperature
    flat_logits = logits_BTV.flatten(0, -2)
    # Reuse the checks of a head, with dummy hidden states and weight.
    one_by_one = flat_logits.new_empty(1, 1)
    check_head(flat_logits[:, :1], one_by_one, label_BT.flatten(), None, flat_temperature, active_BT.flatten())
    _check_tokens(behaviour_logp_BT, advantage, mask_BT, teacher, importance_weight_BT, kl)
    _check_positions("logits_BTV", logits_BTV, label_BT, mask_BT)
    check_labels("label_BT", label_BT, active_BT, logits_BTV.shape[-1], "Switch the token off in mask_BT.")
    if use_triton(impl, logits_BTV, advantage):
        from hapo_kernels.policy_head import kernel

        run = kernel.policy_loss_from_logits
    else:
        run = reference.policy_loss_from_logits
    return PolicyHead(
        *run(
            logits_BTV,
            label_BT.long(),
            behaviour_logp_BT,
            advantage,
            active_BT,
            clip=clip,
            aggregation=aggregation,
            teacher=teacher,
            importance_weight_BT=importance_weight_BT,
            kl=kl,
            entropy_coefficient=entropy_coefficient,
            temperature_N=temperature_of(flat_temperature, flat_logits),
        )
    )


def _check_tokens(
    behaviour_logp_BT: Tensor | None,
    advantage: Tensor,
    mask_BT: Tensor,
    teacher: Teacher | None,
    importance_weight_BT: Tensor | None,
    kl: KLPenalty | None,
) -> None:
    # The policy's log-probabilities do not exist yet; they will have the shape of the mask.
    logp_BT = mask_BT.float() if behaviour_logp_BT is None else behaviour_logp_BT
    check_tokens(logp_BT, logp_BT, advantage, mask_BT, teacher, importance_weight_BT, kl, None)


def _check_positions(name: str, state: Tensor, label_BT: Tensor, mask_BT: Tensor) -> None:
    if state.ndim != 3 or not state.shape[:2] == label_BT.shape == mask_BT.shape:
        raise ValueError(
            f"{name} of shape {tuple(state.shape)}: three axes, the first two those of the labels "
            f"{tuple(label_BT.shape)} and of the mask {tuple(mask_BT.shape)}. Pass what predicts each token."
        )
