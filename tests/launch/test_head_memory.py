"""The estimates of the docstring, to the last digit that it names."""

import pytest

from hapo_kernels.memory import rows_a_chunk
from hapo_verl.launch.head_memory import linear_logprob_bytes, policy_head_bytes, verl_head_bytes

QWEN_7B = {"tokens": 16384, "hidden": 3584, "vocabulary": 152064}


def test_the_worked_example_of_the_docstring():
    rows = rows_a_chunk(QWEN_7B["vocabulary"])
    assert rows == 1024
    assert verl_head_bytes(**QWEN_7B, temperature=1.0) / 2**30 == pytest.approx(5.66, abs=0.005)
    assert linear_logprob_bytes(**QWEN_7B, chunk_rows=rows) / 2**30 == pytest.approx(4.02, abs=0.005)
    assert policy_head_bytes(**QWEN_7B, chunk_rows=rows) / 2**30 == pytest.approx(3.01, abs=0.005)


def test_only_verls_own_grows_with_tokens_times_vocabulary_and_copies_at_another_temperature():
    twice = QWEN_7B | {"tokens": 2 * QWEN_7B["tokens"]}
    logits = 2 * QWEN_7B["tokens"] * QWEN_7B["vocabulary"]
    hidden = 2 * QWEN_7B["tokens"] * QWEN_7B["hidden"]
    assert verl_head_bytes(**twice, temperature=1.0) - verl_head_bytes(**QWEN_7B, temperature=1.0) == logits
    assert verl_head_bytes(**QWEN_7B, temperature=0.6) - verl_head_bytes(**QWEN_7B, temperature=1.0) == logits
    for ours in (linear_logprob_bytes, policy_head_bytes):
        assert ours(**twice, chunk_rows=1024) - ours(**QWEN_7B, chunk_rows=1024) == hidden
