"""Places of the rows that a mask keeps, with or without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_where(mask_N: Tensor, count: int | None = None) -> Tensor:
    """int64 places of the True ones, in order.

    Args:
        mask_N: bool.
        count: how many they are, where somebody knows. Without it the host waits for the device to say. A wrong one is
            an error; on a GPU it is an assertion on the device, which waits for nothing.
    """
    if count is None:
        return mask_N.nonzero()[:, 0]
    message = f"{count} rows were announced, and the mask keeps another number of them."
    torch.ops.aten._assert_async.msg(mask_N.sum() == count, message)
    return mask_N.to(torch.uint8).argsort(descending=True, stable=True)[:count]
