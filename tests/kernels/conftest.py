"""Runs kernel tests on the GPU if there is one, and else in Triton's interpreter."""

import importlib.metadata

import pytest
import torch

from interpreter import import_kernels, unusable

INTERPRETED = not torch.cuda.is_available()

if INTERPRETED:
    import_kernels()


def pytest_configure():
    reason = unusable(*(importlib.metadata.version(name) for name in ("numpy", "triton")))
    if INTERPRETED and reason:
        pytest.exit(reason, returncode=1)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    # Set while a kernel test runs, and not left to the processes that other tests start.
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
