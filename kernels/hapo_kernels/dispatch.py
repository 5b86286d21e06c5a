"""Which implementation runs: `reference` (PyTorch, every device), `triton`, or `auto`."""

from __future__ import annotations

import os
from typing import Literal

import torch

Impl = Literal["auto", "reference", "triton"]


def use_triton(impl: str, tensor: torch.Tensor) -> bool:
    """True if the Triton kernel is to run on `tensor`.

    `auto` is Triton on CUDA and ROCm tensors and the reference elsewhere. `triton` on a CPU tensor needs the
    interpreter, `TRITON_INTERPRET=1` in the environment before Triton is imported.
    """
    if impl == "reference":
        return False
    if impl == "auto":
        return tensor.is_cuda
    if impl != "triton":
        raise ValueError(f"impl={impl!r}: no such implementation. Use 'auto', 'reference' or 'triton'.")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' on a {tensor.device.type} tensor: Triton compiles for GPUs. "
            "Use impl='auto', or set TRITON_INTERPRET=1 before the first import to interpret the kernel."
        )
    return True
