"""Log-probability of each chosen token, and entropy, from hidden states and the language-model head.

    x = h Wᵀ + b,    d_v = (x_v - m)/τ,    log π(y) = d_y - log Σ_v e^{d_v},    H = log Σ_v e^{d_v} - Σ_v p_v d_v

with m = max x, so that no exponential overflows and H is a sum of two non-negative terms. The (N, V) logits are never
stored as a whole: for one chunk of rows at a time, the vendor's GEMM computes fp32 logits and one kernel sweep computes
the statistics. The backward pass computes the chunk again (`chunked`):

    ∂/∂x_v = (1/τ) [ g (1{v=y} - p_v) - g_H p_v (log p_v + H) ],    g, g_H the upstream gradients of log π and H

Work: 2NHV flops forward, 6NHV backward (4NHV with a frozen weight). N counts only rows that are kept, and backward only
those whose upstream gradient is not 0. Rows that do not train never enter a GEMM.

Vocabulary-parallel: each rank of a process group holds a contiguous slice of V. Forward, the ranks exchange only four
numbers per row; backward, ∂h is summed over the ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hapo_kernels.dispatch import Impl, debug, use_triton
from hapo_kernels.linear_logprob import reference
from hapo_kernels.memory import pieces

__all__ = ["LinearLogprob", "linear_logprob"]

IGNORED = -100


class LinearLogprob(NamedTuple):
    """The results of the head, one value per row."""

    logp_N: Tensor  # nats, fp32 (fp64 for fp64 input); exactly 0 on rows that are not kept
    entropy_N: Tensor  # nats; exactly 0 on rows that are not kept, and everywhere without with_entropy


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    label_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    keep_N: Tensor | None = None,
    with_entropy: bool = False,
    vocabulary_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    collect_rows: int | None = None,
    memory_gib: float | None = None,
    kept_rows: int | None = None,
    main_grad_VH: Tensor | None = None,
    impl: Impl = "auto",
) -> LinearLogprob:
    """log π(label) and entropy of softmax((h Wᵀ + b) / τ), differentiable in hidden, weight and bias.

    Args:
        hidden_NH: hidden states of the rows; flatten (B, T, H) first.
        weight_VH: the head, or this rank's slice of it in rank order, all slices of equal size. A frozen weight costs
            no gradient work; for a weight tied to the embedding, autograd adds the gradients.
        label_N: int32 or int64 token ids of the whole vocabulary. -100 leaves a row out. Any other label outside
            [0, V) gives NaN, and an error with HAPO_KERNELS_DEBUG=1.
        bias_V: bias of the head.
        temperature: τ > 0, one number or one per row (N,).
        keep_N: bool, rows to compute; default all. The values of other rows are not read.
        with_entropy: also compute H. This costs nothing in the forward sweep; its gradient is computed if needed.
        vocabulary_group: ranks that each hold a slice of V. They must pass the same rows and upstream gradients, and
            all get the whole result and ∂hidden.
        chunk_rows: rows of fp32 logits held at once. Every chunk is padded to this size, so that the bits of a row do
            not depend on the number of rows. The default takes at most 1 GiB.
        collect_rows: rows whose ∂logits, in the storage dtype, are collected for one GEMM of the weight's gradient,
            rounded down to whole chunks. The default is 4,096, or as many as fit into 2 GiB of 16-bit numbers.
        memory_gib: chooses both, so that logits, ∂logits and the weight's gradient in fp32 fit into this many GiB. The
            minimum is the memory of the gradient, in fp32 and converted (`hapo_kernels.memory`). The reference
            computes all rows at once and ignores all three.
        kept_rows: the number of kept rows (keep_N, and no label of -100), if the caller knows it; else the host waits
            for the device once in each pass. With it, nothing waits, but the backward pass computes every kept row,
            even if its upstream gradient is 0. A wrong number is an error; on a GPU it is checked by an assertion on
            the device, without waiting.
        main_grad_VH: fp32 tensor of the caller. The backward pass adds the weight's gradient to it, and the weight gets
            no gradient from autograd.

    The reference computes in fp32 (fp64 for fp64 input). The kernel multiplies in the storage dtype with fp32
    accumulation and fp32 logits, and accumulates the weight's gradient in fp32.

    Raises:
        ValueError, TypeError: if arguments do not fit together.
    """
    check_head(hidden_NH, weight_VH, label_N, bias_V, temperature, keep_N)
    keep_N = label_N != IGNORED if keep_N is None else keep_N & (label_N != IGNORED)
    V = vocabulary_size(weight_VH, vocabulary_group)
    check_labels("label_N", label_N, keep_N, V, f"Use {IGNORED} to leave a row out.")
    check_main_grad(main_grad_VH, weight_VH)
    arguments = (hidden_NH, weight_VH, label_N.long(), temperature_of(temperature, hidden_NH), bias_V, keep_N)
    if use_triton(impl, hidden_NH, weight_VH):
        from hapo_kernels.linear_logprob import kernel  # not before it is needed: Triton may be absent on a CPU

        rows = pieces(weight_VH, chunk=chunk_rows, collected=collect_rows, memory_gib=memory_gib)
        settings = (with_entropy, vocabulary_group, rows, main_grad_VH, kept_rows)
        return LinearLogprob(*kernel.linear_logprob(*arguments, *settings))
    if main_grad_VH is not None:
        arguments = (hidden_NH, reference.adds_to(main_grad_VH, weight_VH), *arguments[2:])
    if vocabulary_group is not None:
        return LinearLogprob(*reference.vocabulary_parallel(*arguments, with_entropy, vocabulary_group))
    return LinearLogprob(*reference.linear_logprob(*arguments, with_entropy))


def temperature_of(temperature: float | Tensor, hidden_NH: Tensor) -> Tensor:
    """The temperature of every row, (N,), so that one number and a tensor of equal values give the same bits."""
    rows = hidden_NH.shape[0]
    dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    if not isinstance(temperature, Tensor):
        # Not a tensor on the host that is copied: the host would wait for the device to take it.
        return torch.full((rows,), temperature, dtype=dtype, device=hidden_NH.device)
    return temperature.detach().to(hidden_NH.device, dtype).expand(rows).contiguous()


def vocabulary_size(weight_VH: Tensor, group: ProcessGroup | None) -> int:
    """The size of the whole vocabulary; with HAPO_KERNELS_DEBUG=1, checks that all ranks' slices have equal size."""
    if group is None:
        return weight_VH.shape[0]
    if debug():
        sizes = [0] * group.size()
        dist.all_gather_object(sizes, weight_VH.shape[0], group=group)
        if len(set(sizes)) > 1:
            raise ValueError(
                f"weight_VH of {sizes} tokens on the ranks: slices of one size. "
                f"Pad the head to a multiple of {len(sizes)} tokens, with a bias of -inf."
            )
    return group.size() * weight_VH.shape[0]


