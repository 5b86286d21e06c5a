"""Operations on jagged (B, T) tensors, the form in which TransferQueue returns responses, without padding them."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths(jagged_BT: Tensor) -> Tensor:
    """The number of tokens of each row, (B,)."""
    return offsets(jagged_BT).diff()


def row_sums(jagged_BT: Tensor) -> Tensor:
    """The sum over the tokens of each row, (B,), without a temporary tensor of the size of all tokens."""
    values = jagged_BT.values()
    if values.is_floating_point():
        return torch.segment_reduce(values, "sum", offsets=offsets(jagged_BT), initial=0)
    sums = [row.sum() for row in values.split(lengths(jagged_BT).tolist())]
    return torch.stack(sums) if sums else values.new_zeros(0, dtype=torch.int64)


def spread(value_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Write each row's value on its tokens where the jagged mask is 1, and 0 elsewhere; jagged like the mask."""
    mask = mask_BT.values()
    values = torch.empty(mask.shape, dtype=value_B.dtype)
    # Filled row by row: an int64 row index for every token would be twice as large as the result.
    for row, value in zip(values.split(lengths(mask_BT).tolist()), value_B.tolist(), strict=True):
        row.fill_(value)
    return _jagged(values.mul_(mask), like=mask_BT)


def select(jagged_BT: Tensor, keep_B: Tensor) -> Tensor:
    """The rows where `keep_B` is True, as a jagged tensor."""
    return torch.nested.as_nested_tensor(_rows(jagged_BT, keep_B), layout=torch.jagged)


def in_one_row(jagged_BT: Tensor) -> Tensor:
    """All rows joined into one, (1, tokens)."""
    return jagged_BT.values().unsqueeze(0)


def padded(jagged_BT: Tensor, keep_B: Tensor) -> Tensor:
    """The rows where `keep_B` is True, padded with zeros to the longest of them."""
    return torch.nn.utils.rnn.pad_sequence(_rows(jagged_BT, keep_B), batch_first=True)


def without(mask_BT: Tensor, drop_B: Tensor) -> Tensor:
    """The mask as a jagged bool tensor, set to False on every token of the rows where `drop_B` is True."""
    result = _jagged(mask_BT.values() != 0, like=mask_BT)
    for row in _rows(result, drop_B):
        row.fill_(False)
    return result


def with_rows(jagged_BT: Tensor, replace_B: Tensor, padded_RT: Tensor) -> Tensor:
    """A copy in which the R rows where `replace_B` is True are replaced by rows of a padded tensor, cut to length."""
    result = _jagged(jagged_BT.values().clone(), like=jagged_BT)
    for row, new in zip(_rows(result, replace_B), padded_RT, strict=True):
        row.copy_(new[: len(row)])
    return result


def _rows(jagged_BT: Tensor, keep_B: Tensor) -> list[Tensor]:
    """Views of the rows where `keep_B` is True."""
    rows = jagged_BT.values().split(lengths(jagged_BT).tolist())
    return [row for row, keep in zip(rows, keep_B.tolist(), strict=True) if keep]


def _jagged(values: Tensor, like: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets(like))


def offsets(jagged: Tensor) -> Tensor:
    """The offsets of the rows in the joined values, (B+1,)."""
    # torch's type stubs do not know jagged tensors.
    return jagged.offsets()  # pyright: ignore[reportAttributeAccessIssue]
