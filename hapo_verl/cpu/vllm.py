"""vLLM on a laptop's CPU, under verl (entry point group `vllm.general_plugins`; runs in vLLM's own processes).

vLLM's CPU build packs each Linear weight into a oneDNN handle and leaves `layer.weight` empty. verl writes new weights
into `layer.weight` after every step: the worker would die at the first one and the trainer would wait for it forever.
"""

from __future__ import annotations

import os


def keep_plain_linear_weights() -> None:
    """Keep the plain Linear where VERL_PLATFORM=cpu; do nothing elsewhere."""
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    import vllm.model_executor.layers.utils as layers

    def plain_linear(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # pyright: ignore[reportArgumentType]

    layers.dispatch_cpu_unquantized_gemm = plain_linear
