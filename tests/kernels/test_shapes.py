"""Value and weight of every shape of a demonstration's token, compared with fp64 formulas for log π from -100 on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exactness import DEVICE, assert_no_less_exact
from hapo_kernels.policy_head import policy_loss_from_logits
from hapo_kernels.policy_loss import Aggregation, Clip, Teacher, policy_loss
from hapo_kernels.policy_loss.reference import shaped

LOGP = [-100.0, -40.0, -15.0, -7.0, -2.302585, -1.0, -0.1, -1e-3, -1e-6, -1e-9]
POWERS = [("power", shaping, exponent) for shaping in (0.01, 0.1, 1.0, math.inf) for exponent in (0.0, 0.3, 1.0)]
SHAPES = [*POWERS, ("trsft", 0.1, 1.0), ("trsft", 0.01, 0.0), ("chord", 0.1, 1.0)]


def formula(shape, shaping, exponent, log_q):
    """F and ∂F/∂log q of one log-probability as Python floats; no branch subtracts nearly equal numbers."""
    q = math.exp(log_q)
    if shape == "chord":
        return q - q * q / 2, q * -math.expm1(log_q)
    if shape == "trsft":
        return (q / shaping, q / shaping) if q < shaping else (1 + log_q - math.log(shaping), 1.0)
    # f in log space, and 1 - f = λ/(q+λ).
    log_f, rest = (log_q, 1.0) if shaping == math.inf else (log_q - math.log(q + shaping), shaping / (q + shaping))
    if shaping != math.inf and q > shaping:
        log_f = -math.log1p(shaping / q)
    weight = math.exp(exponent * log_f) * rest
    if exponent == 1:
        return math.exp(log_f), weight
    return (log_f if exponent == 0 else math.expm1(exponent * log_f) / exponent), weight


def found(shape, shaping, exponent, impl, dtype):
    """The negative loss and its gradient for each token of a teacher row with advantage 1."""
    logp = torch.tensor([LOGP], dtype=dtype, device=DEVICE, requires_grad=True)
    values, row = [], torch.ones(1, dtype=torch.bool, device=DEVICE)
    for token in range(len(LOGP)):
        mask = torch.zeros(1, len(LOGP), device=DEVICE)
        mask[0, token] = 1
        loss = policy_loss(
            logp,
            torch.full_like(logp, math.nan),
            torch.ones(1, device=DEVICE),
            mask,
            clip=Clip(0.2, 0.2, 3.0),
            aggregation=Aggregation("token-sum"),
            teacher=Teacher(row, shaping, exponent=exponent, shape=shape),
            impl=impl,
        ).loss
        (gradient,) = torch.autograd.grad(loss, logp)
        values.append((-loss.item(), -gradient[0, token].item()))
    return values


@pytest.mark.parametrize(("impl", "dtype"), [("reference", "float64"), ("reference", "float32"), ("triton", "float32")])
@pytest.mark.parametrize(("shape", "shaping", "exponent"), SHAPES)
def test_value_and_weight_equal_the_formula_from_the_least_to_the_most_likely_token(
    shape, shaping, exponent, impl, dtype
):
    kind = getattr(torch, dtype)
    # The formula is evaluated at the log-probability as it was stored.
    stored = torch.tensor(LOGP, dtype=kind).double().tolist()
    # Values are sums of magnitude |log q - log λ|. For q >> λ, 1 - f loses digits like the sigmoid.
    rounding, smallest = torch.finfo(kind).eps, 10 * torch.finfo(kind).tiny
    for log_q, (value, weight) in zip(stored, found(shape, shaping, exponent, impl, kind), strict=True):
        exact_value, exact_weight = formula(shape, shaping, exponent, log_q)
        size = max(abs(exact_value), rounding * abs(log_q), 1e-30)
        # For improbable tokens the value is a multiple of q, with a bounded relative error. CHORD's is not: it is
        # written as (1 - (1-q)²)/2 for the sake of its derivative.
        if exponent == 1 and shape != "chord":
            assert value == pytest.approx(exact_value, rel=8 * rounding * (1 + abs(log_q)), abs=smallest), log_q
        else:
            assert abs(value - exact_value) <= 16 * rounding * max(size, min(1.0, abs(log_q) + abs(exact_value))), log_q
        loss_of_digits = 1 + (1 / min(1.0, shaping) if shape == "power" and exponent == 1 else 0) + abs(log_q)
        if exact_weight > smallest:
            assert weight == pytest.approx(exact_weight, rel=8 * rounding * loss_of_digits), log_q


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_exponent_one_gives_the_bits_of_luffys_sigmoid(impl):
    generator = torch.Generator().manual_seed(0)
    logp = (-torch.rand(3, 257, generator=generator).mul(20)).to(DEVICE).requires_grad_()
    advantage = torch.randn(3, generator=generator).to(DEVICE)
    mask, rows = torch.ones(3, 257, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    how = {"clip": Clip(0.2, 0.2, 3.0), "aggregation": Aggregation("token-sum"), "impl": impl}
    result = policy_loss(logp, logp.detach(), advantage, mask, teacher=Teacher(rows, 0.1), **how)
    (gradient,) = torch.autograd.grad(result.loss, logp)
    again = logp.detach().clone().requires_grad_()
    if impl == "reference":
        term = -advantage[:, None] * torch.sigmoid(again - math.log(0.1))
        assert torch.equal(result.loss, torch.where(mask.bool(), term, 0.0).sum() * 1)
        assert torch.equal(gradient, torch.autograd.grad(term.sum(), again)[0])
    else:
        # The kernel multiplies in the order (-A f)(1 - f). The interpreter computes with NumPy.
        u = again.detach().cpu().numpy() - np.float32(math.log(0.1))
        f, rest = 1 / (1 + np.exp(-u)), 1 / (1 + np.exp(u))
        expected = torch.from_numpy(-advantage.cpu().numpy()[:, None] * f * rest)
        if DEVICE == "cpu":
            assert torch.equal(gradient, expected)
        # A GPU's exponential is less exact than NumPy's: 9.6e-7 was seen on an H100.
        torch.testing.assert_close(gradient.cpu(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("shape", "shaping", "exponent"), SHAPES)
def test_the_head_accepts_every_shape(shape, shaping, exponent):
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(2, 3, 37, generator=generator)).to(DEVICE)
    label = torch.randint(0, 37, (2, 3), generator=generator).to(DEVICE)
    rows = torch.tensor([True, False], device=DEVICE)
    terms = {
        "clip": Clip(0.2, 0.2, 3.0),
        "aggregation": Aggregation("token-mean", batch_num_tokens=6),
        "teacher": Teacher(rows, shaping, exponent=exponent, shape=shape),
    }
    behaviour, advantage, mask = torch.full((2, 3), -2.0), torch.tensor([1.5, -0.5]), torch.ones(2, 3)
    fields = [tensor.to(DEVICE) for tensor in (behaviour, advantage, mask)]
    results = {}
    for name, impl, dtype in (("ours", "triton", torch.float32), ("exact", "reference", torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        result = policy_loss_from_logits(leaf, label, *(f.to(dtype) for f in fields), **terms, impl=impl)
        results[name] = (result.loss.detach(), *torch.autograd.grad(result.loss, leaf))
    for ours, exact in zip(results["ours"], results["exact"], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize(("shape", "shaping", "exponent"), SHAPES)
def test_the_head_is_no_less_exact_than_pytorch_from_the_least_likely_token_on(shape, shaping, exponent):
    # The label's logit is this far above all others, which gives log π from -100 to -1e-9, one row per token. At 17, where
    # 1 - π = 1.5e-6 is some 13 roundings of fp32, the head's error is 2.02 times that of PyTorch, and 2 are allowed.
    V, above = 37, torch.tensor([-96.4, -40.0, -12.0, -4.0, 0.0, 3.0, 8.0, 13.0, 24.0])
    logits = torch.zeros(len(above), 1, V)
    logits[:, 0, 5] = above
    terms = {
        "clip": Clip(0.2, 0.2, 3.0),
        "aggregation": Aggregation("token-sum"),
        "teacher": Teacher(
            torch.ones(len(above), dtype=torch.bool, device=DEVICE), shaping, exponent=exponent, shape=shape
        ),
    }
    one = torch.ones(len(above), 1, device=DEVICE)
    label = torch.full((len(above), 1), 5, device=DEVICE)
    found = {}
    for name, impl, dtype in (
        ("ours", "triton", torch.float32),
        ("eager", "reference", torch.float32),
        ("exact", "reference", torch.float64),
    ):
        leaf = logits.to(DEVICE, dtype).requires_grad_()
        result = policy_loss_from_logits(leaf, label, -one.to(dtype), one[:, 0].to(dtype), one, **terms, impl=impl)
        (found[name],) = torch.autograd.grad(result.loss, leaf)
    for row in range(len(above)):
        assert_no_less_exact(found["ours"][row], found["eager"][row], found["exact"][row], f"{above[row]:g}")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SHAPES), st.floats(-60.0, -1e-7))
def test_the_weight_lies_between_0_and_its_largest(shape, log_q):
    name, shaping, exponent = shape
    leaf = torch.tensor(log_q, dtype=torch.float64, requires_grad=True)
    teacher = Teacher(torch.ones(1, dtype=torch.bool), shaping, exponent=exponent, shape=name)
    weight = torch.autograd.grad(shaped(leaf, teacher), leaf)[0].item()
    assert 0 <= weight <= teacher.largest_weight * (1 + 1e-12)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([0.01, 0.1, 1.0]), st.floats(-60.0, -1e-3), st.floats(1e-3, 5.0))
def test_with_the_exponent_0_the_less_likely_token_is_pushed_harder(shaping, log_q, step):
    teacher = Teacher(torch.ones(1, dtype=torch.bool), shaping, exponent=0.0)
    leaf = torch.tensor([log_q - step, log_q], dtype=torch.float64, requires_grad=True)
    less, more = torch.autograd.grad(shaped(leaf, teacher).sum(), leaf)[0].tolist()
    assert less >= more
    assert less == pytest.approx(1.0, abs=1e-3) or math.exp(log_q - step) > 1e-3 * shaping


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shaping": 0.0}, r"teacher.shaping=0.0: λ of q/\(q\+λ\) is positive"),
        ({"shaping": math.nan}, r"teacher.shaping=nan: λ"),
        ({"exponent": 1.5}, r"teacher.exponent=1.5: κ lies in \[0, 1\]"),
        ({"shape": "flat"}, r"teacher.shape='flat': no such shape. Use one of power, trsft, chord"),
        ({"shape": "trsft", "shaping": math.inf}, r"teacher.shaping=inf with teacher.shape='trsft'"),
    ],
)
def test_an_invalid_shape_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Teacher(torch.zeros(1, dtype=torch.bool), **{"shaping": 0.1, **fields})
