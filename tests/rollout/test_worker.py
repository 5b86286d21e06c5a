"""The end of a group in the agent loop worker: what is written in every case.

The worker is built without Ray, model or engine; only the reward call and the put into TransferQueue are replaced.
"""

import asyncio
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput

from hapo_verl.algo.demonstration import Response
from hapo_verl.algo.own_successes import OwnSuccess, packed
from hapo_verl.config import HapoConfig
from hapo_verl.protocol.rows import plain_values
from hapo_verl.rollout import worker as rollout
from hapo_verl.rollout.worker import HapoAgentLoopWorker
from tests.rollout.tool_chat import QWEN, make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "quickstart"))
import tiny_model

ANSWER = "321"


def an_output(tokenizer, text, *, score, position=0, logprobs=True):
    response_ids = tokenizer.encode(text, add_special_tokens=False)
    return AgentLoopOutput(
        prompt_ids=[1, 2, 3],
        response_ids=response_ids,
        response_mask=[1] * len(response_ids),
        response_logprobs=[-1.0] * len(response_ids) if logprobs else None,
        reward_score=score,
        num_turns=2,
        metrics={},
        extra_fields={"reward_extra_info": {"acc": score}, "min_global_steps": 4, "max_global_steps": 5},
    )


@pytest.fixture
def worker(monkeypatch):
    """A worker whose puts are recorded in `worker.puts` and whose reward function knows one answer."""
    tokenizer = tiny_model.make_tokenizer("0123456789")
    worker = object.__new__(HapoAgentLoopWorker)
    worker.config = OmegaConf.create({"data": {}, "actor_rollout_ref": {"rollout": {"n": 3}}})
    worker.tokenizer, worker.processor = tokenizer, None
    worker.rollout_config = SimpleNamespace(response_length=4)
    worker.model_config = SimpleNamespace(generation_config=None)
    worker._hapo, worker._groups, worker._verdicts, worker.puts = HapoConfig(), {}, {}, []

    async def score(outputs, kwargs):
        if outputs[-1].reward_score is None:
            success = float(tokenizer.decode(outputs[-1].response_ids, skip_special_tokens=True) == ANSWER)
            outputs[-1].reward_score = success
            outputs[-1].extra_fields["reward_extra_info"] = {"acc": success}

    async def put(keys, fields, tags, partition_id):
        worker.puts.append(SimpleNamespace(keys=keys, fields=fields, tags=tags, partition_id=partition_id))

    worker._compute_score = score
    monkeypatch.setattr(rollout.tq, "async_kv_batch_put", put)
    return worker


def close(worker, outcomes, demonstration, situation=(), agent_name=None):
    """Close a group whose sessions ended with `outcomes`: a list of outputs, one output, or None if it failed."""
    group = rollout._Group(len(outcomes), demonstration, dict(situation), agent_name)
    for session, outputs in enumerate(outcomes):
        if outputs is not None:
            fields = {"uid": "u", "session_id": session, "index": 7, "global_steps": 5, "raw_prompt": "123"}
            outputs = outputs if isinstance(outputs, list) else [outputs]
            group.sessions[session] = rollout._Session(outputs, fields)
    asyncio.run(worker._close_group(group))


def situated(worker, outcomes, demonstration, *, mode="replace", gate="paper", **situation):
    """Like `close`, with values that the trainer attached to the prompt."""
    worker._hapo = HapoConfig.parse({"gate": {"name": gate}, "injection": {"mode": mode}})
    close(worker, outcomes, demonstration, situation={"key": 11, **situation})
    (put,) = worker.puts
    return put


def outcome(put):
    return plain_values(put.fields["hapo_group"])[0]["outcome"]


def failures(worker, count, **settings):
    return [an_output(worker.tokenizer, text, score=0.0, **settings) for text in ("1", "12", "1234", "12")[:count]]


