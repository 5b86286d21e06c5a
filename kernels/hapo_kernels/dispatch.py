"""Chooses the implementation: `reference` (PyTorch, every device), `triton`, or `auto`."""

from __future__ import annotations

import os
from typing import Literal

import torch

Impl = Literal["auto", "reference", "triton"]
STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def use_triton(impl: str, *tensors: torch.Tensor) -> bool:
    """Whether to run the Triton kernel, decided by `impl` and by the first tensor's device and dtype.

    `auto` is Triton on CUDA and ROCm tensors in fp32, bf16 or fp16, and the reference elsewhere. `triton` on a CPU
    tensor needs Triton's interpreter: set `TRITON_INTERPRET=1` in the environment before Triton is imported.

    Raises:
        ValueError, TypeError: if the kernel was asked for and cannot run on these tensors.
    """
    first = tensors[0]
    if impl == "reference" or (impl == "auto" and not (first.is_cuda and first.dtype in STORAGE)):
        return False
    if impl not in ("auto", "triton"):
        raise ValueError(f"impl={impl!r}: no such implementation. Use 'auto', 'reference' or 'triton'.")
    # A DTensor; its class is not imported here, since that import takes as long as half of torch's.
    if any(hasattr(tensor, "full_tensor") for tensor in tensors):
        raise TypeError("a DTensor: a kernel sees one rank's memory. Pass tensor.to_local() or tensor.full_tensor().")
    if not first.is_cuda and not interpreted():
        raise ValueError(
            f"impl='triton' on a {first.device.type} tensor: Triton compiles for GPUs. "
            "Use impl='auto', or set TRITON_INTERPRET=1 before the first import to interpret the kernel."
        )
    if first.dtype not in STORAGE:
        raise TypeError(f"impl='triton' on {first.dtype}: the kernels store fp32, bf16 or fp16. Use impl='reference'.")
    return True


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def debug() -> bool:
    """Whether HAPO_KERNELS_DEBUG=1 is set: then values are checked too, for which the host waits for the device."""
    return os.environ.get("HAPO_KERNELS_DEBUG") == "1"


def refuse_double_backward(operation: str) -> None:
    """Raise RuntimeError in a backward pass with create_graph=True: our gradients cannot be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation}: create_graph=True: the kernel has a first derivative only. Use impl='reference'."
        )
