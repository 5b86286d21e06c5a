"""Two CUDA streams: GEMMs on the caller's, row kernels beside them.

    the caller's    x 0 | x 1   | ∂h 0 | x 2   | ∂h 1, ∂W | x 3   | ...        x: logits of a chunk
    the second            row 0          row 1              row 2

A row kernel starts when everything that was launched on the caller's stream before it has run, and `join` makes the
caller's stream wait for it. What is launched on the caller's stream between the two runs at the same time: the next
chunk's logits, which therefore need a buffer of their own.

Nothing depends on which stream the caller uses: it is asked at every call. All memory is allocated on the caller's
stream and held until after the last `join`, also if an error ends the call, so that the allocator hands none of it out
while the second stream uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class One:
    """Everything in the order of its launch."""

    buffers = 1  # chunks of logits that are in use at once

    @contextmanager
    def rows(self) -> Iterator[None]:
        """Around the launch of a row kernel."""
        yield

    def join(self) -> None:
        """What is launched from here on sees what the row kernels have written."""


class Two:
    """The caller's stream, and one of our own for each device."""

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
    """Two on CUDA and ROCm, where `overlap` allows it; one elsewhere."""
    return Two(device) if overlap and device.type == "cuda" else One()
