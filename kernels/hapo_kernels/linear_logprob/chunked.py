"""The GEMMs of a language-model head for one chunk of rows at a time, with a row kernel after the first GEMM.

    a chunk, R rows:        x = h Wᵀ + b in fp32,    row kernel: x -> ∂x in the storage dtype,    ∂h = ∂x W
    a collection, C rows:   ∂W (+)= ∂xᵀ h in fp32

∂W has 4VH bytes, and every GEMM that adds to it reads and writes all of them. So the ∂x of several chunks are collected
for one GEMM. The first GEMM writes instead of adding, so ∂W need not be filled with zeros. A single collection needs no
sum: its GEMM writes ∂W in the storage dtype.

Every GEMM over a chunk has the same shape for every batch, so that the bits of a row's results do not depend on the
number of rows. The last chunk is padded with rows of zeros. On a GPU a row kernel runs at the same time as the next
chunk's first GEMM (`streams`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hapo_kernels.linear_logprob.streams import One, Two, streams_of
from hapo_kernels.memory import Rows

# Arguments: the chunk's row numbers, the number of rows before it, its logits, the output for their gradient or None.
RowKernel = Callable[[Tensor, int, Tensor, "Tensor | None"], None]


class Gradients:
    """Computes the gradients from dlogits: ∂hidden for each row, ∂weight and ∂bias summed over the rows."""

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        wanted: list[bool],
        main_grad_VH: Tensor | None = None,
        upstream: float = 1.0,
        *,
        single: bool = False,
    ):
        """Allocate the gradients.

        Args:
            hidden_NH, weight_VH, bias_V: the inputs of the head.
            wanted: whether the gradients of hidden states, weight and bias are needed.
            main_grad_VH: if given, `upstream` times ∂weight is added to it instead of being returned.
            upstream: factor of what is added to `main_grad_VH`.
            single: all rows are in one collection, so that its GEMM computes ∂weight in the dtype of the weight.
        """
        dense, fp32 = torch.contiguous_format, torch.float32
        self.weight_VH = weight_VH
        self.hidden_NH = torch.zeros_like(hidden_NH, memory_format=dense) if wanted[0] else None
        self.dbias_V = torch.zeros_like(bias_V, dtype=fp32) if wanted[2] and bias_V is not None else None
        self._main_grad_VH, self._upstream = main_grad_VH if wanted[1] else None, upstream
        self._dweight_VH = self._main_grad_VH
        if wanted[1] and main_grad_VH is None:
            dtype = weight_VH.dtype if single else fp32
            self._dweight_VH = torch.empty_like(weight_VH, dtype=dtype, memory_format=dense)
        self._adds = main_grad_VH is not None

    @property
    def collects(self) -> bool:
        """Whether the gradient of weight or bias is needed, so that dlogits must be collected."""
        return self._dweight_VH is not None or self.dbias_V is not None

    def of_chunk(self, row: Tensor, dlogits: Tensor) -> None:
        """Compute ∂hidden for the rows of a chunk; `dlogits` is padded to the size of a chunk."""
        if self.hidden_NH is not None:
            dhidden = matmul(dlogits, self.weight_VH)[: len(row)]
            self.hidden_NH.index_copy_(0, row, dhidden.to(self.hidden_NH.dtype))

    def of_collection(self, hidden: Tensor, dlogits: Tensor) -> None:
        """Add a collection to ∂weight and ∂bias; both arguments are padded, and dlogits is 0 in the padding."""
        if self._dweight_VH is not None:
            matmul_into(self._dweight_VH, dlogits.T, hidden, adds=self._adds, alpha=self._upstream)
            self._adds = True
        if self.dbias_V is not None:
            self.dbias_V += dlogits.sum(0, dtype=torch.float32)

    def result(self, group: dist.ProcessGroup | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns ∂hidden (summed over the ranks of `group`), ∂weight (None if added to `main_grad_VH`) and ∂bias."""
        if group is not None and self.hidden_NH is not None:
            dist.all_reduce(self.hidden_NH, group=group)
        if self._dweight_VH is not None and not self._adds:
            self._dweight_VH.zero_()
        return self.hidden_NH, None if self._main_grad_VH is not None else self._dweight_VH, self.dbias_V


class _Chunk(NamedTuple):
    """A chunk whose row kernel has been launched."""

    row: Tensor
    dlogits: Tensor
    # Hidden states and dlogits of the whole collection if this is its last chunk, else None.
    collection: tuple[Tensor, Tensor] | None


