"""Patches for vLLM on a CPU under verl (entry point group `vllm.general_plugins`; runs in vLLM's own processes)."""

from __future__ import annotations

import os


def register() -> None:
    """Patch vLLM's CPU build if VERL_PLATFORM=cpu; else do nothing."""
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        keep_plain_linear_weights()
        wait_without_spinning()


def keep_plain_linear_weights() -> None:
    """Keep plain Linear layers, whose weights verl can replace.

    vLLM's CPU build packs each Linear weight into a oneDNN handle and leaves `layer.weight` empty. verl writes new
    weights into `layer.weight` after every step, so the worker would die at the first step, and the trainer would wait
    for it for ever.
    """
    import torch
    import vllm.model_executor.layers.utils as layers

    def plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # pyright: ignore[reportArgumentType]

    layers.dispatch_cpu_unquantized_gemm = plain_linear


def wait_without_spinning() -> None:
    """Let vLLM's processes sleep until they are notified.

    By default the scheduling process polls for the worker's answer in a busy loop for a second before it sleeps. A
    decoding step is shorter than that, so on a machine with two cores the loop takes one of them from the worker.
    """
    import vllm.distributed.device_communicators.shm_broadcast as broadcast

    class SleepingCondition(broadcast.SpinCondition):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.busy_loop_s = 0.0

    broadcast.SpinCondition = SleepingCondition
