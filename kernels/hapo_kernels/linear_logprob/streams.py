"""Two CUDA streams: GEMMs run on the caller's stream, and row kernels at the same time on a second one.

    the caller's    x 0 | x 1   | ∂h 0 | x 2   | ∂h 1, ∂W | x 3   | ...        x: logits of a chunk
    the second            row 0          row 1              row 2

A row kernel starts after everything that was launched before it on the caller's stream; `join` makes the caller's
stream wait for the row kernel. Work launched on the caller's stream between the two runs at the same time as the row
kernel. That is the GEMM for the next chunk's logits, which therefore need a second buffer.

The caller may use any stream: the current one is looked up at every call. All memory is allocated on the caller's
stream and held until after the last `join`, even if the call ends with an error, so that the allocator cannot give it
away while the second stream uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class One:
    """A single stream: everything runs in the order of its launch."""

    buffers = 1  # number of chunks of logits in use at once

    @contextmanager
    def rows(self) -> Iterator[None]:
        """A context for the launch of a row kernel."""
        yield

    def join(self) -> None:
        """Wait for the row kernels: work launched after this call sees their results."""


class Two:
    """The caller's stream, and a second one for row kernels, one per device."""

    buffers = 2

    def __init__(self, device: torch.device):
        self._caller, self._second = torch.cuda.current_stream(device), _second(device)

    @contextmanager
    def rows(self) -> Iterator[None]:
        self._second.wait_stream(self._caller)
        with torch.cuda.stream(self._second):
            yield

    def join(self) -> None:
        self._caller.wait_stream(self._second)


@functools.cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def streams_of(device: torch.device, overlap: bool) -> One | Two:
    """`Two` on CUDA and ROCm devices if `overlap` is True, else `One`."""
    return Two(device) if overlap and device.type == "cuda" else One()
