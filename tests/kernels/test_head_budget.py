"""Counts the head's work on a GPU: GEMMs by shape, bytes read and written, and the peak of memory.

PyTorch's operations are recorded at the size of a real model, with tensors that have a shape but no memory, as they
would be launched on a GPU. A recorded operation reads and writes each of its tensors once; a row kernel reads the logits
twice and writes their gradient. A value for which the host would wait for the device does not exist and is an error.
"""

import collections
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hapo_kernels.linear_logprob import chunked
from hapo_kernels.linear_logprob import kernel as linear_kernel
from hapo_kernels.linear_logprob.streams import One
from hapo_kernels.memory import Rows, chunks_bytes, head_bytes, least_gib, pieces, rows_of, rows_within
from hapo_kernels.policy_head import kernel as head_kernel
from hapo_kernels.policy_loss import Aggregation, Clip

GEMM = ("mm", "addmm", "addmm_")
Op = collections.namedtuple("Op", "name shapes read written")
GIB = 2**30


class Recorder(TorchDispatchMode):
    """Records every operation that touches memory, and the peak of memory."""

    def __init__(self):
        super().__init__()
        self.ops, self.held, self.peak, self._known = [], 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, func._schema
        without_memory = func is not torch.ops.aten.addmm.dtype_out  # It cannot run without memory.
        out = func(*args, **kwargs) if without_memory else kwargs["out"]
        name, is_view = (
            schema.name.removeprefix("aten::"),
            any(r.alias_info and not r.alias_info.is_write for r in schema.returns),
        )
        if is_view or name == "detach" or name.startswith("prim::"):
            return out
        for tensor in _tensors(out):
            self._holds(tensor.untyped_storage())
        if name.startswith(("empty", "new_empty")):
            return out
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        writes = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        adds = name == "addmm" or (name.endswith("_") and name not in ("zero_", "fill_", "index_copy_", "copy_"))
        reads = [t for key, value in given.items() if key not in writes or adds for t in _tensors(value)]
        if name == "addmm":
            reads = reads[:3]  # Its result is its first argument.
        written = _tensors(out)
        if name in ("index_select", "index_copy_"):  # Only some rows are read and written.
            reads = written = [min(_tensors([args, out]), key=_bytes_of_rows)]
        shapes = tuple(tuple(t.shape) for t in (reads[-2:] if name in GEMM else reads))
        self.ops.append(Op(name, shapes, sum(map(_bytes, reads)), sum(map(_bytes, written))))
        return out

    def launched(self, name, reads, writes):
        self.ops.append(Op(name, (), reads, writes))

    def _holds(self, storage):
        if storage not in self._known:
            self._known[storage] = None
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._drops, storage.nbytes())

    def _drops(self, size):
        self.held -= size

    @property
    def gemms(self):
        return collections.Counter(op.shapes for op in self.ops if op.name in GEMM)

    @property
    def flops(self):
        return sum(2 * m * k * n for ((m, k), (_, n)) in self.gemms.elements())

    def moved(self, *names, least=0):
        ops = [op for op in self.ops if op.name in names] if names else [op for op in self.ops if op.name not in GEMM]
        return sum(op.read + op.written for op in ops if op.read + op.written >= least)


def _tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _bytes_of_rows(tensor):
    return (tensor.ndim != 2, _bytes(tensor))


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()


class Launch:
    """A replacement of a row kernel that only records what it would read and write."""

    def __init__(self, recorder, name, sweeps):
        self.recorder, self.name, self.sweeps = recorder, name, sweeps

    def __getitem__(self, grid):
        def launch(row, logits, *rest, **flags):
            elements = len(row) * logits.shape[1]
            out = rest[0] if "HAS_GRADIENT" in flags or "HAS_ENTROPY" in flags else None
            written = elements * out.element_size() if out is not None and flags.get("HAS_GRADIENT", True) else 0
            sweeps = self.sweeps if written else 1
            self.recorder.launched(self.name, sweeps * 4 * elements, written)

        return launch


