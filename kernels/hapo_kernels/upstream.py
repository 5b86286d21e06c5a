"""The backward pass of a gradient that was computed in the forward pass: multiply by the upstream scalar, and convert.

The scalar is known to the device only. A kernel reads it there, and if it is 1, which it is where the loss is the end
of the graph, and nothing is to be converted, then nothing is read or written. On an H100, for a weight of 152k x 4096
(`bench/results/h100_first/profile.txt`): 2.5 ms with `torch.mul(fp32, scalar, out=bf16)`, which casts each number by
itself; 1.3 ms with a kernel of this form, and .85 ms for 16 bits from 16 bits.
"""

# Triton passes ints for constexpr parameters and adds num_warps to every launch; pyright knows neither.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter

from hapo_kernels.dispatch import interpreted

BLOCK, WARPS = 8192, 8  # large, since with an upstream scalar of 1 the launch of the programs is all that is left


@triton.jit
def upstream_kernel(gradient_ptr, upstream_ptr, out_ptr, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Write upstream · gradient for BLOCK numbers; IN_PLACE over the gradient, and not at all if upstream is 1."""
    upstream = tl.load(upstream_ptr).to(tl.float32)
    if (not IN_PLACE) or upstream != 1.0:
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        gradient = tl.load(gradient_ptr + o, mask=o < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + o, (gradient * upstream).to(out_ptr.dtype.element_ty), mask=o < size)


def times_upstream(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, *, consume: bool = False) -> Tensor:
    """Returns upstream · gradient in another dtype.

    Args:
        gradient: contiguous, of any shape.
        upstream: 0-d, on the same device.
        dtype: of the result.
        consume: nobody reads `gradient` after this call, so that the result may be written over it.
    """
    # Tensors that a compiler traces have a type of their own; it fuses these two.
    if type(gradient) is not Tensor or not (gradient.is_cuda or interpreted()):
        return (gradient * upstream).to(dtype)
    in_place = consume and gradient.dtype == dtype
    out = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    if gradient.numel():
        grid = (triton.cdiv(gradient.numel(), BLOCK),)
        upstream_kernel[grid](
            gradient, upstream, out, gradient.numel(), IN_PLACE=in_place, BLOCK=BLOCK, num_warps=WARPS
        )
    return out


def consumes(ctx: Any) -> bool:
    """Whether the running backward pass is the last reader of the gradients in `ctx`.

    They are outputs of a custom op, which the op's caller may hold, but not of the function that `eager` makes; and a
    backward pass with retain_graph=True has others after it.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # pyright: ignore
    return getattr(ctx, "hides_gradients", False) and keeps is not None and not keeps()


def eager(op: Callable, run: Callable, save: Callable, backward: Callable, outputs: int) -> Callable[..., Any]:
    """A custom op whose last outputs are gradients, as a function that keeps these to itself.

    It also spares the host the work of a custom op. The op itself is called where a compiler traces, and for what is
    not a plain tensor.

    Args:
        op: the custom op.
        run: the same as a plain function.
        save, backward: as for `op.register_autograd`; of the outputs only the first one has a gradient.
        outputs: number of outputs that are not gradients.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
            values = run(*inputs)
            save(ctx, inputs, values)
            ctx.hides_gradients = True
            ctx.mark_non_differentiable(*values[1:outputs])
            return values[:outputs]

        @staticmethod
        def backward(ctx, *upstream):  # pyright: ignore[reportIncompatibleMethodOverride]
            return backward(ctx, *upstream)

    def call(*inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        plain = not torch.compiler.is_compiling() and all(type(value) in (Tensor, Parameter) for value in tensors)
        return Eager.apply(*inputs) if plain else op(*inputs)

    return call
