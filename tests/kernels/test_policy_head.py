"""Head and loss in one pass: equal to the loss of the log-probabilities, as exact as PyTorch, without needless work."""

import math

import pytest
import torch

from exactness import DEVICE, STORAGE, assert_no_less_exact
from hapo_kernels.linear_logprob import chunked, linear_logprob
from hapo_kernels.linear_logprob.streams import One
from hapo_kernels.memory import rows_within
from hapo_kernels.policy_head import kernel as policy_head_kernel
from hapo_kernels.policy_head import policy_head, policy_loss_from_logits
from hapo_kernels.policy_loss import Aggregation, Clip, EntropyBonus, KLPenalty, Teacher, policy_loss
from hapo_kernels.policy_loss.terms import AGGREGATION_MODES

CLIP = Clip(low=0.2, high=0.28, dual=3.0)
GLOBAL = {"dp_size": 2, "batch_num_tokens": 4321, "global_batch_size": 37, "loss_scale_factor": 50}


def batch(rows=4, tokens=5, V=37, H=24, seed=0, dtype=torch.float32):
    """A batch with prefix masks of every length, one teacher row, and NaN, inf and wrong labels on inactive tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.arange(tokens) < torch.linspace(0, tokens, rows).long()[:, None]
    hidden, weight = normal(rows, tokens, H), normal(V, H) / math.sqrt(H)
    label = torch.randint(0, V, (rows, tokens), generator=generator)
    logp = torch.log_softmax(hidden @ weight.T, -1).gather(-1, label[..., None])[..., 0]
    fields = {
        "hidden": torch.where(mask[..., None], hidden, math.nan).to(dtype),
        "weight": weight.to(dtype),
        "bias": (0.1 * normal(V)).to(dtype),
        "label": torch.where(mask, label, 10**12),
        "behaviour": torch.where(mask, logp + 0.5 * normal(rows, tokens), math.inf),
        "advantage": normal(rows),
        "mask": mask,
        "teacher": torch.arange(rows) % 3 == 1,
        "teacher_logp": -normal(rows, tokens).abs(),
        "importance": normal(rows, tokens).abs(),
        "reference": torch.where(mask, logp + normal(rows, tokens), math.nan),
    }
    return {name: tensor.to(DEVICE) for name, tensor in fields.items()}


def settings_of(fields, *, mode="token-mean", info=GLOBAL, temperature=1.0, entropy_coefficient=0.01, **given):
    return {
        "clip": CLIP,
        "aggregation": Aggregation(mode, **info),
        "teacher": Teacher(fields["teacher"], 0.1, fields["teacher_logp"]),
        "importance_weight_BT": fields["importance"],
        "kl": KLPenalty(fields["reference"], "k3", 0.05),
        "entropy_coefficient": entropy_coefficient,
        "temperature": temperature,
        **given,
    }


def leaves_of(fields, dtype=None):
    return [
        fields[name].detach().to(dtype or fields[name].dtype).requires_grad_() for name in ("hidden", "weight", "bias")
    ]


def named(loss, metrics, leaves):
    gradients = dict(zip(("dhidden", "dweight", "dbias"), torch.autograd.grad(loss, leaves), strict=True))
    return {"loss": loss.detach(), **gradients, **metrics._asdict()}


def ours(fields, impl="triton", dtype=None, chunk_rows=4, collect_rows=8, memory_gib=None, **given):
    if dtype:
        fields = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in fields.items()}
    hidden, weight, bias = leaves = leaves_of(fields)
    result = policy_head(
        hidden,
        weight,
        fields["label"],
        fields.get("behaviour"),
        fields["advantage"],
        fields["mask"],
        bias_V=bias,
        chunk_rows=chunk_rows,
        collect_rows=collect_rows,
        memory_gib=memory_gib,
        impl=impl,
        **settings_of(fields, **given),
    )
    return named(result.loss, result.metrics, leaves)


def eager(fields, **given):
    """The usual implementation in a trainer: logits in the storage dtype, softmax in fp32, autograd."""
    hidden, weight, bias = leaves = leaves_of(fields)
    settings = settings_of(fields, **given)
    temperature = settings.pop("temperature")
    temperature = temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature
    safe_hidden = torch.where(fields["mask"][..., None], hidden, 0.0)
    logp_BTV = torch.log_softmax(torch.nn.functional.linear(safe_hidden, weight, bias).float() / temperature, -1)
    entropy = -(logp_BTV.exp() * logp_BTV).sum(-1)
    logp = logp_BTV.gather(-1, torch.where(fields["mask"], fields["label"], 0)[..., None])[..., 0]
    bonus = EntropyBonus(entropy, settings.pop("entropy_coefficient"))
    result = policy_loss(logp, fields.get("behaviour"), fields["advantage"], fields["mask"], entropy=bonus, **settings)
    return named(result.loss, result.metrics, leaves)


def check(fields, collect_rows=8, **given):
    found, same_dtype, exact = (
        ours(fields, collect_rows=collect_rows, **given),
        eager(fields, **given),
        ours(fields, "reference", torch.float64, **given),
    )
    for name in exact:
        assert_no_less_exact(found[name], same_dtype[name], exact[name], name)
    return found


@pytest.mark.parametrize("V", [1, 37, 2047, 2049, 4100])
def test_every_vocabulary_in_every_storage_dtype(V):
    for dtype in STORAGE:
        check(batch(V=V, dtype=dtype))


def test_the_vocabulary_of_a_real_model():
    check(batch(rows=2, tokens=1, V=151936, H=8))


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_every_aggregation(mode, info):
    check(batch(), mode=mode, info=info)


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "k1+", "k3+"])
def test_every_kl_estimator(kind):
    fields = batch()
    check(fields, kl=KLPenalty(fields["reference"], kind, 0.5))


@pytest.mark.parametrize("absent", ["teacher", "importance_weight_BT", "kl"])
def test_every_term_may_be_absent(absent):
    check(batch(), **{absent: None})


def test_a_temperature_a_token_and_an_equal_tensor_is_the_number_bit_for_bit():
    fields = batch()
    temperature = torch.linspace(0.5, 2.0, 20, device=DEVICE).view(4, 5)
    check(fields, temperature=temperature)
    number, tensor = ours(fields, temperature=0.6), ours(fields, temperature=torch.full_like(temperature, 0.6))
    assert all(torch.equal(number[name], tensor[name]) for name in number)


def test_one_advantage_per_token():
    fields = batch()
    fields["advantage"] = torch.where(fields["mask"], fields["teacher_logp"].sin(), math.nan)
    check(fields)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_without_old_log_probabilities_they_are_the_policys_own(mode):
    fields = batch()
    known = fields | {"behaviour": logp_of(fields)}
    del fields["behaviour"]
    found, expected = check(fields, mode=mode), ours(known, mode=mode)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def logp_of(fields):
    """The labels' log-probabilities by the kernel itself, as if the same policy had sampled them."""
    return linear_logprob(
        fields["hidden"].flatten(0, 1),
        fields["weight"],
        fields["label"].flatten(),
        bias_V=fields["bias"],
        keep_N=fields["mask"].flatten(),
        impl="triton",
        chunk_rows=4,
    )[0].view(fields["label"].shape)


