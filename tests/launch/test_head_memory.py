"""The estimates equal those of the module's docstring; a budget that is too small is refused at the start."""

import json
import re

import pytest
from omegaconf import OmegaConf

from hapo_kernels.memory import Rows, least_gib, rows_of
from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.launch.head_memory import (
    check_memory,
    linear_logprob_bytes,
    policy_head_bytes,
    rows_of_launch,
    verl_head_bytes,
)

QWEN_7B = {"tokens": 16384, "hidden": 3584, "vocabulary": 152064}


def hapo(memory_gib):
    return HapoConfig.parse({"kernels": {"head": "policy_head", "memory_gib": memory_gib}})


def test_the_worked_example_of_the_docstring():
    rows = rows_of(QWEN_7B["vocabulary"])
    assert rows == Rows(1024, 4096) == rows_of_launch(hapo(None), QWEN_7B["hidden"], QWEN_7B["vocabulary"])
    assert verl_head_bytes(**QWEN_7B, temperature=1.0) / 2**30 == pytest.approx(5.66, abs=0.005)
    for ours in (linear_logprob_bytes, policy_head_bytes):
        assert ours(**QWEN_7B, rows=rows) / 2**30 == pytest.approx(4.49, abs=0.005)
    rows = rows_of_launch(hapo(3.1), QWEN_7B["hidden"], QWEN_7B["vocabulary"])
    assert rows == Rows(512, 1024)
    assert linear_logprob_bytes(**QWEN_7B, rows=rows) / 2**30 == pytest.approx(3.15, abs=0.005)
    assert policy_head_bytes(**QWEN_7B, rows=rows) / 2**30 == pytest.approx(3.26, abs=0.005)


def test_only_verls_head_grows_with_tokens_times_vocabulary_and_with_a_temperature():
    twice = QWEN_7B | {"tokens": 2 * QWEN_7B["tokens"]}
    logits = 2 * QWEN_7B["tokens"] * QWEN_7B["vocabulary"]
    hidden = 2 * QWEN_7B["tokens"] * QWEN_7B["hidden"]
    assert verl_head_bytes(**twice, temperature=1.0) - verl_head_bytes(**QWEN_7B, temperature=1.0) == logits
    assert verl_head_bytes(**QWEN_7B, temperature=0.6) - verl_head_bytes(**QWEN_7B, temperature=1.0) == logits
    rows = rows_of(QWEN_7B["vocabulary"])
    for ours in (linear_logprob_bytes, policy_head_bytes):
        assert ours(**twice, rows=rows) - ours(**QWEN_7B, rows=rows) == hidden


@pytest.mark.parametrize("nested", [False, True])
def test_a_budget_that_is_too_small_is_refused_with_the_least_that_works(nested, tmp_path):
    sizes = {"hidden_size": 3584, "vocab_size": 152064}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes} if nested else sizes))
    config = OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(tmp_path)}}})
    least = least_gib(152064, 3584)
    message = (
        f"hapo.kernels.memory_gib=2: a head of 152064 tokens and 3584 hidden units needs {least} GiB or more. "
        f"Use hapo.kernels.memory_gib={least} or more, or null."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        check_memory(config, hapo(2))
    check_memory(config, hapo(least))
    with pytest.raises(ConfigError):
        check_memory(config, hapo(least - 0.01))
    check_memory(config, hapo(None))
    # A model that is not on this machine is left to verl.
    config.actor_rollout_ref.model.path = "org/model"
    check_memory(config, hapo(2))
