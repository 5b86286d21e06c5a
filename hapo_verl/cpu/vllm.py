"""Patches for vLLM on a CPU under verl (entry point group `vllm.general_plugins`; runs in vLLM's own processes)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Milliseconds that a sleeping process of vLLM may miss a notification.
LOOK_AGAIN_MS = 20


def register() -> None:
    """Patch vLLM's CPU build if VERL_PLATFORM=cpu; else do nothing."""
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        keep_plain_linear_weights()
        wait_without_spinning()
        sample_with_one_number_a_row()
        count_ranks_without_compiling()


def keep_plain_linear_weights() -> None:
    """Keep plain Linear layers, whose weights verl can replace.

    vLLM's CPU build packs each Linear weight into a oneDNN handle and leaves `layer.weight` empty. verl writes new
    weights into `layer.weight` after every step, so the worker would die at the first step, and the trainer would wait
    for it for ever.

    A weight stays a parameter of its shape, stored column by column: with fewer than 64 rows, as in decoding, PyTorch's
    float32 product is then up to twice as fast. The embedding, from which rows are read, stays as it is.
    """
    import torch
    import vllm.model_executor.layers.utils as layers
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    def plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        weight = layer.weight
        if isinstance(weight, torch.nn.Parameter) and not isinstance(layer, VocabParallelEmbedding):
            store_by_column(weight)
        layer.cpu_linear = torch.nn.functional.linear  # pyright: ignore[reportArgumentType]

    layers.dispatch_cpu_unquantized_gemm = plain_linear


def store_by_column(weight: torch.nn.Parameter) -> None:
    """Store a float32 matrix column by column in memory; its shape, values and later copies into it do not change."""
    import torch

    if weight.dim() == 2 and weight.dtype == torch.float32:
        weight.data = weight.data.t().contiguous().t()


def wait_without_spinning() -> None:
    """Let vLLM's processes sleep until they are notified.

    By default the scheduling process polls for the worker's answer in a busy loop for a second before it sleeps. A
    decoding step is shorter than that, so on a machine with two cores the loop takes one of them from the worker.

    ZeroMQ may drop the second of two notifications that follow each other within a millisecond. vLLM's loop does not
    need them; a process that sleeps would sleep for the five seconds after which vLLM looks again. So it looks often.
    """
    import vllm.distributed.device_communicators.shm_broadcast as broadcast

    class SleepingCondition(broadcast.SpinCondition):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.busy_loop_s = 0.0

        def wait(self, timeout_ms: int | None = None) -> None:
            super().wait(LOOK_AGAIN_MS if timeout_ms is None else min(timeout_ms, LOOK_AGAIN_MS))

    broadcast.SpinCondition = SleepingCondition


def sample_with_one_number_a_row() -> None:
    """Let vLLM's sampler draw one random number a token to be sampled, and not one for each entry of the vocabulary.

    vLLM divides the probabilities by exponential noise, which PyTorch draws one after the other on most CPUs: with 64
    rows of 49,152 entries that takes longer than a layer of a small model.
    """
    import vllm.v1.sample.ops.topk_topp_sampler as sampler

    sampler.compiled_random_sample = sample_by_inversion


def count_ranks_without_compiling() -> None:
    """Let vLLM's sampler count the tokens above the sampled one without `torch.compile`.

    Inductor compiles a C++ kernel for it in the middle of the first rollouts: 10 to 30 seconds on two cores, for
    milliseconds of each step.
    """
    import vllm.v1.sample.sampler as sampler

    sampler.batched_count_greater_than = count_at_least  # pyright: ignore[reportPrivateImportUsage]


def count_at_least(x_BV: torch.Tensor, value_B1: torch.Tensor) -> torch.Tensor:
    """Count the entries of each row of (B, V) that are not below the row's value (B, 1); returns (B,) int64."""
    import torch

    return (x_BV >= value_B1).sum(-1, dtype=torch.int32).long()


def sample_by_inversion(logits_BV: torch.Tensor) -> torch.Tensor:
    """Sample each row by the inverse of its cumulative distribution.

    Args:
        logits_BV: (B, V) of any float type; -inf is never sampled.

    Returns:
        (B,) int64, index r of row b with probability softmax(logits)[b, r], to the rounding of fp64.
    """
    import torch

    cumulative_BV = logits_BV.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:]
    drawn_B1 = torch.rand_like(total_B1) * total_B1
    return torch.searchsorted(cumulative_BV, drawn_B1, right=True).squeeze(-1)