def times_upstream_of(recorder):
    """A replacement of `times_upstream` that records its pass, as it is if the upstream scalar is not 1."""

    def times_upstream(gradient, upstream, dtype, *, consume=False):
        recorder.launched("upstream_kernel", _bytes(gradient), gradient.numel() * dtype.itemsize)
        return gradient if consume and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)

    return times_upstream


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    two = type("Two", (One,), {"buffers": 2})
    monkeypatch.setattr(chunked, "multiplies_narrow", lambda a: a.dtype != torch.float32)
    monkeypatch.setattr(chunked, "streams_of", lambda device, overlap: two() if overlap else One())
    for module, name, sweeps in (
        (linear_kernel, "stats_row_kernel", 1),
        (linear_kernel, "dlogits_row_kernel", 1),
        (head_kernel, "head_row_kernel", 2),
    ):
        monkeypatch.setattr(module, name, Launch(recorder, name, sweeps))
        monkeypatch.setattr(module, "row_settings", lambda *_: {})
    monkeypatch.setattr(head_kernel, "times_upstream", times_upstream_of(recorder))
    monkeypatch.setattr(head_kernel, "consumes", lambda ctx: True)
    with FakeTensorMode():
        yield recorder


def tensors(T, H, V, frozen=False):
    hidden = torch.empty(T, H, dtype=torch.bfloat16, requires_grad=True)
    return hidden, torch.empty(V, H, dtype=torch.bfloat16, requires_grad=not frozen)


def policy_head(recorder, T, H, V, rows, *, active=None, training=None, main_grad=None, frozen=False, backward=True):
    """Forward and backward pass of the registered operation for T active tokens in one sequence."""
    hidden, weight = tensors(T, H, V, frozen)
    label = torch.empty(1, T, dtype=torch.int64)
    ones = torch.empty(1, T)
    upstream = torch.empty(())
    into = torch.empty(V, H) if main_grad else None
    loss = head_kernel.row_loss(
        label,
        ones,
        ones,
        torch.empty(1, T, dtype=torch.bool),
        clip=Clip(0.2, 0.28, 3.0),
        aggregation=Aggregation("token-mean", batch_num_tokens=T),
        teacher=None,
        importance_weight_BT=None,
        kl=None,
        entropy_coefficient=0.0,
        temperature_N=torch.empty(T),
    )
    wanted = [True, not frozen, False]
    counts = [T if active is None else active, *([] if training is None else [training])]
    with torch.no_grad(), recorder:
        if main_grad:
            gradients = chunked.Gradients(hidden, weight, None, wanted, into, 1.0)
            head = chunked.Head(hidden, weight, None, rows)
            values = head_kernel.run_policy_head(head, loss, gradients, None, counts)
            dhidden, dweight, _ = gradients.result(None)
            assert dweight is None
            saved = (dhidden, torch.empty(0), torch.empty(0))
        else:
            values = head_kernel.policy_head_op._init_fn(hidden, weight, None, "", list(rows), counts, wanted, *loss)
            saved = values[4:]
        if backward:
            ctx = SimpleNamespace(
                saved_tensors=saved,
                dtypes=(torch.bfloat16, torch.bfloat16, None),
                needs_input_grad=(True, not (frozen or main_grad), False),
                inputs=25,
            )
            return values, head_kernel._backward(ctx, upstream)
    return values, None


T, H, V = 8192, 4096, 151936
ROWS = Rows(1024, 4096)
BIG = V * H  # Operations that move so many bytes use a tensor of the weight's size.


def test_the_budget_of_the_headline_shape(recorder):
    """8192 x 4096 x 151936 in bf16: 6THV flops, and ∂W written once, in bf16, by one GEMM; no fill and no sum."""
    rows = pieces(tensors(1, H, V)[1])
    assert rows == (*ROWS[:2], T)
    policy_head(recorder, T, H, V, rows)
    assert recorder.gemms == {
        ((1024, H), (H, V)): 8,  # logits
        ((1024, V), (V, H)): 8,  # ∂hidden
        ((V, T), (T, H)): 1,  # ∂weight
    }
    assert recorder.flops == 6 * T * H * V == pytest.approx(3.06e13, rel=1e-3)
    (weight_gemm,) = [op for op in recorder.ops if op.name in GEMM and op.shapes[0] == (V, T)]
    assert weight_gemm[2:] == (2 * T * (V + H), 2 * V * H)
    # In the backward pass it is read and written in place, and left alone if the upstream scalar is 1.
    assert [op.name for op in recorder.ops if op.name not in GEMM and op.read + op.written >= BIG] == [
        *["head_row_kernel"] * 8,
        "upstream_kernel",
    ]
    assert recorder.moved(least=BIG) == recorder.moved("head_row_kernel") + 4 * V * H
    # The peak is that of a sum in fp32 over collections of 4,096 rows, up to a chunk of dlogits.
    assert recorder.peak < head_bytes(ROWS, V, H) + 2 * 1024 * (V + H) + 4 * T * H


