"""A pretrained language model in verl's trainer: its own tokenizer, chat template and vocabulary of 49,152 tokens.

Two steps of the quickstart's task in fp32. The model never writes the line that is rewarded, so that every group is
injected, and the loss of the first step is that of the demonstrations alone.
"""

import argparse

import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import WHOLE, Run, finish

import quickstart  # isort: skip  # conftest puts its folder on the path
import smollm2
import tasks
from launch import Launch, cpu_environment

pytestmark = [pytest.mark.e2e, pytest.mark.long]
PROMPTS, ROLLOUTS, STEPS = 2, 4, 2
SHAPING = 1.0  # of +hapo=plus


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("language")
    task = tasks.words(folder, STEPS, 1, argparse.Namespace(heldout=2))
    overrides = [
        *quickstart.overrides("plus", folder, task, steps=STEPS, seed=1),
        *WHOLE,
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        f"actor_rollout_ref.rollout.n={ROLLOUTS}",
        "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "data.shuffle=false",
    ]
    environment = cpu_environment() | task.environment
    launch = Launch(overrides=overrides, folder=folder, time_limit=900, environment=environment)
    finish("language model", launch)
    return Run(folder, pandas.read_parquet(folder / "data" / "train.parquet"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(smollm2.CACHE)


def rows_of_first_step(run):
    uids = {group["uid"]: group["index"] for group in run.groups if group["step"] == 1}
    return [(uids[row["uid"]], row) for row in run.loss_rows if row["uid"] in uids]


def test_every_group_fails_and_is_injected(run):
    assert [group["outcome"] for group in run.groups] == ["injected"] * (STEPS * PROMPTS)
    assert not any(any(group["successes"]) for group in run.groups)


def test_demonstrations_reach_the_loss_as_the_models_own_template_writes_them(run, tokenizer):
    found = [(index, row) for index, row in rows_of_first_step(run) if row["hapo_demonstration"]]
    assert len(found) == PROMPTS
    for index, row in found:
        example = run.train.iloc[index]
        # The part of the complete conversation that the chat template writes after the generation prompt.
        asked = [dict(example["prompt"][0])]
        complete = [*asked, {"role": "assistant", "content": example["demonstration"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(complete, tokenize=False).removesuffix("\n")
        assert whole.startswith(prompt)
        assert row["responses"] == tokenizer.encode(whole.removeprefix(prompt), add_special_tokens=False)
        assert row["responses"][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert row["response_mask"] == [1] * len(row["responses"])


@torch.no_grad()
def test_the_loss_of_the_first_step_is_that_of_the_demonstrations(run, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(smollm2.CACHE, dtype=torch.float32)
    total, tokens = 0.0, 0
    for index, row in rows_of_first_step(run):
        tokens += sum(row["response_mask"])
        if not row["hapo_demonstration"]:
            assert not any(row["advantages"])
            continue
        asked = [dict(run.train.iloc[index]["prompt"][0])]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        ids = torch.tensor([[*prompt_ids, *row["responses"]]])
        logp = model(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        q = logp.gather(-1, ids[0, len(prompt_ids) :, None])[:, 0].exp()
        total -= (torch.tensor(row["advantages"]) * torch.log(q / (q + SHAPING))).sum().item()
    logged = run.steps[0]
    assert logged["hapo/loss/demonstration"] == pytest.approx(total / tokens, rel=1e-3)
    assert logged["hapo/loss/on_policy"] == pytest.approx(0, abs=1e-6)
    assert logged["hapo/demonstration/untaught_tokens"] == 0