def test_the_demonstration_replaces_the_longest_failure_in_one_put(worker):
    close(worker, failures(worker, 3), ANSWER)
    (put,) = worker.puts
    assert put.keys == ["u_0_0", "u_1_0", "u_2_0"]
    assert put.partition_id == "train"
    assert put.fields["hapo_demonstration"].tolist() == [False, False, True]
    assert outcome(put) == "injected"
    tokens = [*worker.tokenizer.encode(ANSWER), worker.tokenizer.eos_token_id]
    row = put.fields[2]
    assert row["responses"].tolist() == tokens
    assert row["input_ids"].tolist() == [1, 2, 3, *tokens]
    assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [1, 1, 1, 1]
    assert row["position_ids"].tolist() == list(range(7))
    assert row["rm_scores"].tolist() == [0, 0, 0, 1]
    assert row["rollout_log_probs"].isnan().all()
    assert put.tags[2] | {"status": "success"} == {
        "status": "success",
        "prompt_len": 3,
        "response_len": 4,
        "seq_len": 7,
        "global_steps": 5,
        "min_global_steps": 4,
        "max_global_steps": 5,
    }


@pytest.mark.parametrize(
    ("demonstration", "reason"),
    [(None, "missing"), ("", "empty"), ("4321", "overlong"), ("123", "rejected"), (["x", "y"], "malformed")],
)
def test_an_unusable_demonstration_leaves_all_rollouts_and_records_its_reason(worker, demonstration, reason):
    close(worker, failures(worker, 3), demonstration)
    (put,) = worker.puts
    assert outcome(put) == reason
    assert not put.fields["hapo_demonstration"].any()
    assert [len(row["responses"]) for row in put.fields] == [1, 2, 4]


def test_a_list_with_one_assistant_message_is_a_demonstration(worker):
    close(worker, failures(worker, 2), [{"role": "assistant", "content": ANSWER}])
    assert outcome(worker.puts[0]) == "injected"


CALL = '<tool_call>\n{"name": "reverse", "arguments": {"digits": "123"}}\n</tool_call>'
CALLED = [
    {"role": "assistant", "content": CALL},
    {"role": "tool", "content": ANSWER},
    {"role": "assistant", "content": ANSWER},
]


@pytest.fixture
def caller(worker):
    """The worker in a launch of verl's tool loop, with a tool; its reward function looks at the end of the text."""
    tokenizer = worker.tokenizer = make_tokenizer(QWEN)
    worker.config.actor_rollout_ref.rollout.agent = {"default_agent_loop": "tool_agent"}
    worker.config.actor_rollout_ref.rollout.multi_turn = {"max_assistant_turns": 2}
    worker.rollout_config.response_length, worker.hf_model_type = 350, "qwen2"
    schema = SimpleNamespace(model_dump=lambda **settings: {"type": "function", "function": {"name": "reverse"}})
    worker.tools, worker.scored = [SimpleNamespace(name="reverse", tool_schema=schema)], []

    async def score(outputs, kwargs):
        output = outputs[-1]
        if output.reward_score is None:
            worker.scored.append(output.model_copy(deep=True))
            output.reward_score = float(
                tokenizer.decode(output.response_ids, skip_special_tokens=True).endswith(ANSWER)
            )
            output.extra_fields["reward_extra_info"] = {"acc": output.reward_score}

    worker._compute_score = score
    return worker


def called_failures(worker):
    """Rollouts of the tool loop, the longest of which called a tool twice."""
    outputs = failures(worker, 3)
    for output, rewards in zip(outputs, ([], [0.5], [1.0, 0.0]), strict=True):
        output.num_turns = 2 + 2 * len(rewards)
        output.extra_fields |= {"turn_scores": [], "tool_rewards": rewards}
    return outputs


@pytest.mark.parametrize("mode", ["replace", "append"])
def test_a_demonstration_with_calls_trains_on_what_the_policy_would_have_written(caller, mode):
    put = situated(caller, called_failures(caller), CALLED, mode=mode)
    assert outcome(put) == "injected"
    (row,) = [row for row in put.fields if row["hapo_demonstration"]]
    first, last = (caller.tokenizer.encode(text + "<|im_end|>") for text in (CALL, ANSWER))
    between = f"\n<|im_start|>user\n<tool_response>\n{ANSWER}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    between = caller.tokenizer.encode(between)
    tokens, mask = [*first, *between, *last], [1] * len(first) + [0] * len(between) + [1] * len(last)
    assert row["responses"].tolist() == tokens
    assert row["response_mask"].tolist() == row["loss_mask"].tolist() == mask
    assert row["input_ids"].tolist() == [1, 2, 3, *tokens]
    assert row["position_ids"].tolist() == list(range(3 + len(tokens)))
    assert row["rm_scores"].tolist() == [0.0] * (len(tokens) - 1) + [1.0]
    assert row["rollout_log_probs"].isnan().all()
    assert row["rollout_log_probs"].shape == row["responses"].shape
    assert put.tags[-1]["response_len"] == len(tokens)
    assert set(row.keys()) == set(put.fields[0].keys())


