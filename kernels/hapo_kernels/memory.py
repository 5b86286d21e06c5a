"""How many rows of logits a head makes at once, how many rows of their gradient it collects, and what both take.

With R rows a chunk, C rows collected, and s bytes a number of hidden states and weight, in bytes:

    chunks      8RV            two chunks of fp32 logits: one is made while the row kernel has the other
              + sC(V + H)      the collected dlogits, and the hidden states that they belong to
              + sRH            a chunk's ∂hidden
    weight      4VH            ∂weight, summed in fp32
              + sVH            as it is handed on; the chunks are gone by then

A chunk reads the weight twice, and a GEMM of ∂weight reads and writes 4VH: 2sVH/R + 8VH/C bytes a row. From a budget,
`rows_within` picks the R and C of the least traffic.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

from torch import Tensor

GIB = 2**30
MOST_LOGITS = 2**28  # fp32 elements of a chunk of logits, 1 GiB
MOST_DLOGITS = 2**30  # elements that are collected, 2 GiB in 16 bits
MOST_ROWS = 4096  # rows after which a GEMM gains nothing from more
LEAST_ROWS = 16


class Rows(NamedTuple):
    """The pieces in which a head takes its rows."""

    chunk: int  # rows of fp32 logits that one GEMM makes
    collected: int  # rows of dlogits that one GEMM of the weight's gradient takes; a multiple of `chunk`


def rows_a_chunk(V: int) -> int:
    """Rows of logits made at once: the most, a power of two, within MOST_LOGITS; at least 16, at most MOST_ROWS."""
    return min(MOST_ROWS, max(LEAST_ROWS, _power_of_two(MOST_LOGITS // max(V, 1))))


def rows_of(V: int, chunk: int | None = None, collected: int | None = None) -> Rows:
    """What is not given takes its default: MOST_ROWS are collected, or what MOST_DLOGITS holds, in whole chunks."""
    chunk = chunk or rows_a_chunk(V)
    collected = collected or min(MOST_ROWS, _power_of_two(MOST_DLOGITS // max(V, 1)))
    return Rows(chunk, max(1, collected // chunk) * chunk)


def chunks_bytes(rows: Rows, V: int, H: int, itemsize: int = 2) -> int:
    """What a head holds while it takes its rows, beside inputs and gradients."""
    return 8 * rows.chunk * V + itemsize * (rows.collected * (V + H) + rows.chunk * H)


def head_bytes(rows: Rows, V: int, H: int, itemsize: int = 2) -> int:
    """What a head of (V, H) holds at its peak, beside hidden states and their gradient."""
    return 4 * V * H + max(chunks_bytes(rows, V, H, itemsize), itemsize * V * H)


def least_gib(V: int, H: int, itemsize: int = 2) -> float:
    """The least memory that a head of (V, H) works in, in GiB, rounded up to two digits."""
    return math.ceil(100 * head_bytes(Rows(LEAST_ROWS, LEAST_ROWS), V, H, itemsize) / GIB) / 100


def rows_within(memory_gib: float, V: int, H: int, itemsize: int = 2) -> Rows:
    """The pieces of the least traffic within `memory_gib`; not above the defaults.

    Raises:
        ValueError: where not even the smallest ones fit.
    """
    most = rows_of(V)
    sizes = [1 << power for power in range(LEAST_ROWS.bit_length() - 1, MOST_ROWS.bit_length())]
    fitting = [
        rows
        for rows in (Rows(*pair) for pair in product(sizes, sizes))
        if rows.chunk <= rows.collected
        and rows.chunk <= most.chunk
        and rows.collected <= most.collected
        and head_bytes(rows, V, H, itemsize) <= memory_gib * GIB
    ]
    if not fitting:
        raise ValueError(
            f"memory_gib={memory_gib}: a head of {V} tokens and {H} hidden units needs {least_gib(V, H, itemsize)} GiB "
            "at the least, most of it for the weight's gradient. Use that or more, or None."
        )
    return min(fitting, key=lambda rows: (2 * itemsize / rows.chunk + 8 / rows.collected, rows))


def pieces(
    weight_VH: Tensor, *, chunk: int | None = None, collected: int | None = None, memory_gib: float | None = None
) -> Rows:
    """The pieces that a caller asks for, by their rows or by a budget.

    Raises:
        ValueError: on both at once, or a budget in which nothing fits.
    """
    V, H = weight_VH.shape
    if memory_gib is None:
        return rows_of(V, chunk, collected)
    if chunk is not None or collected is not None:
        raise ValueError(
            f"memory_gib={memory_gib}: it picks chunk_rows and collect_rows, which are given too. Leave one of them."
        )
    return rows_within(memory_gib, V, H, weight_VH.element_size())


def _power_of_two(number: int) -> int:
    """The largest that is not above `number`; 1 below 2."""
    return 1 << (max(number, 1).bit_length() - 1)
