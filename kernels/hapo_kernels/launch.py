"""Launch settings by architecture: how many elements a program takes at once, and on how many warps.

A table instead of an autotuner: no training step waits for a search, machines of one kind give the same bits, and every
entry compiles without a GPU (`tests/kernels/compile_kernels.py`). The entries are chosen by what the compiler says of
registers, spills and load widths, and not yet by time on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How one kernel is launched."""

    block: int  # elements a program takes at once
    warps: int  # of 32 threads, on AMD of 64


class Launches(NamedTuple):
    """How the kernels of an architecture are launched, by what they sweep over."""

    row: Launch  # sweeps over a row of logits: `linear_logprob`, `policy_head`
    token: Launch  # tokens of a row: `policy_loss`
    segment: Launch  # scores of a group, tokens of a row: `segment_norm`


# 8 elements a thread are one 128-bit load of 16-bit storage and two of fp32. Of tokens a thread takes 4 on gfx942, one
# load of fp32: with 8 the predicates of the loss spill scalar registers.
TABLE = {
    "sm_80": Launches(row=Launch(2048, 8), token=Launch(1024, 4), segment=Launch(1024, 4)),
    "sm_90": Launches(row=Launch(2048, 8), token=Launch(1024, 4), segment=Launch(1024, 4)),
    "sm_100": Launches(row=Launch(2048, 8), token=Launch(1024, 4), segment=Launch(1024, 4)),
    "gfx942": Launches(row=Launch(2048, 4), token=Launch(1024, 4), segment=Launch(1024, 4)),
}


def launches(device: torch.device) -> Launches:
    """The settings for a device; an interpreted kernel takes those of sm_90."""
    if torch.version.hip:
        return TABLE["gfx942"]
    return TABLE[architecture(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_90"]


def architecture(major: int, minor: int) -> str:
    """The newest NVIDIA entry that is not newer than the compute capability; below all of them the oldest."""
    names = [name for name in TABLE if name.startswith("sm_")]
    known = [name for name in names if int(name.removeprefix("sm_")) <= 10 * major + minor]
    return known[-1] if known else names[0]