def test_it_equals_the_loss_of_the_heads_log_probabilities():
    fields = batch()
    result = policy_head(
        *(fields[name] for name in ("hidden", "weight", "label", "behaviour", "advantage", "mask")),
        bias_V=fields["bias"],
        impl="triton",
        chunk_rows=4,
        **settings_of(fields),
    )
    logp, entropy = linear_logprob(
        fields["hidden"].flatten(0, 1),
        fields["weight"],
        fields["label"].flatten(),
        bias_V=fields["bias"],
        keep_N=fields["mask"].flatten(),
        with_entropy=True,
        impl="triton",
        chunk_rows=4,
    )
    torch.testing.assert_close(result.logp_BT.flatten(), logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.entropy_BT.flatten(), entropy, rtol=1e-6, atol=1e-6)
    assert not result.logp_BT.requires_grad


def test_a_label_out_of_range_on_an_active_token_is_nan_and_an_error_in_debug_mode(monkeypatch):
    fields = batch()
    for label in (37, -1, -100):
        fields["label"][3, 0] = label
        for impl in ("reference", "triton"):
            assert ours(fields, impl)["loss"].isnan()
    monkeypatch.setenv("HAPO_KERNELS_DEBUG", "1")
    message = r"label_BT\[3, 0\]=-100: a label lies in \[0, 37\). Switch the token off in mask_BT"
    for function in (ours, from_logits):
        with pytest.raises(ValueError, match=message):
            function(fields, "reference")


