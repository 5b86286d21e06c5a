"""Runs kernel tests on the GPU if there is one, and otherwise in Triton's interpreter."""

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
    # This is set only while a kernel test runs, so that processes of other tests do not inherit it.
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