def test_the_budget_of_a_sum_of_several_gemms(recorder):
    """∂W is written once in fp32 and added to once, and read and converted once in the backward pass."""
    policy_head(recorder, T, H, V, ROWS)
    assert recorder.gemms == {
        ((1024, H), (H, V)): 8,  # logits
        ((1024, V), (V, H)): 8,  # ∂hidden
        ((V, 4096), (4096, H)): 2,  # ∂weight, of 4 chunks each
    }
    assert recorder.flops == 6 * T * H * V == pytest.approx(3.06e13, rel=1e-3)
    weight_gemms = [op for op in recorder.ops if op.name in GEMM and op.shapes[0] == (V, 4096)]
    operands = 2 * 4096 * (V + H)
    assert [op.name for op in weight_gemms] == ["mm", "addmm"]
    assert [op.written for op in weight_gemms] == [4 * V * H] * 2
    assert [op.read - operands for op in weight_gemms] == [0, 4 * V * H]
    # Besides its GEMMs, the weight's gradient is read once in fp32 and written once in 16 bits.
    assert recorder.moved(least=BIG) == recorder.moved("head_row_kernel") + 6 * V * H
    assert [op.name for op in recorder.ops if op.name not in GEMM and op.read + op.written >= BIG] == [
        *["head_row_kernel"] * 8,
        "upstream_kernel",
    ]
    assert recorder.moved("head_row_kernel") == 10 * T * V == pytest.approx(12.4e9, rel=5e-3)
    dweight_traffic = sum(op.read + op.written for op in weight_gemms) - 2 * operands
    assert dweight_traffic == 3 * 4 * V * H == pytest.approx(7.5e9, rel=5e-3)
    upstream = 6 * V * H
    assert upstream == pytest.approx(3.7e9, rel=1e-2)
    # Everything else together: gathers, sums and gradients of hidden states.
    rest = recorder.moved() - recorder.moved(least=BIG)
    assert rest < 16 * T * H + 1000 * T


@pytest.mark.parametrize("collected", [1024, 2048, 4096, 8192])
def test_every_further_gemm_of_the_weights_gradient_reads_and_writes_it_once(collected, recorder):
    policy_head(recorder, T, H, V, Rows(1024, collected))
    n = T // collected
    gemms = [op for op in recorder.ops if op.name in GEMM and op.shapes[0] == (V, collected)]
    assert len(gemms) == n
    traffic = sum(op.read + op.written - 2 * collected * (V + H) for op in gemms)
    assert traffic == (4 if n > 1 else 2) * V * H * (1 + 2 * (n - 1))
    assert recorder.flops == 6 * T * H * V


def test_a_main_grad_costs_no_additional_pass(recorder):
    policy_head(recorder, T, H, V, ROWS, main_grad=True)
    assert [op.name for op in recorder.ops if op.name not in GEMM and op.read + op.written >= BIG] == [
        "head_row_kernel"
    ] * 8
    assert [op.name for op in recorder.ops if op.name in GEMM and op.shapes[0] == (V, 4096)] == ["addmm"] * 2


def test_a_frozen_weight_costs_no_gradient_gemm_and_nothing_is_collected(recorder):
    policy_head(recorder, T, H, V, ROWS, frozen=True)
    assert recorder.flops == 4 * T * H * V
    assert recorder.peak < 8 * 1024 * V + 2 * 1024 * V + 10 * T * H


def test_untrained_tokens_enter_no_gemm_and_tokens_without_a_gradient_only_the_first(recorder):
    policy_head(recorder, T, H, V, ROWS, active=5 * 1024, training=3 * 1024)
    assert recorder.flops == (6 * 3 + 2 * 2) * 1024 * H * V


def test_a_step_waits_for_the_device_only_if_the_number_of_tokens_is_not_given(recorder):
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    policy_head(recorder, 2048, 64, 4096, Rows(512, 1024), active=2048, training=1024)
    names = {op.name for op in recorder.ops}
    assert not names & {"nonzero", "_local_scalar_dense", "item"}
    with pytest.raises(DynamicOutputShapeException, match="nonzero"):
        linear(recorder, 2048, 64, 4096, Rows(512, 1024), kept_rows=None)
    linear(recorder, 2048, 64, 4096, Rows(512, 1024), kept_rows=2048)


