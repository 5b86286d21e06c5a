"""Jagged (B, T) tensors, the form in which TransferQueue hands out responses: no padding is ever made."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths(jagged_BT: Tensor) -> Tensor:
    """(B,) tokens of each row."""
    return offsets(jagged_BT).diff()


def row_sums(jagged_BT: Tensor) -> Tensor:
    """(B,) sum over the tokens of each row, without a tensor as large as the tokens where they are floats."""
    values, bounds = jagged_BT.values(), offsets(jagged_BT)
    if values.is_floating_point():
        return torch.segment_reduce(values, "sum", offsets=bounds, initial=0)
    return torch.nn.functional.pad(values.cumsum(0), (1, 0))[bounds].diff()


def spread(value_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Each row's value on the tokens where the jagged mask is 1, 0 on the others; jagged like the mask."""
    mask = mask_BT.values()
    values = torch.empty(mask.shape, dtype=value_B.dtype)
    # A fill a row: an index of every token's row would be twice as large as the result.
    for row, value in zip(values.split(lengths(mask_BT).tolist()), value_B.tolist(), strict=True):
        row.fill_(value)
    return _jagged(values.mul_(mask), like=mask_BT)


def cut(padded_BT: Tensor, like: Tensor) -> Tensor:
    """A padded (B, T) tensor cut to the rows of a jagged one."""
    keep_BT = torch.arange(padded_BT.size(1)) < lengths(like).unsqueeze(1)
    return _jagged(padded_BT[keep_BT], like=like)


def _jagged(values: Tensor, like: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets(like))


def offsets(jagged: Tensor) -> Tensor:
    """(B+1,) bounds of the rows."""
    # torch's stubs know nothing of jagged tensors.
    return jagged.offsets()  # pyright: ignore[reportAttributeAccessIssue]
