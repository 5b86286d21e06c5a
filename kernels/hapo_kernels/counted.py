"""Finds the rows that a mask keeps, with or without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_where(mask_N: Tensor, count: int | None = None) -> Tensor:
    """The int64 positions where the mask is True, in order.

    Args:
        mask_N: (N,) bool.
        count: the number of True values, if the caller knows it; else the host waits for the device. A wrong count is
            an error; on a GPU it is checked by an assertion on the device, without waiting.
    """
    if count is None:
        return mask_N.nonzero()[:, 0]
    message = f"{count} rows were announced, and the mask keeps another number of them."
    torch.ops.aten._assert_async.msg(mask_N.sum() == count, message)
    return mask_N.to(torch.uint8).argsort(descending=True, stable=True)[:count]