def test_the_reward_gets_the_turns_of_the_demonstration_not_of_the_replaced_rollout(caller):
    close(caller, called_failures(caller), CALLED)
    close(caller, called_failures(caller), ANSWER)
    # Each demonstration is scored twice, because it is among the first of this worker.
    assert [output.num_turns for output in caller.scored] == [4, 4, 2, 2]
    assert [output.extra_fields["tool_rewards"] for output in caller.scored] == [[0.0], [0.0], [], []]
    assert [output.extra_fields["turn_scores"] for output in caller.scored] == [[]] * 4
    assert [row["num_turns"] for put in caller.puts for row in put.fields if row["hapo_demonstration"]] == [4, 2]


@pytest.mark.parametrize(
    ("demonstration", "agent_name", "reason"),
    [
        (CALLED, "tool_agent", "injected"),
        (CALLED, "single_turn_agent", "malformed"),
        (CALLED[1:], None, "malformed"),
        (CALLED[:2], None, "malformed"),
        (CALLED[:1], None, "malformed"),
        ([CALLED[0], CALLED[2]], None, "malformed"),
        ([*CALLED[:2], {"role": "user", "content": "?"}], None, "malformed"),
        ([*CALLED[:2], *CALLED], None, "overlong"),
        ([CALLED[0], {"role": "tool", "content": "1" * 256}, CALLED[2]], None, "overlong"),
        ([*CALLED[:2], {"role": "assistant", "content": " "}], None, "empty"),
        ([*CALLED[:2], {"role": "assistant", "content": "0"}], None, "rejected"),
    ],
)
def test_an_unusable_demonstration_with_calls_records_its_reason(caller, demonstration, agent_name, reason):
    close(caller, called_failures(caller), demonstration, agent_name=agent_name)
    (put,) = caller.puts
    assert outcome(put) == reason
    assert put.fields["hapo_demonstration"].any() == (reason == "injected")


def test_an_error_while_verifying_writes_the_plain_group_and_counts_as_error(worker):
    async def broken(outputs, kwargs):
        raise ConnectionError("the reward worker is gone")

    worker._compute_score = broken
    close(worker, failures(worker, 3), ANSWER)
    (put,) = worker.puts
    assert outcome(put) == "error"
    assert len(put.keys) == 3
    assert not put.fields["hapo_demonstration"].any()


def returning(worker, *results):
    """Let the worker's reward function return these results in turn, and then repeat the last one."""
    answers = list(results)

    async def score(outputs, kwargs):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        if answer == "never":
            await asyncio.sleep(60)
        # verl's reward manager unpacks it like this.
        score, extra = (answer["score"], dict(answer)) if isinstance(answer, dict) else (answer, {"acc": answer})
        outputs[-1].reward_score, outputs[-1].extra_fields["reward_extra_info"] = score, extra

    worker._compute_score = score


def settle(worker, count=3):
    """Run a prompt's sessions through verl's own postprocess: returns how each ended, and what was written."""
    worker._groups["u"] = group = rollout._Group(count, ANSWER, {"key": 1}, None)

    async def session(number):
        fields = {
            "uid": "u",
            "session_id": number,
            "index": 7,
            "global_steps": 5,
            "raw_prompt": "1",
            "data_source": "d",
        }
        output = an_output(worker.tokenizer, "12"[: number + 1], score=None)
        try:
            await worker._agent_loop_postprocess(output, False, **fields)
        except Exception as error:
            return error

    async def sessions():
        ends = [await session(number) for number in range(count)]
        await worker._close_group(group)
        return ends

    return asyncio.run(sessions())


