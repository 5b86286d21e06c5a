"""Kernel tests run on the GPU where there is one, and under Triton's interpreter elsewhere."""

import os

import torch

# Before anything imports Triton. On a CPU bf16 arithmetic is wrong in the interpreter: tests store fp32 and fp16 there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
