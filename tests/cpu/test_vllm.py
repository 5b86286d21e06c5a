"""vLLM's CPU build under verl: what is replaced is there, and samples are those of the softmax."""

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


def test_rows_of_a_large_vocabulary_are_drawn_apart():
    torch.manual_seed(0)
    drawn = vllm.sample_by_inversion(torch.zeros(64, 49_152, dtype=torch.bfloat16))
    assert drawn.dtype == torch.int64
    assert drawn.unique().numel() > 60
    assert drawn.min() >= 0
    assert drawn.max() < 49_152


REPLACED = [
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"),
    ("vllm.distributed.device_communicators.shm_broadcast", "SpinCondition"),
    ("vllm.v1.sample.ops.topk_topp_sampler", "compiled_random_sample"),
]


def test_each_function_of_vllm_is_replaced_on_a_cpu_and_nowhere_else(monkeypatch):
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("vLLM's CPU build is not installed")
    before = {}
    for module, name in REPLACED:
        before[module] = getattr(importlib.import_module(module), name)
        # Put back after the test.
        monkeypatch.setattr(importlib.import_module(module), name, before[module])
    monkeypatch.setenv("VERL_PLATFORM", "cuda")
    vllm.register()
    assert all(getattr(importlib.import_module(module), name) is before[module] for module, name in REPLACED)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    vllm.register()
    assert all(getattr(importlib.import_module(module), name) is not before[module] for module, name in REPLACED)
