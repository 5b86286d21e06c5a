"""vLLM on a laptop's CPU, under verl (entry point group `vllm.general_plugins`; runs in vLLM's own processes).

vLLM's CPU build packs each Linear weight into a oneDNN handle and leaves `layer.weight` empty. verl writes new weights
into `layer.weight` after every step: the worker would die at the first one and the trainer would wait for it forever.

vLLM's processes wait for each other in a loop that gives its core back and takes it again, for a second after every
message. On two cores that is a fifth of the machine, taken from the trainer; here they nap for a millisecond at a time.
"""

from __future__ import annotations

import os


def adapt_to_cpu() -> None:
    """Keep the plain Linear and nap while waiting where VERL_PLATFORM=cpu; do nothing elsewhere."""
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    import vllm.model_executor.layers.utils as layers
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    def plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # pyright: ignore[reportArgumentType]

    layers.dispatch_cpu_unquantized_gemm = plain_linear

    wait = SpinCondition.wait

    def nap(self: SpinCondition, timeout_ms: int | None = None) -> None:
        """Look again after a millisecond at most; the writer's call alone is not enough, it may be dropped."""
        self.last_read = 0.0
        wait(self, 1)

    SpinCondition.wait = nap
