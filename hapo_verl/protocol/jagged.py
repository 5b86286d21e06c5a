"""Jagged (B, T) tensors, the form in which TransferQueue hands out responses: no padding is ever made."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths(jagged_BT: Tensor) -> Tensor:
    """(B,) tokens of each row."""
    return offsets(jagged_BT).diff()


def row_sums(jagged_BT: Tensor) -> Tensor:
    """(B,) sum over the tokens of each row, without a tensor as large as the tokens."""
    values = jagged_BT.values()
    if values.is_floating_point():
        return torch.segment_reduce(values, "sum", offsets=offsets(jagged_BT), initial=0)
    sums = [row.sum() for row in values.split(lengths(jagged_BT).tolist())]
    return torch.stack(sums) if sums else values.new_zeros(0, dtype=torch.int64)


def spread(value_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Each row's value on the tokens where the jagged mask is 1, 0 on the others; jagged like the mask."""
    mask = mask_BT.values()
    values = torch.empty(mask.shape, dtype=value_B.dtype)
    # A fill a row: an index of every token's row would be twice as large as the result.
    for row, value in zip(values.split(lengths(mask_BT).tolist()), value_B.tolist(), strict=True):
        row.fill_(value)
    return _jagged(values.mul_(mask), like=mask_BT)


def select(jagged_BT: Tensor, keep_B: Tensor) -> Tensor:
    """The rows to keep, jagged."""
    return torch.nested.as_nested_tensor(_rows(jagged_BT, keep_B), layout=torch.jagged)


def in_one_row(jagged_BT: Tensor) -> Tensor:
    """(1, tokens): all rows one behind the other."""
    return jagged_BT.values().unsqueeze(0)


def padded(jagged_BT: Tensor, keep_B: Tensor) -> Tensor:
    """The rows to keep, with zeros up to the longest of them."""
    return torch.nn.utils.rnn.pad_sequence(_rows(jagged_BT, keep_B), batch_first=True)


def without(mask_BT: Tensor, drop_B: Tensor) -> Tensor:
    """A mask as bool, False on every token of the rows to drop; jagged."""
    result = _jagged(mask_BT.values() != 0, like=mask_BT)
    for row in _rows(result, drop_B):
        row.fill_(False)
    return result


def with_rows(jagged_BT: Tensor, replace_B: Tensor, padded_RT: Tensor) -> Tensor:
    """A copy in which these rows are replaced by those of a padded tensor, cut to their lengths."""
    result = _jagged(jagged_BT.values().clone(), like=jagged_BT)
    for row, new in zip(_rows(result, replace_B), padded_RT, strict=True):
        row.copy_(new[: len(row)])
    return result


def _rows(jagged_BT: Tensor, keep_B: Tensor) -> list[Tensor]:
    """Views of the rows to keep."""
    rows = jagged_BT.values().split(lengths(jagged_BT).tolist())
    return [row for row, keep in zip(rows, keep_B.tolist(), strict=True) if keep]


def _jagged(values: Tensor, like: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets(like))


def offsets(jagged: Tensor) -> Tensor:
    """(B+1,) bounds of the rows."""
    # torch's stubs know nothing of jagged tensors.
    return jagged.offsets()  # pyright: ignore[reportAttributeAccessIssue]
