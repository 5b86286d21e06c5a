"""How many rows of logits a head makes at once, and how many rows of their gradient it collects."""

from __future__ import annotations

from typing import NamedTuple

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


def _power_of_two(number: int) -> int:
    """The largest that is not above `number`; 1 below 2."""
    return 1 << (max(number, 1).bit_length() - 1)
