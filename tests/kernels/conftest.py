"""Kernel tests run on the GPU where there is one, and under Triton's interpreter elsewhere.

Triton decides when it is imported, and importing verl imports it. So without a GPU it is imported once more here, for the
kernels alone; the variable is set while a kernel test runs and not left to the processes that other tests start.
"""

import importlib
import os
import sys

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
OPERATIONS = ("segment_norm", "policy_loss", "linear_logprob", "policy_head")

if INTERPRETED:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    if before != "1":
        for name in list(sys.modules):
            if f"{name}.".startswith("triton.") and not name.startswith("triton._C"):
                del sys.modules[name]
    for operation in OPERATIONS:
        importlib.import_module(f"hapo_kernels.{operation}.kernel")
    if before is None:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