@pytest.mark.parametrize(
    ("result", "score"),
    [
        (torch.tensor(0.25), 0.25),
        (torch.tensor([[1.0]]), 1.0),
        (np.float32(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (True, 1.0),
        (0, 0.0),
        (Fraction(1, 4), 0.25),
        ({"score": torch.tensor(0.5), "acc": np.bool_(True)}, 0.5),
        ({"score": 0.5, "acc": None, "note": "kept"}, 0.5),
    ],
)
def test_a_reward_of_any_numeric_type_is_accepted(worker, result, score):
    returning(worker, result)
    assert settle(worker) == [None] * 3
    (put,) = worker.puts
    assert [row["rm_scores"].sum().item() for row in put.fields] == [score] * 3
    group = plain_values(put.fields["hapo_group"])[0]
    assert group["scores"] == [score] * 3
    assert all(type(value) is float for value in group["scores"])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (float("nan"), "the reward function returned score=nan (float): a finite number is needed."),
        (float("inf"), "the reward function returned score=inf (float): a finite number is needed."),
        (torch.tensor(float("-inf")), "the reward function returned score=tensor(-inf) (Tensor): a finite"),
        (torch.zeros(2), "the reward function returned score=tensor([0., 0.]) (Tensor): a finite number"),
        ("1.0", "the reward function returned score='1.0' (str): a finite number is needed."),
        ([1.0], "the reward function returned score=[1.0] (list): a finite number is needed."),
        ({"score": 1.0, "acc": "yes"}, "the reward function returned acc='yes' (str): a finite number is needed."),
        ({"score": 1.0, "acc": float("nan")}, "the reward function returned acc=nan (float): a finite"),
        (KeyError("score"), "'score'"),
        ("never", "hapo.reward_timeout=0.2: the reward function has not answered in this time for data_source=d. Make"),
    ],
)
def test_a_session_whose_reward_is_not_a_number_fails_and_the_others_are_trained_on(worker, result, message):
    worker._hapo = HapoConfig.parse({"reward_timeout": 0.2})
    returning(worker, 0.0, result, 0.0)
    ends = settle(worker, count=3)
    assert ends[0] is ends[2] is None
    assert str(ends[1]).startswith(message)
    (put,) = worker.puts
    assert put.keys == ["u_0_0", "u_2_0"]
    assert all(row["rm_scores"].isfinite().all() for row in put.fields)
    assert outcome(put) == "rejected"


def test_a_group_without_a_numeric_reward_writes_nothing(worker):
    returning(worker, float("nan"))
    assert all("returned score=nan" in str(end) for end in settle(worker))
    assert worker.puts == []


@pytest.mark.parametrize("result", [float("nan"), "never", "1.0", KeyError("score")])
def test_a_demonstration_whose_reward_is_not_a_number_leaves_the_plain_group(worker, result):
    worker._hapo = HapoConfig.parse({"reward_timeout": 0.2})
    returning(worker, 0.0, 0.0, 0.0, result)
    assert settle(worker) == [None] * 3
    (put,) = worker.puts
    assert outcome(put) == "error"
    assert put.keys == ["u_0_0", "u_1_0", "u_2_0"]


def unsteady(put):
    return plain_values(put.fields["hapo_group"])[0]["unsteady"]


def test_a_demonstration_whose_two_rewards_disagree_is_reported_and_counted(worker, caplog):
    returning(worker, 0.0, 0.0, 0.0, 1.0, 0.0)
    settle(worker)
    assert (outcome(worker.puts[-1]), unsteady(worker.puts[-1])) == ("injected", True)
    assert "does not agree with itself on a demonstration (data_source=d, index=7)" in caplog.text


def test_a_demonstrations_reward_is_compared_with_its_earlier_reward(worker, caplog, monkeypatch):
    monkeypatch.setattr(rollout, "LOOKED_AT_TWICE", 0)
    for verdict, expected in ((1.0, False), (1.0, False), (0.0, True), (0.0, False)):
        returning(worker, 0.0, 0.0, 0.0, verdict)
        settle(worker)
        assert unsteady(worker.puts[-1]) is expected
    assert outcome(worker.puts[-1]) == "rejected"
    assert caplog.text.count("does not agree with itself") == 1


