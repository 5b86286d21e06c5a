"""The Triton language-model head compared with fp64 autograd: no less exact than PyTorch's head in the same dtype."""

import functools
import math

import pytest
import torch

from exactness import DEVICE, STORAGE, assert_no_less_exact
from hapo_kernels.linear_logprob import chunked, kernel, linear_logprob
from hapo_kernels.memory import rows_a_chunk

CHUNK = 4


def head(rows, V, H=37, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(rows, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) / math.sqrt(H)
    label = torch.randint(0, V, (rows,), generator=generator)
    ends = [0, V - 1, V // 2]
    label[: len(ends[:rows])] = torch.tensor(ends[:rows])
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), label.to(DEVICE)


def eager(hidden, weight, label, *, bias_V=None, temperature=1.0, with_entropy=False, keep_N=None):
    """The usual implementation in a trainer: logits in the storage dtype, softmax in fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias_V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, None].to(logits.dtype)
    logp = torch.log_softmax(logits / temperature, -1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0)).sum(-1)
    logp = logp.gather(1, label[:, None])[:, 0]
    keep = torch.ones_like(label, dtype=torch.bool) if keep_N is None else keep_N
    return torch.where(keep, logp, 0), torch.where(keep, entropy, 0)


def run(function, hidden, weight, label, slope=None, entropy_slope=None, dtype=None, **settings):
    cast = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (hidden, weight)]
    if settings.get("bias_V") is not None:
        settings["bias_V"] = settings["bias_V"].detach().to(dtype or settings["bias_V"].dtype).requires_grad_()
        cast.append(settings["bias_V"])
    logp, entropy = function(*cast[:2], label, with_entropy=True, **settings)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, len(label), generator=generator, dtype=torch.float64).to(DEVICE)
    slope = drawn[0] if slope is None else slope
    entropy_slope = drawn[1] if entropy_slope is None else entropy_slope
    gradients = torch.autograd.grad((slope * logp + entropy_slope * entropy).sum(), cast)
    return dict(
        zip(
            ("logp", "entropy", "dhidden", "dweight", "dbias"),
            (logp.detach(), entropy.detach(), *gradients),
            strict=False,
        )
    )


def ours(*args, **settings):
    return linear_logprob(*args, impl="triton", **{"chunk_rows": CHUNK, "collect_rows": 2 * CHUNK} | settings)


def check(hidden, weight, label, collect_rows=2 * CHUNK, **settings):
    found = run(functools.partial(ours, collect_rows=collect_rows), hidden, weight, label, **settings)
    same_dtype = run(eager, hidden, weight, label, **settings)
    exact = run(eager, hidden, weight, label, dtype=torch.float64, **settings)
    for name in exact:
        assert_no_less_exact(found[name], same_dtype[name], exact[name], name)
    return found


@pytest.mark.parametrize("V", [1, 37, 997, 1023, 1025, 2047, 2049])
def test_every_vocabulary_in_every_storage_dtype(V):
    for dtype in STORAGE:
        check(*head(3, V, dtype=dtype))


@pytest.mark.parametrize("V", [50257, 151936])
def test_vocabularies_of_real_models(V):
    check(*head(3, V, H=8))


@pytest.mark.parametrize("rows", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 7, 127, 128, 129])
def test_every_number_of_rows(rows):
    check(*head(rows, 37))


@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
def test_logits_of_every_size(scale):
    check(*head(4, 997, scale=scale))


def test_a_common_offset_of_1e4_and_one_hot_rows():
    hidden, weight, label = head(4, 997)
    check(hidden, weight, label, bias_V=torch.full((997,), 1e4, device=DEVICE))
    bias = torch.zeros(997, device=DEVICE)
    bias[label[0]] = 1e4
    found = check(hidden, weight, label, bias_V=bias)
    assert found["logp"][0] == 0
    assert found["entropy"][0] == 0


def test_logits_of_minus_infinity_at_and_beside_the_label():
    hidden, weight, label = head(3, 4097, H=8)
    label[:] = 4096
    nowhere = torch.zeros(4097, device=DEVICE)
    first_block = nowhere.clone()
    first_block[:2048] = -math.inf
    only_label = torch.full_like(nowhere, -math.inf)
    only_label[4096] = 0
    at_label = nowhere.clone()
    at_label[4096] = -math.inf
    for bias in (first_block, only_label):
        found = check(hidden, weight, label, bias_V=bias)
        assert all(value.isfinite().all() for value in found.values())
    found = run(ours, hidden, weight, label, bias_V=at_label)
    assert (found["logp"] == -math.inf).all()
    assert all(found[name].isfinite().all() for name in ("entropy", "dhidden", "dweight", "dbias"))


def test_a_nan_logit_is_not_hidden():
    hidden, weight, label = head(3, 4097, H=8)
    bias = torch.zeros(4097, device=DEVICE)
    bias[3000] = math.nan
    found = linear_logprob(hidden, weight, label, bias_V=bias, with_entropy=True, impl="triton", chunk_rows=CHUNK)
    assert found.logp_N.isnan().all()
    assert found.entropy_N.isnan().all()


@pytest.mark.parametrize("temperature", [1e-2, 0.6, 1e2])
def test_temperatures(temperature):
    check(*head(5, 997), temperature=temperature)


def test_a_tensor_of_equal_temperatures_gives_the_bits_of_the_number():
    hidden, weight, label = head(5, 997)
    check(hidden, weight, label, temperature=torch.tensor([1e-2, 0.6, 1.0, 1.5, 1e2], device=DEVICE))
    number = run(ours, hidden, weight, label, temperature=0.6)
    tensor = run(ours, hidden, weight, label, temperature=torch.full((5,), 0.6, device=DEVICE))
    assert all(torch.equal(number[name], tensor[name]) for name in number)


def test_the_gradient_of_each_output_by_itself():
    zero = torch.zeros(5, dtype=torch.float64, device=DEVICE)
    for alone in ("slope", "entropy_slope"):
        check(*head(5, 997), **{alone: zero})


def test_an_entropy_that_no_loss_uses_costs_no_work(monkeypatch):
    hidden, weight, label = head(3, 37)
    seen, launch = [], kernel.dlogits_row_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **flags: (seen.append(flags["HAS_ENTROPY"]), launch[grid](*args, **flags))

    monkeypatch.setattr(kernel, "dlogits_row_kernel", Spy())
    hidden.requires_grad_()
    result = ours(hidden, weight, label, with_entropy=True)
    torch.autograd.grad(result.logp_N.sum(), hidden)
    result = ours(hidden, weight, label, with_entropy=True)
    torch.autograd.grad(result.entropy_N.sum(), hidden)
    assert seen == [False, True]


def test_rows_with_a_zero_upstream_gradient_enter_no_backward_gemm(monkeypatch):
    hidden, weight, label = head(9, 37)
    rows, of_chunk = [], chunked.Gradients.of_chunk
    monkeypatch.setattr(
        chunked.Gradients, "of_chunk", lambda self, row, *rest: (rows.extend(row.tolist()), of_chunk(self, row, *rest))
    )
    slope = torch.tensor([0, 1, 0, 0, 0, 2, 0, 0, 3.0], device=DEVICE)
    check(hidden, weight, label, slope=slope, entropy_slope=torch.zeros(9, device=DEVICE))
    assert rows == [1, 5, 8]


@pytest.mark.parametrize("collect_rows", [1, CHUNK, 2 * CHUNK, 1000])
def test_however_many_chunks_are_collected_the_gradient_is_the_same(collect_rows):
    arguments = head(11, 997)
    found = check(*arguments, collect_rows=collect_rows)
    again, plain = run(ours, *arguments, collect_rows=collect_rows), run(ours, *arguments)
    for name in found:
        assert torch.equal(found[name], again[name]), name
        if name != "dweight":
            assert torch.equal(found[name], plain[name]), name


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_weights_gradient_is_added_to_a_tensor_of_the_callers(impl):
    for dtype in STORAGE:
        hidden, weight, label = head(11, 37, dtype=dtype)
        start = torch.linspace(-1, 1, 37 * 37, device=DEVICE).view(37, 37)
        slope = torch.linspace(-1, 2, 11, device=DEVICE)

        def loss(function, dtype, hidden=hidden, weight=weight, label=label, slope=slope, **settings):
            leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
            loss = (slope * function(*leaves, label, **settings)[0]).sum()
            return torch.autograd.grad(loss, leaves, allow_unused=True)

        main_grad = start.clone()
        for _ in range(2):
            settings = {"impl": impl, "chunk_rows": CHUNK, "collect_rows": 2 * CHUNK, "main_grad_VH": main_grad}
            dhidden, dweight = loss(linear_logprob, dtype, **settings)
            assert dweight is None
        same_dtype, exact = loss(eager, dtype), loss(eager, torch.float64)
        assert_no_less_exact(main_grad, start + 2 * same_dtype[1].float(), start + 2 * exact[1])
        assert_no_less_exact(dhidden, same_dtype[0], exact[0])
    with pytest.raises(ValueError, match=r"main_grad_VH: torch.float32 of shape \(37,\)"):
        linear_logprob(hidden, weight, label, impl=impl, main_grad_VH=torch.zeros(37, device=DEVICE))


def test_a_number_of_rows_that_is_known_changes_nothing_but_who_waits():
    hidden, weight, label = head(11, 37)
    label[3] = -100
    keep = torch.arange(11, device=DEVICE) % 4 != 1
    slope = torch.linspace(-1, 2, 11, device=DEVICE).round()
    assert (slope[keep] == 0).any()
    expected, found = (
        run(ours, hidden, weight, label, slope, 0 * slope, keep_N=keep, kept_rows=count) for count in (None, 7)
    )
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    if DEVICE == "cpu":  # On a GPU the assertion ends the process.
        with pytest.raises(RuntimeError, match="8 rows were announced, and the mask keeps another number of them"):
            ours(hidden, weight, label, keep_N=keep, kept_rows=8)


def test_keep_masks():
    hidden, weight, label = head(9, 997)
    for keep in ([False] * 9, [True] * 9, [False] * 4 + [True] + [False] * 4, [True, False, True] * 3):
        check(hidden, weight, label, keep_N=torch.tensor(keep, device=DEVICE))


def test_int32_labels_strided_inputs_and_expanded_upstream_gradients():
    hidden, weight, label = head(5, 997)
    temperature = torch.linspace(0.5, 2, 5, device=DEVICE)
    plain = run(ours, hidden, weight, label, temperature=temperature)
    every_second = (tensor.repeat_interleave(2, 0)[::2] for tensor in (hidden, label.int(), temperature))
    strided_hidden, strided_label, strided_temperature = every_second
    unaligned = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view_as(weight)
    for odd_weight in (weight.T.contiguous().T, unaligned):
        odd = run(ours, strided_hidden, odd_weight, strided_label, temperature=strided_temperature)
        for name in plain:
            torch.testing.assert_close(odd[name], plain[name], rtol=1e-5, atol=1e-6)
    hidden.requires_grad_()
    (expanded,) = torch.autograd.grad(ours(hidden, weight, label).logp_N.sum(), hidden)
    (dense,) = torch.autograd.grad(ours(hidden, weight, label).logp_N @ torch.ones(5, device=DEVICE), hidden)
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_two_runs_give_the_same_bits(impl):
    arguments = head(9, 2049)
    function = functools.partial(linear_logprob, impl=impl, chunk_rows=CHUNK)
    first, second = run(function, *arguments), run(function, *arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_rows_do_not_change_a_rows_bits():
    # Powers of two: on a CPU the GEMM itself rounds a row by its place in the matrix otherwise.
    hidden, weight, label = head(9, 2048, H=32)
    slope = torch.linspace(-1, 2, 9, device=DEVICE)
    order = torch.tensor([8, 3, 3, 0, 5], device=DEVICE)
    everything = run(ours, hidden, weight, label, slope, slope)
    some = run(ours, hidden[order], weight, label[order], slope[order], slope[order])
    for name in ("logp", "entropy", "dhidden"):
        assert torch.equal(some[name], everything[name][order]), name


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_tensor_gets_no_gradient_work(frozen, monkeypatch):
    hidden, weight, label = head(5, 37)
    expected = run(ours, hidden, weight, label, entropy_slope=torch.zeros(5, device=DEVICE))
    free = weight if frozen == "hidden" else hidden
    made = []
    result_of = chunked.Gradients.result
    monkeypatch.setattr(chunked.Gradients, "result", lambda *args: (made.append(result_of(*args)), made[-1])[1])
    free.requires_grad_()
    slope = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[0].to(DEVICE)
    (gradient,) = torch.autograd.grad((slope * ours(hidden, weight, label).logp_N).sum(), free)
    assert torch.equal(gradient, expected["dweight" if frozen == "hidden" else "dhidden"])
    assert [value is None for value in made[0]] == [frozen == "hidden", frozen == "weight", True]


def test_a_tied_weight_gets_both_gradients():
    _, weight, label = head(5, 37)

    def gradient(function, dtype):
        table = weight.detach().to(dtype).requires_grad_()
        hidden = torch.nn.functional.embedding(torch.arange(5, device=DEVICE), table).tanh()
        return torch.autograd.grad(function(hidden, table, label)[0].sum(), table)[0]

    assert_no_less_exact(gradient(ours, torch.float32), gradient(eager, torch.float32), gradient(eager, torch.float64))


def test_no_grad_gives_the_same_value():
    hidden, weight, label = head(5, 37)
    with torch.no_grad():
        value = ours(hidden.requires_grad_(), weight, label).logp_N
    assert not value.requires_grad
    assert torch.equal(value, ours(hidden, weight, label).logp_N.detach())


def test_the_op_is_registered_so_that_compile_and_fake_tensors_work():
    hidden, weight, label = head(3, 37)
    hidden.requires_grad_()
    weight.requires_grad_()
    arguments = (
        hidden,
        weight,
        label,
        torch.ones(3, device=DEVICE),
        None,
        torch.ones(3, device=DEVICE).bool(),
        True,
        "",
        [CHUNK, 2 * CHUNK],
        None,
        None,
    )
    torch.library.opcheck(kernel.linear_logprob_op, arguments)

    def loss(hidden):
        result = ours(hidden, weight, label, with_entropy=True)
        return result.logp_N.sum() + result.entropy_N.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (expected,), (found,) = torch.autograd.grad(loss(hidden), hidden), torch.autograd.grad(compiled(hidden), hidden)
    assert torch.equal(found, expected)


def test_a_second_derivative_is_refused():
    hidden, weight, label = head(3, 37)
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="linear_logprob: create_graph=True: the kernel has a first derivative only"):
        torch.autograd.grad(ours(hidden, weight, label).logp_N.sum(), hidden, create_graph=True)


def test_chunks_hold_at_most_a_gibibyte_of_logits():
    for V in (1, 37, 32000, 128256, 151936, 152064, 2**24):
        rows = rows_a_chunk(V)
        assert rows & (rows - 1) == 0
        assert rows in (16, 4096) or 2**29 < 4 * rows * V <= 2**30


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_loss_of_whole_sequences_works_with_the_head_that_recomputes_logits(impl):
    """REAL, arXiv 2602.05630: s = mean log-ratio of a row, loss = log(1 + Σ₊ e^(-s/τ)) + log(1 + Σ₋ e^(s/τ))."""
    hidden, weight, label = head(12, 37)
    old_logp = eager(hidden, weight, label)[0].detach() + torch.linspace(-0.3, 0.4, 12, device=DEVICE)

    def gradients(function, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
        log_ratio = function(*leaves, label)[0] - old_logp.to(dtype)
        success, failure = (log_ratio.view(4, 3).mean(1) / 0.5).split([1, 3])
        loss = torch.log1p((-success).exp().sum()) + torch.log1p(failure.exp().sum())
        return torch.autograd.grad(loss, leaves)

    head_of = functools.partial(linear_logprob, impl=impl, chunk_rows=CHUNK)
    found, same_dtype, exact = (
        gradients(head_of, torch.float32),
        gradients(eager, torch.float32),
        gradients(eager, torch.float64),
    )
    for mine, theirs, truth in zip(found, same_dtype, exact, strict=True):
        assert truth.abs().max() > 1e-2
        assert_no_less_exact(mine, theirs, truth)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: 2^31 logits are beyond the interpreter")
def test_offsets_beyond_2_to_the_31():
    hidden, weight, label = head(16_384, 151_936, H=64, dtype=torch.bfloat16)
    at_once = linear_logprob(hidden, weight, label, chunk_rows=16_384, impl="triton")
    in_chunks = linear_logprob(hidden, weight, label, chunk_rows=1024, impl="triton")
    torch.testing.assert_close(at_once.logp_N, in_chunks.logp_N)
