"""The chunk sizes of a head, and the memory that they take.

A head makes R rows of logits at once (a chunk), and collects the gradient of C rows of logits for one GEMM of ∂weight.
With s bytes per number of hidden states and weight, this takes, in bytes:

    chunks      8RV            two chunks of fp32 logits: one is made while the row kernel works on the other
              + sC(V + H)      the collected dlogits, and the hidden states that they belong to
              + sRH            ∂hidden of a chunk
    weight      4VH            ∂weight, summed in fp32
              + sVH            ∂weight converted to the dtype of the weight, after the chunks are freed

If all rows are collected at once, their GEMM writes ∂weight in the dtype of the weight, and there is no sum in fp32. In
its memory, (4 - s)VH bytes, the dlogits of more rows have room; `Rows.once` says how many rows are collected then. It
is rounded down to whole chunks within a memory budget, and up where there is none.

A chunk reads the weight twice, and a GEMM of ∂weight reads and writes 4VH bytes: in total 2sVH/R + 8VH/C bytes per row.
Within a memory budget, `rows_within` chooses the R and C with the least traffic.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

from torch import Tensor

GIB = 2**30
MOST_LOGITS = 2**28  # fp32 elements of a chunk of logits, 1 GiB
MOST_DLOGITS = 2**30  # elements of collected dlogits, 2 GiB in 16 bits
MOST_ROWS = 4096  # a GEMM does not get faster with more rows
LEAST_ROWS = 16


class Rows(NamedTuple):
    """The chunk sizes of a head, in rows."""

    chunk: int  # rows of fp32 logits made by one GEMM
    collected: int  # rows of dlogits used by one GEMM of the weight's gradient; a multiple of `chunk`
    once: int = 0  # up to so many rows are collected for a single GEMM

    def for_count(self, count: int) -> Rows:
        """The chunk sizes for at most `count` rows."""
        return self._replace(collected=-(-count // self.chunk) * self.chunk) if count <= self.once else self

    def in_one(self, count: int) -> bool:
        """Whether one GEMM computes the weight's gradient of at most `count` rows."""
        return count <= max(self.collected, self.once)


def rows_a_chunk(V: int) -> int:
    """The default chunk: the largest power of two of rows within MOST_LOGITS, but at least 16 and at most MOST_ROWS."""
    return min(MOST_ROWS, max(LEAST_ROWS, _power_of_two(MOST_LOGITS // max(V, 1))))


def rows_of(V: int, chunk: int | None = None, collected: int | None = None) -> Rows:
    """Chunk sizes, with defaults for what is not given; the collected rows are rounded down to whole chunks.

    By default MOST_ROWS rows are collected, or as many as fit into MOST_DLOGITS.
    """
    chunk = chunk or rows_a_chunk(V)
    collected = collected or min(MOST_ROWS, _power_of_two(MOST_DLOGITS // max(V, 1)))
    return Rows(chunk, max(1, collected // chunk) * chunk)


def chunks_bytes(rows: Rows, V: int, H: int, itemsize: int = 2) -> int:
    """The bytes of a head's chunks, without its inputs and gradients."""
    return 8 * rows.chunk * V + itemsize * (rows.collected * (V + H) + rows.chunk * H)


def head_bytes(rows: Rows, V: int, H: int, itemsize: int = 2) -> int:
    """The peak bytes of a head of shape (V, H), without hidden states and their gradient."""
    return 4 * V * H + max(chunks_bytes(rows, V, H, itemsize), itemsize * V * H)


def least_gib(V: int, H: int, itemsize: int = 2) -> float:
    """The smallest memory budget for a head of shape (V, H), in GiB, rounded up to two decimals."""
    return math.ceil(100 * head_bytes(Rows(LEAST_ROWS, LEAST_ROWS), V, H, itemsize) / GIB) / 100


def rows_within(memory_gib: float, V: int, H: int, itemsize: int = 2) -> Rows:
    """The chunk sizes with the least memory traffic that fit into `memory_gib`; not larger than the defaults.

    Raises:
        ValueError: if not even the smallest ones fit.
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


def _with_once(rows: Rows, V: int, H: int, itemsize: int, *, within: bool) -> Rows:
    """The same chunk sizes with `once`, in whole chunks: those that have room, or without `within` one begun too."""
    room = (4 - itemsize) * V * H / (itemsize * (V + H)) / rows.chunk
    return rows._replace(once=rows.collected + rows.chunk * (math.floor(room) if within else math.ceil(room)))


def pieces(
    weight_VH: Tensor, *, chunk: int | None = None, collected: int | None = None, memory_gib: float | None = None
) -> Rows:
    """The chunk sizes that a caller gives, in rows or by a memory budget.

    Raises:
        ValueError: if both are given, or the budget is too small.
    """
    V, H = weight_VH.shape
    if memory_gib is None:
        return _with_once(rows_of(V, chunk, collected), V, H, weight_VH.element_size(), within=False)
    if chunk is not None or collected is not None:
        raise ValueError(
            f"memory_gib={memory_gib}: it picks chunk_rows and collect_rows, which are given too. Leave one of them."
        )
    rows = rows_within(memory_gib, V, H, weight_VH.element_size())
    return _with_once(rows, V, H, weight_VH.element_size(), within=True)


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`, and at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)