def test_only_the_first_demonstrations_of_a_worker_are_scored_twice(worker, monkeypatch):
    monkeypatch.setattr(rollout, "LOOKED_AT_TWICE", 1)
    score, asked = worker._compute_score, []

    async def counted(outputs, kwargs):
        asked.append(list(outputs[-1].response_ids))
        await score(outputs, kwargs)

    worker._compute_score = counted
    demonstration = [*worker.tokenizer.encode(ANSWER), worker.tokenizer.eos_token_id]
    settle(worker)
    assert asked.count(demonstration) == 2
    settle(worker)
    assert asked.count(demonstration) == 3
    assert [unsteady(put) for put in worker.puts] == [False, False]


def test_unscored_rollouts_are_written_and_not_gated(worker):
    outputs = failures(worker, 2)
    outputs[0].reward_score = None
    close(worker, outputs, ANSWER)
    (put,) = worker.puts
    assert outcome(put) == "not_gated"
    assert put.keys == ["u_0_0", "u_1_0"]


def test_a_failed_session_leaves_a_smaller_group(worker):
    close(worker, [None, *failures(worker, 2)], ANSWER)
    (put,) = worker.puts
    assert put.keys == ["u_1_0", "u_2_0"]
    assert outcome(put) == "injected"


def test_one_surviving_session_is_not_a_group_and_no_session_writes_nothing(worker):
    close(worker, [None, None, *failures(worker, 1)], ANSWER)
    assert outcome(worker.puts[0]) == "not_gated"
    close(worker, [None, None], ANSWER)
    assert len(worker.puts) == 1


def test_a_group_in_which_all_succeed_is_left_alone(worker):
    close(worker, [an_output(worker.tokenizer, ANSWER, score=1.0) for _ in range(3)], ANSWER)
    assert outcome(worker.puts[0]) == "not_fired"


def test_a_session_with_several_outputs_is_replaced_as_a_whole(worker):
    long = [an_output(worker.tokenizer, "1234", score=None), an_output(worker.tokenizer, "1234", score=0.0)]
    short = [an_output(worker.tokenizer, "1", score=None), an_output(worker.tokenizer, "2", score=0.0)]
    close(worker, [long, short], ANSWER)
    (put,) = worker.puts
    assert put.keys == ["u_0_0", "u_1_0", "u_1_1"]
    assert put.fields["hapo_demonstration"].tolist() == [True, False, False]
    assert all(row["rm_scores"].sum() == expected for row, expected in zip(put.fields, (1, 0, 0), strict=True))


def test_a_field_that_one_row_lacks_is_not_written_for_any_row(worker):
    outputs = [*failures(worker, 2), *failures(worker, 1, logprobs=False)]
    close(worker, outputs, None)
    assert "rollout_log_probs" not in worker.puts[0].fields


def test_an_appended_demonstration_is_an_additional_row_and_every_rollout_stays(worker):
    put = situated(worker, failures(worker, 3), ANSWER, mode="append")
    assert put.keys == ["u_0_0", "u_1_0", "u_2_0", "u_3_0"]
    assert put.fields["hapo_demonstration"].tolist() == [False, False, False, True]
    assert [len(row["responses"]) for row in put.fields] == [1, 2, 4, 4]
    assert [tag.get("hapo_appended", False) for tag in put.tags] == [False, False, False, True]
    row = put.fields[3]
    assert row["rm_scores"].tolist() == [0, 0, 0, 1]
    assert row["session_id"] == 3
    assert plain_values(put.fields["hapo_group"])[3]["scores"] == [0.0, 0.0, 0.0]
    assert put.tags[3]["response_len"] == 4


def test_an_appended_row_comes_after_failed_sessions(worker):
    put = situated(worker, [*failures(worker, 2), None], ANSWER, mode="append")
    assert put.keys == ["u_0_0", "u_1_0", "u_3_0"]


