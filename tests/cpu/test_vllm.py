"""vLLM's CPU build under verl: the functions that we replace exist, and samples follow the softmax."""

import importlib

import pytest
import torch

from hapo_verl.cpu import vllm


def test_an_entry_is_sampled_with_the_probability_of_the_softmax():
    torch.manual_seed(0)
    logits_V = torch.tensor([2.0, -float("inf"), 0.0, 1.0, -3.0, -float("inf")])
    draws = 40_000
    counts = torch.bincount(vllm.sample_by_inversion(logits_V.expand(draws, -1)), minlength=6)
    expected = logits_V.softmax(-1) * draws
    # Chi-square with three degrees of freedom: 16.3 is exceeded once in a thousand.
    possible = expected > 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 16.3
    assert counts[~possible].tolist() == [0, 0]


def test_the_draw_is_inverted_at_the_right_entry(monkeypatch):
    logits_BV = torch.tensor([[0.25, 0.25, 0.5]]).log().expand(4, -1)
    drawn = torch.tensor([[0.0], [0.24], [0.26], [0.9999999]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda like: drawn.to(like.dtype))
    assert vllm.sample_by_inversion(logits_BV).tolist() == [0, 0, 1, 2]
    # A draw of exactly 0 does not hit an entry without probability.
    impossible_first = torch.tensor([[-float("inf"), 0.0, 0.0]]).expand(4, -1)
    assert vllm.sample_by_inversion(impossible_first).tolist() == [1, 1, 1, 2]


def test_rows_of_a_large_vocabulary_are_drawn_independently():
    torch.manual_seed(0)
    drawn = vllm.sample_by_inversion(torch.zeros(64, 49_152, dtype=torch.bfloat16))
    assert drawn.dtype == torch.int64
    assert drawn.unique().numel() > 60
    assert drawn.min() >= 0
    assert drawn.max() < 49_152


def test_a_weight_stored_by_column_keeps_its_values_and_can_be_loaded_again():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4), requires_grad=False)
    before, x = weight.detach().clone(), torch.randn(3, 4)
    vllm.store_by_column(weight)
    assert weight.shape == (6, 4)
    assert weight.stride() == (1, 6)
    torch.testing.assert_close(weight.data, before, rtol=0, atol=0)
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ before.T)
    # vLLM loads a weight like this, whole or in parts.
    weight.data.copy_(-before)
    torch.testing.assert_close(torch.nn.functional.linear(x, weight), -x @ before.T)
    weight.data.narrow(0, 2, 3).copy_(before[2:5])
    assert torch.equal(weight.data, torch.cat([-before[:2], before[2:5], -before[5:]]))
    storage = weight.data_ptr()
    vllm.store_by_column(weight)
    assert weight.data_ptr() == storage


@pytest.mark.parametrize("other", [torch.zeros(6, 4, dtype=torch.bfloat16), torch.zeros(6)])
def test_only_matrices_of_float32_are_stored_by_column(other):
    weight = torch.nn.Parameter(other, requires_grad=False)
    vllm.store_by_column(weight)
    assert weight.is_contiguous()


def test_ranks_are_counted_as_vllm_counts_them():
    ops = pytest.importorskip("vllm.v1.sample.ops.logprobs")
    logp_BV = torch.tensor([[0.5, 0.5, 1.0, -float("inf")], [3.0, 2.0, 1.0, 0.0]])
    value_B1 = torch.tensor([[0.5], [3.0]])
    counted = vllm.count_at_least(logp_BV, value_B1)
    assert counted.tolist() == [3, 1]
    expected = ops.batched_count_greater_than.__wrapped__(logp_BV, value_B1)
    assert counted.dtype == expected.dtype
    assert torch.equal(counted, expected)


REPLACED = [
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"),
    ("vllm.distributed.device_communicators.shm_broadcast", "SpinCondition"),
    ("vllm.v1.sample.ops.topk_topp_sampler", "compiled_random_sample"),
    ("vllm.v1.sample.sampler", "batched_count_greater_than"),
]


def test_each_function_of_vllm_is_replaced_only_on_a_cpu(monkeypatch):
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("vLLM's CPU build is not installed")
    before = {}
    for module, name in REPLACED:
        before[module] = getattr(importlib.import_module(module), name)
        # monkeypatch restores this after the test.
        monkeypatch.setattr(importlib.import_module(module), name, before[module])
    monkeypatch.setenv("VERL_PLATFORM", "cuda")
    vllm.register()
    assert all(getattr(importlib.import_module(module), name) is before[module] for module, name in REPLACED)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    vllm.register()
    assert all(getattr(importlib.import_module(module), name) is not before[module] for module, name in REPLACED)