def check_labels(name: str, label: Tensor, kept: Tensor, V: int, fix: str) -> None:
    """With HAPO_KERNELS_DEBUG=1, raise ValueError if a label that is read lies outside [0, V)."""
    if not debug():
        return
    wrong = kept & ((label < 0) | (label >= V))
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}{first}={int(label[tuple(first)])}: a label lies in [0, {V}). {fix}")


def check_main_grad(main_grad_VH: Tensor | None, weight_VH: Tensor) -> None:
    """Raise ValueError, with one line, if the weight's gradient cannot be added to this tensor."""
    if main_grad_VH is None:
        return
    found = f"main_grad_VH: {main_grad_VH.dtype} of shape {tuple(main_grad_VH.shape)} on {main_grad_VH.device}"
    shape, device = weight_VH.shape, weight_VH.device
    if main_grad_VH.dtype != torch.float32 or main_grad_VH.shape != shape or main_grad_VH.device != device:
        raise ValueError(
            f"{found}: one fp32 number for each of weight_VH {tuple(shape)}, on {device}. "
            "Use torch.zeros_like(weight, dtype=torch.float32)."
        )
    if not main_grad_VH.is_contiguous() or main_grad_VH.requires_grad:
        raise ValueError(f"{found}: contiguous and without a gradient of its own. Use main_grad.detach().contiguous().")


def check_head(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    label_N: Tensor,
    bias_V: Tensor | None,
    temperature: float | Tensor,
    keep_N: Tensor | None,
) -> None:
    """Raise ValueError or TypeError, with one line, for inputs of a head that do not fit together."""
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden_NH {tuple(hidden_NH.shape)} and weight_VH {tuple(weight_VH.shape)}: (N, H) and (V, H) with one H. "
            "Use hidden.flatten(0, -2), and lm_head.weight as it is."
        )
    if weight_VH.dtype != hidden_NH.dtype:
        raise TypeError(f"weight_VH {weight_VH.dtype} and hidden_NH {hidden_NH.dtype}: one dtype. Cast one of them.")
    rows = hidden_NH.shape[:1]
    if label_N.shape != rows or label_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"label_N: {label_N.dtype} of shape {tuple(label_N.shape)}: one int64 id for each of the {rows[0]} rows. "
            "Use labels.flatten()."
        )
    if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(
            f"bias_V of shape {tuple(bias_V.shape)}: one number a token of the vocabulary, {weight_VH.shape[0]}. "
            "Use lm_head.bias."
        )
    if keep_N is not None and (keep_N.shape != rows or keep_N.dtype != torch.bool):
        raise ValueError(
            f"keep_N: {keep_N.dtype} of shape {tuple(keep_N.shape)}: one bool a row. Use mask.flatten().bool()."
        )
    if isinstance(temperature, Tensor):
        if temperature.ndim and temperature.shape != rows:
            raise ValueError(
                f"temperature of shape {tuple(temperature.shape)}: one number, or one a row. Use shape ({rows[0]},)."
            )
        if debug() and not (temperature > 0).all():
            raise ValueError(
                f"temperature={temperature.min().item()}: a temperature is positive. Use a small one for greedy rows."
            )
    elif not temperature > 0:
        raise ValueError(f"temperature={temperature}: a temperature is positive. Use a small one for greedy rows.")