@pytest.mark.parametrize(
    ("successes", "situation", "expected"),
    [
        (0, {"threshold": 0.8}, "injected"),
        (0, {"threshold": 0.2}, "not_fired"),  # (1 + 0) / (2 + 3) is not below 0.2
        (1, {"threshold": 0.5}, "injected"),  # (1 + 1) / (2 + 3) = 0.4
        (1, {"threshold": 0.5, "prior_success": 3.0, "prior_failure": 1.0}, "not_fired"),  # 4 / 7
        (0, {"threshold": 0.8, "admitted": False}, "not_admitted"),
        (3, {"threshold": 0.2, "admitted": False}, "not_fired"),
    ],
)
def test_a_group_is_judged_by_values_that_the_trainer_attached_to_its_prompt(worker, successes, situation, expected):
    outputs = [an_output(worker.tokenizer, ANSWER, score=1.0) for _ in range(successes)]
    put = situated(worker, [*outputs, *failures(worker, 3 - successes)], ANSWER, **situation)
    assert outcome(put) == expected
    assert plain_values(put.fields["hapo_group"])[0]["key"] == 11


@pytest.mark.parametrize(
    ("gate", "successes", "expected"),
    [
        ("zero", 0, "injected"),
        ("zero", 1, "not_fired"),
        ("never", 0, "not_fired"),
        ("always", 2, "injected"),
        ("always", 3, "injected"),
    ],
)
def test_gates_without_a_posterior_use_only_the_number_of_successes(worker, gate, successes, expected):
    outputs = [an_output(worker.tokenizer, ANSWER, score=1.0) for _ in range(successes)]
    assert outcome(situated(worker, [*outputs, *failures(worker, 3 - successes)], ANSWER, gate=gate)) == expected


def test_a_thompson_draw_is_the_same_each_time_the_group_is_closed(worker):
    outcomes = set()
    for _ in range(5):
        outcomes.add(outcome(situated(worker, failures(worker, 3), ANSWER, gate="thompson", threshold=0.3)))
        worker.puts.clear()
    assert len(outcomes) == 1


def run_prompt(worker, validate):
    """Run a prompt with verl's own `_run_prompt`; its sessions only record their arguments."""
    seen, prompt = [], {"uid": "u", "demonstration": ANSWER, "hapo_situation": {"key": 1}, "raw_prompt": "123"}
    prompt["agent_name"] = "tool_agent"

    async def session(self, sampling_params, trajectory, *, trace, session_id, agent_name, **fields):
        assert validate or self._groups["u"].agent_name == agent_name
        seen.append(fields)

    async def put(key, partition_id, tag):
        pass

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(HapoAgentLoopWorker, "_run_agent_loop", session)
        context.setattr(rollout.tq, "async_kv_put", put)
        worker.config.actor_rollout_ref.rollout.val_kwargs = {"n": 1}
        asyncio.run(worker._run_prompt(prompt, {}, {"validate": validate}))
    return seen


@pytest.mark.parametrize(("validate", "sessions"), [(False, 3), (True, 1)])
def test_no_session_sees_the_demonstration(worker, validate, sessions):
    seen = run_prompt(worker, validate)
    assert seen == [{"uid": "u", "raw_prompt": "123"}] * sessions
    assert worker._groups == {}


def test_no_written_field_contains_the_demonstrations_text(worker):
    close(worker, failures(worker, 3), "secret")
    put = worker.puts[0]
    assert "secret" not in str({name: plain_values(put.fields[name]) for name in put.fields.keys()})  # noqa: SIM118
    assert isinstance(put.fields["hapo_demonstration"], torch.Tensor)


def ended(worker, text, *, score):
    """A rollout that has written its end of sequence."""
    output = an_output(worker.tokenizer, text, score=score)
    tokens = [*output.response_ids, worker.tokenizer.eos_token_id]
    ones = [1] * len(tokens)
    return output.model_copy(
        update={"response_ids": tokens, "response_mask": ones, "response_logprobs": [-1.0] * len(tokens)}
    )


def with_own(worker, source, demonstration, own=None, *, outcomes=None, mode="replace"):
    """The result of closing a group of failures if the policy has written `own` in step 2."""
    worker._hapo = HapoConfig.parse({"demonstrations": {"source": source}, "injection": {"mode": mode}})
    packed_own = packed(OwnSuccess(own, 2)) if own else b""
    close(worker, outcomes or failures(worker, 3), demonstration, situation={"key": 11, "own": packed_own})
    put = worker.puts[-1]
    return put, plain_values(put.fields["hapo_group"])[0]


