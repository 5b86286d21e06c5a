"""Which implementation runs: `reference` (PyTorch, every device), `triton`, or `auto`."""

from __future__ import annotations

import os
from typing import Literal

import torch

Impl = Literal["auto", "reference", "triton"]
STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def use_triton(impl: str, tensor: torch.Tensor) -> bool:
    """True if the Triton kernel is to run on `tensor`.

    `auto` is Triton on CUDA and ROCm tensors and the reference elsewhere. `triton` on a CPU tensor needs the
    interpreter, `TRITON_INTERPRET=1` in the environment before Triton is imported.
    """
    if impl == "reference":
        return False
    if impl == "auto":
        return tensor.is_cuda and tensor.dtype in STORAGE
    if impl != "triton":
        raise ValueError(f"impl={impl!r}: no such implementation. Use 'auto', 'reference' or 'triton'.")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' on a {tensor.device.type} tensor: Triton compiles for GPUs. "
            "Use impl='auto', or set TRITON_INTERPRET=1 before the first import to interpret the kernel."
        )
    if tensor.dtype not in STORAGE:
        raise TypeError(f"impl='triton' on {tensor.dtype}: the kernels store fp32, bf16 or fp16. Use impl='reference'.")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            "impl='triton' on a DTensor: a kernel sees one rank's memory. Pass tensor.to_local() or .full_tensor()."
        )
    return True


def debug() -> bool:
    """HAPO_KERNELS_DEBUG=1 also checks values, which waits for the device."""
    return os.environ.get("HAPO_KERNELS_DEBUG") == "1"


def refuse_double_backward(operation: str) -> None:
    """Called in a backward: the gradients were computed in the forward pass, so they carry no graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation}: create_graph=True: the kernel has a first derivative only. Use impl='reference'."
        )
