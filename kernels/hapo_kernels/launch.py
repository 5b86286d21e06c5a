"""Launch settings (block size, warps, stages) for each kernel, storage dtype and architecture.

They come from a table, `launch_table.json`, instead of an autotuner: no training step waits for a search, machines of
one kind give the same bits, and every entry compiles without a GPU (`tests/kernels/compile_kernels.py`). For each
kernel an architecture has several candidates, and an entry that says which one is used and why.
`python bench/launch_settings.py --write` measures the candidates on the GPU of this machine and updates the table.
Entries that were not measured were chosen by what the compiler reports about registers, spills and load widths.

8 elements per thread are one 128-bit load of 16-bit storage, or two of fp32. Kernels over tokens use 4 per thread on
gfx942, one load of fp32, because with 8 the predicates of the loss spill scalar registers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("launch_table.json")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NOT_MEASURED = "default, not measured"


class Launch(NamedTuple):
    """Launch settings of one kernel."""

    block: int  # elements that a program processes at once
    warps: int  # warps per program, each of 32 threads, on AMD of 64
    stages: int  # pipeline stages of the loop over a row; 1 for a kernel without such a loop


class Chosen(NamedTuple):
    """An entry of the table."""

    launch: Launch
    source: str  # NOT_MEASURED, or the machine, its software and the date


class Settings(NamedTuple):
    """One architecture's part of the table."""

    candidates: dict[str, list[Launch]]  # by kernel
    chosen: dict[str, dict[str, Chosen]]  # by kernel and storage dtype


def read(path: Path = PATH) -> dict[str, Settings]:
    """Read the table; returns the settings by architecture."""
    return {
        name: Settings(
            {kernel: [Launch(*launch) for launch in launches] for kernel, launches in part["candidates"].items()},
            {
                kernel: {dtype: Chosen(Launch(*launch), source) for dtype, (launch, source) in entries.items()}
                for kernel, entries in part["chosen"].items()
            },
        )
        for name, part in json.loads(path.read_text()).items()
    }


def write(table: dict[str, Settings], path: Path = PATH) -> None:
    """Write the table for `read`, one line per entry."""
    path.write_text(_lines({name: part._asdict() for name, part in table.items()}) + "\n")


def _lines(value: object, indent: str = "") -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = [f"{indent} {json.dumps(key)}: {_lines(of, indent + ' ')}" for key, of in value.items()]
    return "{\n" + ",\n".join(inner) + f"\n{indent}}}"


TABLE = read()
_tried: dict[str, Launch] = {}


@contextmanager
def trying(kernel: str, launch: Launch) -> Iterator[None]:
    """A context in which launches of `kernel` use these settings instead of the table's."""
    _tried[kernel] = launch
    try:
        yield
    finally:
        del _tried[kernel]


def launch_of(kernel: str, device: torch.device, dtype: torch.dtype) -> Launch:
    """The settings for a kernel (its name in the table), a device and a storage dtype."""
    if kernel in _tried:
        return _tried[kernel]
    return TABLE[architecture_of(device)].chosen[kernel][DTYPES[dtype]].launch


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The name of a device's architecture in the table; on a CPU, where kernels are interpreted, it is sm_90."""
    if torch.version.hip:
        return "gfx942"
    return architecture(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_90"


def architecture(major: int, minor: int) -> str:
    """The newest NVIDIA architecture of the table that is not newer than this one; if all are newer, the oldest."""
    names = [name for name in TABLE if name.startswith("sm_")]
    known = [name for name in names if int(name.removeprefix("sm_")) <= 10 * major + minor]
    return known[-1] if known else names[0]