class Head:
    """A language-model head, and the chunk sizes in which it processes rows of hidden states."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, rows: Rows):
        self.hidden_NH, self.weight_VH, self.bias_V, self.rows = hidden_NH, weight_VH, bias_V, rows

    def run(
        self, row: Tensor, row_kernel: RowKernel, gradients: Gradients | None = None, *, overlap: bool = True
    ) -> None:
        """Run the head and `row_kernel` over the rows `row`, and pass their dlogits to `gradients`.

        With `overlap` the row kernel runs on a second stream; then it must not allocate memory on the GPU.
        """
        if not len(row):
            return
        size = self.rows.chunk
        chunks = -(-len(row) // size)
        slots = min(chunks, self.rows.collected // size) if gradients is not None and gradients.collects else 1
        streams = streams_of(row.device, overlap and chunks > 1)
        buffers = self._buffers(slots, streams.buffers, gradients is not None)
        try:
            self._run(row, row_kernel, gradients, streams, *buffers)
        finally:
            streams.join()

    def _buffers(self, slots: int, logits: int, gradient: bool) -> tuple[list[Tensor], Tensor | None]:
        """Allocate `logits` chunks of logits and, if a gradient is needed, dlogits of `slots` chunks."""
        size, V = self.rows.chunk, self.weight_VH.shape[0]
        chunks = [self.hidden_NH.new_empty(size, V, dtype=torch.float32) for _ in range(logits)]
        return chunks, self.hidden_NH.new_empty(slots * size, V) if gradient else None

    def _run(
        self,
        row: Tensor,
        row_kernel: RowKernel,
        gradients: Gradients | None,
        streams: One | Two,
        logits: list[Tensor],
        dlogits: Tensor | None,
    ) -> None:
        size, hidden, last = self.rows.chunk, self.hidden_NH, None
        collected = size if dlogits is None else len(dlogits)
        for number, piece in enumerate(row.split(size)):
            done = number * size
            start = done % collected
            if start == 0:
                hidden = self._gather(row[done : done + collected])
            here, x = slice(start, start + size), logits[number % len(logits)]
            logits_into(x, hidden[here], self.weight_VH, self.bias_V)
            streams.join()  # waits for the last chunk's row kernel, which ran while these logits were computed
            if gradients is not None and last is not None:
                _finish(last, gradients)
            into = None if dlogits is None else _padded(dlogits[here], len(piece))
            with streams.rows():
                row_kernel(piece, done, x, into)
            if dlogits is not None:
                whole = start + size == len(hidden)
                last = _Chunk(piece, dlogits[here], (hidden, dlogits[: len(hidden)]) if whole else None)
        streams.join()
        if gradients is not None and last is not None:
            _finish(last, gradients)

    def _gather(self, row: Tensor) -> Tensor:
        """The hidden states of these rows, padded with rows of zeros to a multiple of the chunk size."""
        padded = -(-len(row) // self.rows.chunk) * self.rows.chunk
        hidden = self.hidden_NH.new_empty(padded, self.hidden_NH.shape[1])
        torch.index_select(self.hidden_NH, 0, row, out=hidden[: len(row)])
        return _padded(hidden, len(row))


def _finish(chunk: _Chunk, gradients: Gradients) -> None:
    gradients.of_chunk(chunk.row, chunk.dlogits)
    if chunk.collection is not None:
        gradients.of_collection(*chunk.collection)


def _padded(values: Tensor, rows: int) -> Tensor:
    """Set `values` to zero from the row `rows` on, in place, and return it."""
    if rows < len(values):
        values[rows:].zero_()
    return values


def logits_into(out: Tensor, hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
    """out = h Wᵀ + b in fp32."""
    matmul_into(out, hidden, weight_VH.T)
    if bias_V is not None:
        out.add_(bias_V)


def multiplies_narrow(a: Tensor) -> bool:
    """Whether 16-bit numbers are multiplied in their own dtype, with sums in fp32.

    On a CPU, where kernels are only tested, they are converted to fp32 first.
    """
    return a.is_cuda and a.dtype != torch.float32


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 accumulation."""
    return torch.mm(a, b) if multiplies_narrow(a) else a.float() @ b.float()


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, adds: bool = False, alpha: float = 1.0) -> None:
    """out = a @ b, or out += alpha · a @ b, accumulated in fp32; `out` is fp32, or a's dtype if nothing is added."""
    narrow = multiplies_narrow(a)
    if adds and narrow:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, alpha=alpha, out=out)
    elif adds:
        out.addmm_(a.float(), b.float(), alpha=alpha)
    elif narrow and out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif narrow:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif out.dtype == torch.float32:
        torch.mm(a.float(), b.float(), out=out)
    else:
        out.copy_(torch.mm(a.float(), b.float()))