def linear(recorder, T, H, V, rows, kept_rows, main_grad=False):
    """Forward and backward pass of `linear_logprob` over T kept rows."""
    hidden, weight = tensors(T, H, V)
    label, one = torch.empty(T, dtype=torch.int64), torch.empty(T)
    keep = torch.empty(T, dtype=torch.bool)
    into = torch.empty(V, H) if main_grad else None
    with torch.no_grad(), recorder:
        saved = linear_kernel.linear_logprob_op._init_fn(
            hidden, weight, label, one, None, keep, True, "", list(rows), into, kept_rows
        )
        return linear_kernel.linear_logprob_backward_op._init_fn(
            one, None, hidden, weight, label, one, None, keep, *saved[1:], into, "", list(rows), kept_rows,
            [True, True, False],
        )  # fmt: skip


@pytest.mark.parametrize("main_grad", [False, True])
def test_the_budget_of_the_head_that_recomputes_logits(main_grad, recorder):
    linear(recorder, T, H, V, ROWS, T, main_grad)
    assert recorder.flops == 8 * T * H * V
    big = [op.name for op in recorder.ops if op.name not in GEMM and op.read + op.written >= BIG]
    cast = [] if main_grad else ["_to_copy"]
    assert big == [*["stats_row_kernel"] * 8, *["dlogits_row_kernel"] * 8, *cast]
    weight_gemms = [op.name for op in recorder.ops if op.name in GEMM and op.shapes[0] == (V, 4096)]
    assert weight_gemms == (["addmm", "addmm"] if main_grad else ["mm", "addmm"])


@pytest.mark.parametrize("memory_gib", [None, 4.0, "least"])
@pytest.mark.parametrize("head", [policy_head, linear])
def test_the_peak_of_memory_stays_within_the_budget(head, memory_gib, recorder):
    budget = least_gib(V, H) if memory_gib == "least" else memory_gib
    rows = ROWS if budget is None else rows_within(budget, V, H)
    arguments = (recorder, T, H, V, rows)
    kept = head(*arguments, T) if head is linear else head(*arguments)
    of_tokens = 4 * T * H + 1000 * T  # ∂hidden as computed and as returned, and numbers per token.
    limit = (head_bytes(rows, V, H) if budget is None else budget * GIB) + of_tokens
    assert 0.9 * head_bytes(rows, V, H) < recorder.peak <= limit
    assert kept


@pytest.mark.parametrize("memory_gib", ["least", 4.0, 5.0])
@pytest.mark.parametrize("head", [policy_head, linear])
def test_all_rows_that_one_gemm_takes_stay_within_the_budget(head, memory_gib, recorder):
    budget = least_gib(V, H) if memory_gib == "least" else memory_gib
    rows = pieces(tensors(1, H, V)[1], memory_gib=budget)
    assert rows.once > rows.collected
    most = rows.once
    kept = head(recorder, most, H, V, rows, most) if head is linear else head(recorder, most, H, V, rows)
    assert [shapes for shapes in recorder.gemms if shapes[0] == (V, most)] == [((V, most), (most, H))]
    assert recorder.peak <= budget * GIB + 4 * most * H + 1000 * most
    assert kept


def test_a_budget_picks_the_sizes_with_least_traffic_or_names_the_least_budget(recorder):
    assert rows_of(V) == ROWS == rows_within(100, V, H)
    assert rows_within(least_gib(V, H), V, H).chunk >= 16
    budgets = [least_gib(V, H), 3.6, 4.0, 4.5, 5.0]
    chosen = [rows_within(budget, V, H) for budget in budgets]
    traffic = [4 / rows.chunk + 8 / rows.collected for rows in chosen]
    assert traffic == sorted(traffic, reverse=True)
    assert len(set(chosen)) >= 3
    for budget, rows in zip(budgets, chosen, strict=True):
        assert head_bytes(rows, V, H) <= budget * GIB
        assert rows.collected % rows.chunk == 0
    with pytest.raises(
        ValueError, match=r"^memory_gib=1: a head of 151936 tokens and 4096 hidden units needs 3\.48 GiB at"
    ):
        rows_within(1, V, H)
    with pytest.raises(ValueError, match=r"memory_gib=4\.0: it picks chunk_rows and collect_rows, which are given too"):
        pieces(tensors(1, H, V)[1], chunk=512, memory_gib=4.0)
    # With few hidden units the returned tensors are small, and the chunks use the budget.
    small = rows_within(0.1, 50_000, 64)
    assert chunks_bytes(small, 50_000, 64) > 2 * 50_000 * 64
    assert head_bytes(small, 50_000, 64) <= 0.1 * GIB