def solved(worker, text=ANSWER):
    tokens = [*worker.tokenizer.encode(text), worker.tokenizer.eos_token_id]
    return Response(tokens, [1] * len(tokens), 1, 0)


@pytest.mark.parametrize("mode", ["replace", "append"])
@pytest.mark.parametrize(("source", "demonstration"), [("own", ANSWER), ("column_or_own", None)])
def test_the_policys_own_success_is_injected_with_its_exact_tokens(worker, source, demonstration, mode):
    own = Response([*solved(worker).tokens], [1, 0, 1, 1], 2, 1)
    put, group = with_own(worker, source, demonstration, own, mode=mode)
    assert (group["outcome"], group["own_step"]) == ("injected", 2)
    (row,) = [row for row in put.fields if row["hapo_demonstration"]]
    assert row["responses"].tolist() == own.tokens
    assert row["response_mask"].tolist() == row["loss_mask"].tolist() == own.mask
    assert row["num_turns"] == 4
    assert row["rm_scores"].tolist() == [0, 0, 0, 1]
    assert not any("hapo_own_success" in tag for tag in put.tags)


@pytest.mark.parametrize(
    ("source", "demonstration", "own", "outcome", "step"),
    [
        ("column_or_own", ANSWER, ANSWER, "injected", None),
        ("column_or_own", "123", ANSWER, "injected", 2),  # The column's demonstration is rejected.
        ("column_or_own", "123", None, "rejected", None),
        ("column_or_own", None, None, "missing", None),
        ("column_or_own", None, "123", "rejected", None),
        ("own", ANSWER, None, "missing", None),
        ("own", None, "123", "rejected", None),  # The reward function now rejects it.
        ("own", None, "4321", "overlong", None),  # The run was resumed with a lower limit.
        ("column", ANSWER, None, "injected", None),
    ],
)
def test_the_demonstrations_source_and_the_reason_if_there_is_none(worker, source, demonstration, own, outcome, step):
    _, group = with_own(worker, source, demonstration, own and solved(worker, own))
    assert (group["outcome"], group["own_step"]) == (outcome, step)
    assert bool(group["unsteady"]) is (own == "123")


def test_the_reward_of_an_own_success_is_computed_once(worker):
    score, asked = worker._compute_score, []

    async def counted(outputs, kwargs):
        asked.append(list(outputs[-1].response_ids))
        await score(outputs, kwargs)

    worker._compute_score = counted
    for _ in range(2):
        with_own(worker, "own", None, solved(worker))
    assert asked == [solved(worker).tokens] * 2


def test_only_a_finished_success_is_tagged(worker):
    long = an_output(worker.tokenizer, ANSWER + "0", score=1.0)  # It is cut off and has no end of sequence.
    several = [an_output(worker.tokenizer, "1", score=None), ended(worker, ANSWER, score=1.0)]
    outcomes = [ended(worker, ANSWER, score=1.0), ended(worker, "12", score=0.0), long, several]
    for source, expected in (("own", [[1, 0], None, None, None, None]), ("column", [None] * 5)):
        put, group = with_own(worker, source, None, outcomes=outcomes)
        assert group["outcome"] == "missing"
        assert [tag.get("hapo_own_success") for tag in put.tags] == expected
        assert put.keys == ["u_0_0", "u_1_0", "u_2_0", "u_3_0", "u_3_1"]


def test_a_group_that_was_not_judged_leaves_nothing_to_remember(worker):
    unscored = an_output(worker.tokenizer, "1", score=None)
    put, group = with_own(worker, "own", None, outcomes=[ended(worker, ANSWER, score=1.0), unscored])
    assert group["outcome"] == "not_gated"
    assert not any("hapo_own_success" in tag for tag in put.tags)


def test_turns_and_answers_of_a_tool_loop_are_remembered(caller):
    outputs = called_failures(caller)
    success = ended(caller, ANSWER, score=1.0)
    success.num_turns, success.extra_fields = 4, success.extra_fields | {"turn_scores": [], "tool_rewards": [0.5]}
    put, _ = with_own(caller, "own", None, outcomes=[success, *outputs[1:]])
    assert put.tags[0]["hapo_own_success"] == [2, 1]
