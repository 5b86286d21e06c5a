"""Demonstrations with tool calls in verl's trainer: how they reach the loss, next to rollouts that also call tools.

The policy has a token for each end of a call, so that even a random one calls the tool now and then.
"""

import json
from collections import Counter

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.e2e.conftest import PROMPTS, ROOT, tiny_model
from tests.rollout.tool_chat import QWEN

pytestmark = [pytest.mark.e2e, pytest.mark.long]
STEPS = 2
OPEN, CLOSE = '<tool_call>\n{"name": "reverse", "arguments": {"digits": "', '"}}\n</tool_call>'
END, MULTI_TURN = "<|im_end|>", "actor_rollout_ref.rollout.multi_turn"


def say(text, *calls):
    functions = [{"name": "reverse", "arguments": json.dumps({"digits": digits})} for digits in calls]
    return {
        "role": "assistant",
        "content": text,
        "tool_calls": [{"type": "function", "function": f} for f in functions],
    }


def tool(text):
    return {"role": "tool", "content": text, "tool_calls": []}


def demonstration(answer, index):
    """A row's messages, the policy's part of them, and the outcome of an injection."""
    question = answer[::-1]
    called = [say("", question), tool(answer), say(answer)]
    written = [f"{OPEN}{question}{CLOSE}{END}", answer + END]
    return {
        0: (called[1:], None, "malformed"),
        1: ([*called[:2], *called], None, "overlong"),  # One round more than max_assistant_turns.
        2: ([*called[:2], say("0")], None, "rejected"),
        3: ([say(answer)], written[1:], "injected"),
        4: ([say(f"7{OPEN}{question}{CLOSE}"), *called[1:]], ["7" + written[0], written[1]], "injected"),
        5: (
            [say("7", question, answer), tool(answer), tool(question), say(answer)],
            [f"7\n{OPEN}{question}{CLOSE}\n{OPEN}{answer}{CLOSE}{END}", written[1]],
            "injected",
        ),
    }.get(index % 8, (called, written, "injected"))


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A model that can call `reverse`."""
    folder = tmp_path_factory.mktemp("caller")
    tokenizer = tiny_model.make_tokenizer("0123456789")
    tokenizer.add_tokens([OPEN, CLOSE, "<tool_response>", "</tool_response>", "reverse"])
    # The tokenizer has no letters, so the template must not write the schema.
    tokenizer.chat_template = QWEN.replace("# Tools", "").replace("tool | tojson", "tool.function.name")
    tokenizer.save_pretrained(folder)
    tiny_model.make_model(tokenizer, hidden=64, layers=2, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(trainer, caller):
    return trainer(
        "tools",
        "+hapo=paper",
        "trainer.v1.trainer_mode=hapo_sync",
        "hapo.poll_interval=0.05",
        "hapo.trace_dir={folder}/trace",
        f"actor_rollout_ref.model.path={caller}",
        f"reward.custom_reward_function.path={ROOT / 'tests/e2e/last_line.py'}",
        "data.max_response_length=64",
        "actor_rollout_ref.rollout.max_model_len=128",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        f"{MULTI_TURN}.function_tool_path={ROOT / 'tests/e2e/reverse_tool.py'}",
        f"{MULTI_TURN}.max_assistant_turns=2",
        f"{MULTI_TURN}.max_parallel_calls=2",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=seq_mean_k1",
        "algorithm.rollout_correction.rollout_rs_threshold=0.5_2.0",
        "actor_rollout_ref.actor.use_kl_loss=true",
        steps=STEPS,
        whole=False,
        rows=STEPS * PROMPTS,
        demonstration=lambda answer, index: demonstration(answer, index)[0],
    )


def answers(run):
    return {
        info["index"]: row["ground_truth"]
        for info, row in zip(run.train["extra_info"], run.train["reward_model"], strict=True)
    }


def test_every_demonstration_is_injected_or_refused_for_its_own_reason(run):
    assert len(run.groups) == STEPS * PROMPTS
    assert {group["index"] for group in run.groups} == set(range(STEPS * PROMPTS))
    for group in run.groups:
        assert group["outcome"] == demonstration(answers(run)[group["index"]], group["index"])[2]
    for step, logged in enumerate(run.steps, start=1):
        outcomes = Counter(group["outcome"] for group in run.groups if group["step"] == step)
        for reason in ("malformed", "overlong", "rejected"):
            assert logged[f"hapo/refused/{reason}"] == pytest.approx(outcomes[reason] / PROMPTS)


def test_a_demonstration_reached_the_loss_as_the_template_writes_the_conversation(run, caller):
    tokenizer = AutoTokenizer.from_pretrained(caller)
    kinds = set()
    for group in run.groups:
        if group["outcome"] != "injected":
            continue
        messages, written, _ = demonstration(answers(run)[group["index"]], group["index"])
        (row,) = [row for row in run.loss_rows if row["uid"] == group["uid"] and row["hapo_demonstration"]]
        question = [{"role": "user", "content": "?"}]
        asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        # Arguments are a mapping, because the template converts them to JSON.
        for message in messages:
            for call in message["tool_calls"]:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        whole = tokenizer.apply_chat_template([*question, *messages], tokenize=False)
        assert tokenizer.decode(row["responses"]) == whole.removeprefix(asked).removesuffix("\n")
        assert row["responses"] == tokenizer.encode(whole.removeprefix(asked).removesuffix("\n"))
        trained = [token for token, flag in zip(row["responses"], row["response_mask"], strict=True) if flag]
        assert trained == [token for text in written for token in tokenizer.encode(text)]
        assert row["response_mask"][-1] == 1
        kinds.add(len(messages))
    assert kinds == {1, 3, 4}


def test_the_policy_called_the_tool_too(run, caller):
    tokenizer = AutoTokenizer.from_pretrained(caller)
    called = [row for row in run.loss_rows if not row["hapo_demonstration"] and 0 in row["response_mask"]]
    assert any("<tool_response>" in tokenizer.decode(row["responses"]) for row in called)


def test_only_the_policys_own_tokens_have_an_advantage(run):
    for row in run.loss_rows:
        for advantage, flag in zip(row["advantages"], row["response_mask"], strict=True):
            assert advantage == 0 or flag
        if row["hapo_demonstration"]:
            assert all(
                advantage > 0 for advantage, flag in zip(row["advantages"], row["response_mask"], strict=True) if flag
            )


def test_the_metrics_count_the_policys_own_tokens(run):
    by_step = {group["uid"]: group["step"] for group in run.groups}
    for step, logged in enumerate(run.steps, start=1):
        rows = [row for row in run.loss_rows if by_step[row["uid"]] == step]
        tokens = Counter()
        for row in rows:
            tokens[row["hapo_demonstration"]] += sum(row["response_mask"])
        assert logged["hapo/injected/token_share"] == pytest.approx(tokens[True] / tokens.total(), rel=1e-6)
        assert 0 < logged["hapo/demonstration/probability"] < 0.2
        assert logged["training/rollout_probs_diff_max"] < 1e-4
        assert np.isfinite(logged["actor/grad_norm"])
        assert logged["actor/grad_norm"] > 0