def test_rows_enter_only_the_gemms_that_they_need(monkeypatch):
    fields = batch()
    fields["advantage"] = torch.tensor([1.0, 0.0, 2.0, 0.0], device=DEVICE)
    forward, backward = [], []
    gather, of_chunk = chunked.Head._gather, chunked.Gradients.of_chunk
    monkeypatch.setattr(chunked.Head, "_gather", lambda self, row: (forward.extend(row.tolist()), gather(self, row))[1])
    monkeypatch.setattr(
        chunked.Gradients,
        "of_chunk",
        lambda self, row, dlogits: (backward.extend(row.tolist()), of_chunk(self, row, dlogits)),
    )
    active = fields["mask"].flatten().nonzero()[:, 0].tolist()
    trained = [row for row in active if fields["advantage"][row // 5] != 0]
    assert 0 < len(trained) < len(active) < 20

    check(fields, kl=None, entropy_coefficient=0.0)
    assert sorted(forward) == active
    assert backward == trained

    backward.clear()
    ours(fields, kl=None, entropy_coefficient=0.01)
    assert backward == active
    backward.clear()
    ours(fields, entropy_coefficient=0.0)
    assert backward == active


@pytest.mark.parametrize("mask", ["none", "one"])
def test_all_tokens_masked_and_one_active_token(mask):
    fields = batch()
    one = torch.zeros_like(fields["mask"])
    one[3, 2] = mask == "one"
    fields["mask"] = one
    found = check(fields, info={})
    if mask == "none":
        assert all((value == 0).all() for value in found.values())


def test_no_tokens_give_zero():
    found = check(batch(tokens=0), info={})
    assert all((value == 0).all() for value in found.values())


def test_the_upstream_gradient_multiplies_and_a_frozen_weight_gets_no_gradient():
    fields = batch()
    hidden, weight, bias = leaves_of(fields)
    result = policy_head(
        hidden,
        weight.detach(),
        *(fields[name] for name in ("label", "behaviour", "advantage", "mask")),
        bias_V=bias.detach(),
        impl="triton",
        chunk_rows=4,
        **settings_of(fields),
    )
    (once,) = torch.autograd.grad(result.loss, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(-4 * result.loss, hidden)
    assert once.abs().max() > 0
    assert torch.equal(scaled, -4 * once)
    assert torch.equal(once, ours(fields)["dhidden"])


def test_int32_labels_and_strided_expanded_and_unaligned_inputs():
    fields = batch()
    fields["advantage"] = fields["teacher_logp"].sin()
    fields["temperature"] = torch.linspace(0.5, 2, 20, device=DEVICE).view(4, 5)
    plain = ours(fields, temperature=fields["temperature"])

    def every_second(tensor):
        return tensor.repeat_interleave(2, -1)[..., ::2]

    strided = {name: every_second(tensor) for name, tensor in fields.items()}
    found = ours(strided | {"label": every_second(fields["label"] % 2**31).int()}, temperature=strided["temperature"])
    unaligned = {
        name: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view_as(tensor) for name, tensor in fields.items()
    }
    for odd in (found, ours(unaligned, temperature=unaligned["temperature"])):
        for name in plain:
            torch.testing.assert_close(odd[name], plain[name], rtol=1e-5, atol=1e-6, msg=name)

    fields["behaviour"] = fields["advantage"][:1].expand(4, 5)
    once = ours(fields)
    fields["behaviour"] = fields["behaviour"].contiguous()
    assert torch.equal(once["dhidden"], ours(fields)["dhidden"])


def test_other_rows_do_not_change_a_rows_bits():
    # Powers of two: on a CPU the GEMM itself rounds a row by its place in the matrix otherwise.
    fields = batch(V=2048, H=32)
    names = ("hidden", "label", "behaviour", "advantage", "mask", "teacher", "teacher_logp", "importance", "reference")
    order = torch.tensor([3, 1, 3], device=DEVICE)
    some = fields | {name: fields[name][order] for name in names}
    assert torch.equal(ours(some)["dhidden"], ours(fields)["dhidden"][order])


def test_two_runs_give_the_same_bits_and_chunks_change_only_the_weights_sum():
    fields = batch(V=2049, H=32)
    for impl in ("reference", "triton"):
        first, second = ours(fields, impl), ours(fields, impl)
        assert all(torch.equal(first[name], second[name]) for name in first)
    whole = ours(fields, chunk_rows=16)
    for name in first:
        torch.testing.assert_close(whole[name], first[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("collect_rows", [1, 4, 8, 12, 1000])
def test_however_many_chunks_are_collected_the_gradient_is_the_same(collect_rows):
    """9 active rows are 3 chunks, for three GEMMs of the weight's gradient, two or one."""
    assert batch()["mask"].sum() == 9
    for dtype in STORAGE:
        found = check(batch(dtype=dtype), collect_rows=collect_rows)
    again, plain = ours(batch(dtype=dtype), collect_rows=collect_rows), ours(batch(dtype=dtype))
    for name in found:
        assert torch.equal(found[name], again[name]), name
        if name not in ("dweight", "dbias"):
            assert torch.equal(found[name], plain[name]), name


@pytest.mark.parametrize("given", [{}, {"kl": None, "entropy_coefficient": 0.0}], ids=["all train", "some idle"])
@pytest.mark.parametrize("known", ["active", "both"])
def test_counts_that_are_known_change_nothing_but_who_waits(given, known):
    fields = batch()
    fields["advantage"][2] = 0.0
    active = int(fields["mask"].sum())
    counts = {"active_tokens": active}
    if known == "both":
        counts["training_tokens"] = active - int(fields["mask"][2].sum())
    expected, leaves = ours(fields, **given), leaves_of(fields)
    tokens = [fields[name] for name in ("label", "behaviour", "advantage", "mask")]

    def told(**counts):
        settings = {"bias_V": leaves[2], "chunk_rows": 4, "collect_rows": 8, "impl": "triton"}
        result = policy_head(*leaves[:2], *tokens, **settings, **counts, **settings_of(fields, **given))
        return named(result.loss, result.metrics, leaves)

    found = told(**counts)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    if DEVICE == "cpu":  # on a GPU the assertion ends the process
        for wrong in (active - 1, active + 1):
            with pytest.raises(RuntimeError, match="rows were announced, and the mask keeps another number"):
                told(**counts | {"active_tokens": wrong})
    with pytest.raises(ValueError, match="training_tokens=3: without active_tokens it says nothing"):
        told(training_tokens=3)


def test_a_budget_picks_the_chunk_sizes_and_changes_nothing_else(monkeypatch):
    fields, seen = batch(), []
    monkeypatch.setattr(chunked, "streams_of", lambda *_: One())
    init = chunked.Head.__init__
    monkeypatch.setattr(chunked.Head, "__init__", lambda self, *head: (seen.append(head[3]), init(self, *head))[1])
    plain = ours(fields, chunk_rows=32, collect_rows=64)
    found = ours(fields, chunk_rows=None, collect_rows=None, memory_gib=2e-5)
    assert [rows[:2] for rows in seen] == [(32, 32), rows_within(2e-5, 37, 24, 4)[:2]]  # The batch has 20 tokens.
    assert seen[1][:2] != rows_within(1, 37, 24, 4)[:2]
    for name in found:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"memory_gib=1e-07: a head of 37 tokens and 24 hidden units needs 0\.01 GiB"):
        ours(fields, chunk_rows=None, collect_rows=None, memory_gib=1e-7)


def into_main_grad(fields, impl, main_grad, upstream=1.0, multiplies=None, **given):
    """The gradients of hidden states, weight (None) and bias; the weight's gradient is added to main_grad."""
    hidden, weight, bias = leaves_of(fields)
    result = policy_head(
        hidden,
        weight,
        *(fields[name] for name in ("label", "behaviour", "advantage", "mask")),
        bias_V=bias,
        chunk_rows=4,
        collect_rows=8,
        main_grad_VH=main_grad,
        upstream=upstream,
        impl=impl,
        **settings_of(fields, **given),
    )
    loss = (upstream if multiplies is None else multiplies) * result.loss
    return torch.autograd.grad(loss, (hidden, weight, bias), allow_unused=True)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_weights_gradient_is_added_to_a_tensor_of_the_callers(impl):
    for dtype in STORAGE:
        fields = batch(dtype=dtype)
        start = torch.linspace(-1, 1, 37 * 24, device=DEVICE).view(37, 24)
        main_grad = start.clone()
        for _ in range(2):
            dhidden, dweight, dbias = into_main_grad(fields, impl, main_grad, upstream=0.25)
            assert dweight is None
        expected, exact = ours(fields, impl), ours(fields, "reference", torch.float64)
        scale = eager(fields)["dweight"]
        # The sums of fp32 products are never rounded to the storage dtype.
        assert_no_less_exact(main_grad, start + 0.5 * scale.float(), start + 0.5 * exact["dweight"])
        torch.testing.assert_close(dhidden, 0.25 * expected["dhidden"])
        torch.testing.assert_close(dbias, 0.25 * expected["dbias"])


def test_main_grad_is_unchanged_with_a_frozen_weight_without_gradients_or_rows():
    fields = batch()
    main_grad = torch.ones(37, 24, device=DEVICE)
    tokens = [fields[name] for name in ("label", "behaviour", "advantage", "mask")]
    arguments = {"impl": "triton", "chunk_rows": 4, "main_grad_VH": main_grad, **settings_of(fields)}
    hidden, weight, _ = leaves_of(fields)
    policy_head(hidden, weight.detach(), *tokens, **arguments).loss.backward()
    assert hidden.grad.abs().max() > 0
    with torch.no_grad():
        policy_head(hidden, weight, *tokens, **arguments)
    fields["mask"][:] = False
    into_main_grad(fields, "triton", main_grad, info={})
    assert (main_grad == 1).all()


def test_an_upstream_gradient_that_differs_from_the_given_one_is_an_error():
    message = r"main_grad_VH was given upstream=1.0, and the backward pass brings another one"
    if DEVICE == "cpu":  # on a GPU the assertion ends the process
        with pytest.raises(RuntimeError, match=message):
            into_main_grad(batch(), "triton", torch.zeros(37, 24), multiplies=0.5)
    hidden, weight, _ = leaves_of(fields := batch())
    tokens = (fields[name] for name in ("label", "behaviour", "advantage", "mask"))
    main_grad = torch.zeros(37, 24, device=DEVICE)
    result = policy_head(
        hidden, weight, *tokens, impl="triton", chunk_rows=4, main_grad_VH=main_grad, **settings_of(fields)
    )
    with pytest.raises(RuntimeError, match="policy_head: create_graph=True: the kernel has a first derivative only"):
        torch.autograd.grad(result.loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(37, 24, dtype=torch.float16), r"main_grad_VH: torch.float16 of shape \(37, 24\) on cpu: one fp32 number for each of weight_VH \(37, 24\)"),
        (torch.zeros(36, 24), r"main_grad_VH: torch.float32 of shape \(36, 24\) on cpu: one fp32 number"),
        (torch.zeros(24, 37).T, r"on cpu: contiguous and without a gradient of its own. Use main_grad.detach\(\).contiguous\(\)"),
        (torch.zeros(37, 24).requires_grad_(), "contiguous and without a gradient of its own"),
    ],
)  # fmt: skip
def test_an_unsuitable_main_grad_is_refused(wrong, message):
    for impl in ("reference", "triton"):
        with pytest.raises(ValueError, match=message if DEVICE == "cpu" else "main_grad_VH"):
            into_main_grad(batch(), impl, wrong)


def test_the_op_is_registered_so_that_compile_and_fake_tensors_work():
    fields = batch(rows=2)
    fields["mask"][:] = True
    fields = {
        name: tensor.nan_to_num(0, 0, 0) if tensor.is_floating_point() else tensor % 37 if name == "label" else tensor
        for name, tensor in fields.items()
    }
    hidden, weight, bias = leaves_of(fields)
    flat = [fields[name].flatten() for name in ("label", "mask", "behaviour")]
    ones = torch.ones(10, device=DEVICE)
    loss_arguments = (
        flat[0], ones, flat[1], flat[2], ones, ones, torch.zeros_like(flat[1]), None, None, None,
        0.2, 0.28, 3.0, 0.1, 1.0, "power", "", 0.0, 0.0,
    )  # fmt: skip
    torch.library.opcheck(
        policy_head_kernel.policy_head_op,
        (
            hidden.detach().flatten(0, 1).requires_grad_(),
            weight,
            bias,
            "",
            [4, 8],
            [],
            [True, True, True],
            *loss_arguments,
        ),
    )
    logits = (hidden.detach().flatten(0, 1) @ weight.detach().T).requires_grad_()
    torch.library.opcheck(policy_head_kernel.from_logits_op, (logits, True, *loss_arguments))

    def loss(hidden):
        tokens = (fields[name] for name in ("label", "behaviour", "advantage", "mask"))
        return policy_head(hidden, weight, *tokens, impl="triton", chunk_rows=4, **settings_of(fields)).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (expected,), (found,) = torch.autograd.grad(loss(hidden), hidden), torch.autograd.grad(compiled(hidden), hidden)
    assert torch.equal(found, expected)


def test_main_grad_is_added_to_inside_a_compiled_function_as_outside():
    """The kernels run outside the compiled graph, which breaks there."""
    fields = batch(rows=2)
    hidden, weight, _ = leaves_of(fields)
    tokens = [fields[name] for name in ("label", "behaviour", "advantage", "mask")]

    def gradient(function):
        main_grad = torch.zeros(weight.shape, device=DEVICE)
        (dhidden,) = torch.autograd.grad(function(hidden, main_grad), hidden)
        return dhidden, main_grad

    def loss(hidden, main_grad):
        settings = {"impl": "triton", "chunk_rows": 4, "main_grad_VH": main_grad, **settings_of(fields)}
        return policy_head(hidden * 1.0, weight, *tokens, **settings).loss

    for found, expected in zip(gradient(torch.compile(loss, backend="aot_eager")), gradient(loss), strict=True):
        assert torch.equal(found, expected)
        assert expected.any()


def test_a_second_derivative_is_refused():
    fields = batch()
    hidden, weight, _ = leaves_of(fields)
    tokens = (fields[name] for name in ("label", "behaviour", "advantage", "mask"))
    result = policy_head(hidden, weight, *tokens, impl="triton", chunk_rows=4, **settings_of(fields))
    with pytest.raises(RuntimeError, match="policy_head: create_graph=True: the kernel has a first derivative only"):
        torch.autograd.grad(result.loss, hidden, create_graph=True)


def from_logits(fields, impl, dtype=None, **given):
    """The loss from logits, with NaN at inactive positions."""
    if dtype:
        fields = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in fields.items()}
    logits = torch.nn.functional.linear(fields["hidden"], fields["weight"], fields["bias"]).requires_grad_()
    tokens = (fields[name] for name in ("label", "behaviour", "advantage", "mask"))
    result = policy_loss_from_logits(logits, *tokens, impl=impl, **settings_of(fields, **given))
    found = {"loss": result.loss.detach(), "dlogits": torch.autograd.grad(result.loss, logits)[0]}
    return found | {"logp": result.logp_BT, "entropy": result.entropy_BT} | result.metrics._asdict()


@pytest.mark.parametrize("V", [1, 37, 2049])
def test_the_loss_from_logits(V):
    for given in ({}, {"kl": None, "entropy_coefficient": 0.0}):
        fields = batch(V=V)
        fields["advantage"][2] = 0.0  # This row has no gradient if neither KL nor entropy is on.
        found, same_dtype = from_logits(fields, "triton", **given), from_logits(fields, "reference", **given)
        # The exact result is computed in fp64 from the same fp32 logits, since this function does not run the GEMM.
        fields["hidden"] = torch.nn.functional.linear(fields["hidden"], fields["weight"], fields["bias"])
        fields["weight"], fields["bias"] = torch.eye(V, device=DEVICE), torch.zeros(V, device=DEVICE)
        exact = from_logits(fields, "reference", torch.float64, **given)
        inactive = ~fields["mask"]
        for name in exact:
            assert_no_less_exact(found[name], same_dtype[name], exact[name], name)
        assert (found["dlogits"][inactive] == 0).all()
        assert (found["logp"][inactive] == 0).all()


def test_logits_of_minus_infinity_of_1e4_and_one_hot():
    for dtype in STORAGE:
        fields = batch(rows=3, tokens=2, V=2049, dtype=dtype)
        fields["weight"] = torch.zeros(2049, 24, device=DEVICE, dtype=dtype)
        fields["label"][:] = 2048
        nowhere = torch.zeros(2049, device=DEVICE, dtype=dtype)
        first_block, only_label, one_hot, large, offset = (nowhere.clone() for _ in range(5))
        first_block[:2048] = only_label[:2048] = -math.inf
        one_hot[2048] = 1e4
        large[:] = 1e4 * torch.linspace(-1, 1, 2049)
        offset[:] = 1e4 + 8 * torch.linspace(0, 1, 2049).round()
        for bias in (first_block, only_label, one_hot, large, offset):
            found = from_logits(fields | {"bias": bias}, "triton")
            same_dtype = from_logits(fields | {"bias": bias}, "reference")
            exact = from_logits(fields | {"bias": bias}, "reference", torch.float64)
            for name in exact:
                assert_no_less_exact(found[name], same_dtype[name], exact[name], name)
            assert found["dlogits"].isfinite().all()


def test_the_loss_from_logits_scales_with_the_upstream_gradient_and_checks_inputs():
    fields = batch()
    logits = torch.nn.functional.linear(fields["hidden"], fields["weight"]).requires_grad_()
    tokens = [fields[name] for name in ("label", "behaviour", "advantage", "mask")]
    result = policy_loss_from_logits(logits, *tokens, impl="triton", **settings_of(fields))
    (once,) = torch.autograd.grad(result.loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(-4 * result.loss, logits, retain_graph=True)
    assert once.abs().max() > 0
    assert torch.equal(scaled, -4 * once)
    with pytest.raises(RuntimeError, match="policy_loss_from_logits: create_graph=True"):
        torch.autograd.grad(result.loss, logits, create_graph=True)
    with pytest.raises(
        ValueError, match=r"logits_BTV of shape \(20, 37\): three axes, the first two those of the labels"
    ):
        policy_loss_from_logits(logits.flatten(0, 1), *tokens, **settings_of(fields))
