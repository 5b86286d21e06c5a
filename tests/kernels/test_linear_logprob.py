"""The reference of the language-model head compared with torch's own log-softmax."""

import math

import pytest
import torch

from exactness import DEVICE
from hapo_kernels.linear_logprob import linear_logprob


def head(rows=6, H=5, V=11, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, H, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=dtype).requires_grad_()
    label = torch.randint(0, V, (rows,), generator=generator)
    return hidden, weight, label, bias


def test_two_tokens_by_hand():
    # Logits 0 and log 3 at temperature 1: p = 1/4, 3/4. At temperature 1/2 logits double: p = 1/10, 9/10.
    hidden, weight = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    temperature = torch.tensor([1.0, 0.5], dtype=torch.float64)
    result = linear_logprob(hidden, weight, torch.tensor([0, 1]), temperature=temperature, with_entropy=True)
    torch.testing.assert_close(result.logp_N.exp(), torch.tensor([0.25, 0.9], dtype=torch.float64))
    entropy = [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)), -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))]
    torch.testing.assert_close(result.entropy_N, torch.tensor(entropy, dtype=torch.float64))


def test_value_and_gradient_equal_those_of_torch_distributions():
    hidden, weight, label, bias = head()
    result = linear_logprob(hidden, weight, label, bias_V=bias, temperature=0.7, with_entropy=True)
    categorical = torch.distributions.Categorical(logits=(hidden @ weight.T + bias) / 0.7)
    torch.testing.assert_close(result.logp_N, categorical.log_prob(label))
    torch.testing.assert_close(result.entropy_N, categorical.entropy())
    slope = torch.linspace(-1, 2, 6, dtype=torch.float64)
    ours = torch.autograd.grad((slope * (result.logp_N + 3 * result.entropy_N)).sum(), (hidden, weight, bias))
    theirs = (slope * (categorical.log_prob(label) + 3 * categorical.entropy())).sum()
    for mine, yours in zip(ours, torch.autograd.grad(theirs, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(mine, yours)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_left_out_rows_are_zero_and_not_read(impl):
    hidden, weight, label, _ = (tensor.detach().to(DEVICE) for tensor in head(dtype=torch.float32))
    keep = torch.tensor([True, False, True, False, True, True], device=DEVICE)
    poisoned = torch.where(keep[:, None], hidden, math.nan).requires_grad_()
    label = torch.where(torch.arange(6, device=DEVICE) == 4, -100, label)
    label = torch.where(torch.arange(6, device=DEVICE) == 1, 10**12, label)
    result = linear_logprob(poisoned, weight, label, keep_N=keep, with_entropy=True, chunk_rows=2, impl=impl)
    (gradient,) = torch.autograd.grad(result.logp_N.sum() + result.entropy_N.sum(), poisoned)
    left_out = [1, 3, 4]
    assert (result.logp_N[left_out] == 0).all()
    assert (result.entropy_N[left_out] == 0).all()
    assert (gradient[left_out] == 0).all()
    alone = linear_logprob(hidden[[0, 2, 5]], weight, label[[0, 2, 5]], impl=impl, chunk_rows=2)
    torch.testing.assert_close(result.logp_N[[0, 2, 5]], alone.logp_N)
    assert (gradient[[0, 2, 5]] != 0).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_label_out_of_range_is_nan_and_an_error_in_debug_mode(impl, monkeypatch):
    hidden, weight, label, _ = (tensor.detach().to(DEVICE) for tensor in head(dtype=torch.float32))
    label[3], label[5] = 11, -1
    result = linear_logprob(hidden, weight, label, chunk_rows=4, impl=impl)
    assert result.logp_N.isnan().tolist() == [False, False, False, True, False, True]
    monkeypatch.setenv("HAPO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"label_N\[3\]=11: a label lies in \[0, 11\). Use -100 to leave a row out"):
        linear_logprob(hidden, weight, label, impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden_NH": torch.zeros(6, 4)},
            ValueError,
            r"hidden_NH \(6, 4\) and weight_VH \(11, 5\): \(N, H\) and \(V, H\) with one H",
        ),
        (
            {"hidden_NH": torch.zeros(6, 5).half()},
            TypeError,
            "weight_VH torch.float32 and hidden_NH torch.float16: one dtype",
        ),
        (
            {"label_N": torch.zeros(6)},
            ValueError,
            "label_N: torch.float32 .* one int64 id for each of the 6 rows",
        ),
        ({"bias_V": torch.zeros(3)}, ValueError, r"bias_V of shape \(3,\): one number a token of the vocabulary, 11"),
        ({"keep_N": torch.ones(6)}, ValueError, "keep_N: torch.float32 .* one bool a row"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0: a temperature is positive"),
        ({"temperature": torch.ones(5)}, ValueError, r"temperature of shape \(5,\): one number, or one a row"),
    ],
)
def test_a_wrong_input_is_refused_in_one_line(change, error, message):
    hidden, weight, label, _ = head(dtype=torch.float32)
    with pytest.raises(error, match=message):
        linear_logprob(**{"hidden_NH": hidden, "weight_VH": weight, "label_N": label, **change})
