"""Row kernels and GEMMs on two streams overlap, without a race and with the same bits. Checked without a GPU.

Streams are simulated with vector clocks: one operation counts as running after another only if a wait guarantees it.
All memory that operations touch is recorded, and two operations that touch the same bytes, one of them writing, must
be ordered.
"""

import collections
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hapo_kernels.linear_logprob import chunked
from hapo_kernels.linear_logprob import kernel as linear_kernel
from hapo_kernels.linear_logprob.chunked import Gradients, Head
from hapo_kernels.linear_logprob.streams import One
from hapo_kernels.memory import Rows
from hapo_kernels.policy_head import kernel as head_kernel
from test_linear_logprob_kernel import head, ours, run
from test_policy_head import batch
from test_policy_head import ours as policy_ours

Touch = collections.namedtuple("Touch", "stream tick first last writes name")


class Played(TorchDispatchMode):
    """Simulates two streams and records every operation on them."""

    def __init__(self, buffers=2, joins=True):
        super().__init__()
        self.buffers, self.joins = buffers, joins
        self.now, self.clocks = "caller", {name: collections.Counter() for name in ("caller", "second")}
        self.touched, self.kept, self.races, self.overlapped = [], [], [], []

    def wait(self, waiting, on):
        self.clocks[waiting] |= self.clocks[on]

    @contextmanager
    def rows(self):
        self.wait("second", "caller")
        self.now = "second"
        yield
        self.now = "caller"

    def join(self):
        if self.joins:
            self.wait("caller", "second")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if any(r.alias_info and not r.alias_info.is_write for r in schema.returns):
            return out  # This is a view.
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        clock = self.clocks[self.now]
        clock[self.now] += 1
        for name, value in [*given.items(), (None, out)]:
            for tensor in tree_leaves(value):
                if isinstance(tensor, torch.Tensor) and tensor.numel() and not func._schema.name.endswith("empty"):
                    self.touch(tensor, name is None or name in written, schema.name.removeprefix("aten::"), clock)
        return out

    def touch(self, tensor, writes, name, clock):
        self.kept.append(tensor)  # Keep the tensor, so that no memory is allocated twice.
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        first = tensor.data_ptr()
        mine = Touch(self.now, clock[self.now], first, first + last * tensor.element_size(), writes, name)
        for other in self.touched:
            before = clock[other.stream] >= other.tick
            if not before and other.stream != mine.stream:
                self.overlapped.append((other.name, mine.name))
                if (mine.writes or other.writes) and mine.first < other.last and other.first < mine.last:
                    self.races.append((other.name, mine.name))
        self.touched.append(mine)


def play(played, monkeypatch, rows, *, wanted=(True, True, True), chunk=4, collected=8):
    """Run x = h Wᵀ + b with a row kernel that halves x; returns the gradients and the record of operations."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((rows, 6), (10, 6), (10,)))
    monkeypatch.setattr(chunked, "streams_of", lambda *_: played or One())
    gradients = Gradients(hidden, weight, bias, list(wanted))

    def halve(_, done, logits, dlogits):
        torch.mul(logits[: min(4, rows - done)], 0.5, out=dlogits[: min(4, rows - done)])

    with played or One().rows():
        Head(hidden, weight, bias, Rows(chunk, collected)).run(torch.arange(rows), halve, gradients)
        return gradients.result(None)


@pytest.mark.parametrize("rows", [4, 5, 8, 13, 23])
@pytest.mark.parametrize("collected", [4, 8, 100])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)])
def test_no_two_operations_race_and_the_bits_equal_those_of_one_stream(rows, collected, wanted, monkeypatch):
    played = Played()
    found = play(played, monkeypatch, rows, collected=collected, wanted=wanted)
    assert not played.races
    for mine, theirs in zip(found, play(None, monkeypatch, rows, collected=collected, wanted=wanted), strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_every_row_kernel_but_the_last_overlaps_with_the_next_chunks_first_gemm(monkeypatch):
    played = Played()
    play(played, monkeypatch, 13)
    beside = {(row, other) for row, other in played.overlapped if "mm" in other}
    assert beside == {("mul", "mm")}
    gemms = {touch.tick for touch in played.touched if touch.name == "mm"}
    kernels = {touch.tick for touch in played.touched if touch.stream == "second"}
    assert len(kernels) == 4
    assert len(gemms) == 4 + 4 + 1  # logits, ∂h, the first ∂W; the second is an addmm
    assert len({touch.tick for touch in played.touched if touch.name == "addmm_"}) == 1


def test_the_races_of_a_wrong_schedule_are_detected(monkeypatch):
    """The wrong schedules: one buffer for two chunks of logits, or no wait for the row kernel."""
    for wrong in (Played(buffers=1), Played(joins=False)):
        play(wrong, monkeypatch, 13)
        assert wrong.races


class Second(One):
    """Buffers of two streams; on the second stream nothing may be allocated and no PyTorch operation may run."""

    buffers = 2

    def rows(self):
        return OnlyViews()


class OnlyViews(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert any(r.alias_info for r in func._schema.returns), f"{func} beside the caller's stream"
        return func(*args, **(kwargs or {}))


class Launch:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **flags: None


def test_a_row_kernels_launch_allocates_nothing_and_runs_no_operation(monkeypatch):
    monkeypatch.setattr(chunked, "streams_of", lambda *_: Second())
    for module, name in (
        (linear_kernel, "stats_row_kernel"),
        (linear_kernel, "dlogits_row_kernel"),
        (head_kernel, "head_row_kernel"),
    ):
        monkeypatch.setattr(module, name, Launch())
    run(ours, *head(11, 37))
    policy_ours(batch())


def test_two_buffers_of_logits_give_the_same_bits(monkeypatch):
    fields, arguments = batch(), head(11, 37)
    one = policy_ours(fields) | {f"linear {name}": value for name, value in run(ours, *arguments).items()}
    monkeypatch.setattr(chunked, "streams_of", lambda *_: type("Two", (One,), {"buffers": 2})())
    two = policy_ours(fields) | {f"linear {name}": value for name, value in run(ours, *arguments).items()}
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: there are no streams")
def test_any_stream_of_the_callers_gives_the_same_bits():
    fields = batch(V=2049)
    plain = policy_ours(fields)
    stream = torch.cuda.Stream()
    for _ in range(20):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = policy_ours(fields)
        torch.cuda.current_stream().wait_stream(stream)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
