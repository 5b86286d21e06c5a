"""Rollouts allocated by the prompts' posteriors: what the workers get, what is logged, and what a resumed run does."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import transfer_queue as tq
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.utils import MetricsAggregator
from verl.utils import tensordict_utils as tu

from hapo_verl.algo.allocation import expected_signal
from hapo_verl.config import HapoConfig
from hapo_verl.driver.rollouts import Rollouts
from hapo_verl.driver.trainer import HapoTrainerSync
from hapo_verl.rollout.worker import HapoAgentLoopWorker
from tests.driver.test_gatekeeper import ROWS, a_gatekeeper, groups, submit

N = 8


def a_rollouts(**keys):
    hapo = HapoConfig.parse({"gate": {"name": "posterior"}, "rollouts": {"allocate": "posterior", **keys}})
    return Rollouts(hapo.rollouts, N)


def experienced(**settings):
    """A keeper that has seen the first prompts fail, the last ones succeed, and the middle ones do both."""
    keeper = a_gatekeeper("posterior", **settings)
    for _ in range(3):
        keeper.observe(groups(submit(keeper), [0, 0, 0, 3, 4, 8, 8, 8]))
    return keeper


def test_unknown_prompts_get_the_same_number_of_rollouts():
    assert a_rollouts().allocate(submit(a_gatekeeper("posterior"))) == [N] * 8


def test_prompts_with_even_odds_get_fewer_rollouts_than_rarely_solved_ones():
    rollouts = a_rollouts().allocate(submit(experienced()))
    assert sum(rollouts) == 8 * N
    even, rare = rollouts[3:5], [*rollouts[:3], *rollouts[5:]]
    assert 2 <= min(even) <= max(even) < N <= min(rare) <= max(rare) <= 2 * N


def test_prompts_with_a_certain_outcome_give_rollouts_to_others():
    # The prior is so weak that the outcome is certain after three visits.
    keeper = experienced(gate={"strength": 0.001})
    rollouts = a_rollouts().allocate(submit(keeper))
    assert sum(rollouts) == 8 * N
    assert rollouts[3] == rollouts[4] == 2 * N
    assert max(rollouts[:3] + rollouts[5:]) < N


def test_the_bounds_follow_the_configured_keys():
    situations = submit(experienced())
    assert a_rollouts(most=N).allocate(situations) == [N] * 8
    assert a_rollouts(least=N).allocate(situations) == [N] * 8
    narrow = a_rollouts(least=7, most=9).allocate(situations)
    assert {min(narrow), max(narrow), sum(narrow)} == {7, 9, 8 * N}


def test_a_resumed_run_allocates_like_one_that_never_stopped(tmp_path):
    keeper = experienced()
    keeper.save(tmp_path)
    resumed = a_gatekeeper("posterior", rows=ROWS[::-1])
    resumed.load(tmp_path)
    # One allocator has been used before, the other has not.
    before = a_rollouts()
    before.allocate(submit(a_gatekeeper("posterior")))
    for step, successes in ((4, [0, 1, 2, 3, 4, 5, 6, 8]), (5, [8] * 8)):
        of_both = [each.allocate(submit(of, step=step)) for each, of in ((before, keeper), (a_rollouts(), resumed))]
        assert of_both[0] == of_both[1] != [N] * 8
        for each in (keeper, resumed):
            each.observe(groups(submit(each, step=step), successes))


@pytest.fixture
def logged():
    rollouts, situations = a_rollouts(), submit(experienced())
    numbers = rollouts.allocate(situations)
    successes = [0, 1, 0, 2, numbers[4], 0, 1, numbers[7]]
    of_groups = [{"successes": [i < s for i in range(n)]} for n, s in zip(numbers, successes, strict=True)]
    # All sessions of one prompt have failed.
    return rollouts.metrics([*of_groups, {"successes": []}]), numbers, situations


def test_each_metric_equals_the_count_by_hand(logged):
    metrics, numbers, situations = logged

    def expected(of):
        priors = [(s["prior_success"], s["prior_failure"]) for s in situations]
        return sum(expected_signal(n, prior_success=a, prior_failure=b) for n, (a, b) in zip(of, priors, strict=True))

    assert metrics == {
        "hapo/rollouts/least": min(numbers),
        "hapo/rollouts/most": max(numbers),
        "hapo/rollouts/signals_expected": pytest.approx(expected(numbers)),
        "hapo/rollouts/signals_expected_uniform": pytest.approx(expected([N] * 8)),
        "hapo/rollouts/signals": 3,
    }
    assert metrics["hapo/rollouts/signals_expected"] > metrics["hapo/rollouts/signals_expected_uniform"]


def test_verl_averages_every_metric_over_the_updates_of_a_step(logged):
    aggregator = MetricsAggregator()
    assert {aggregator._get_aggregation_type(name) for name in logged[0]} == {"weighted_avg"}


def submitted(monkeypatch, rollouts):
    """The batch that verl's own trainer hands to the agent loops."""
    batches = []
    monkeypatch.setattr(tq, "kv_batch_put", lambda **_: None)
    trainer = object.__new__(HapoTrainerSync)
    trainer.trainer_mode, trainer.global_steps = "hapo_sync", 4
    trainer.config = OmegaConf.create({"data": {"prompt_key": "prompt"}})
    trainer.gatekeeper, trainer._rollouts = experienced(), rollouts
    trainer.agent_loop_manager = SimpleNamespace(generate_sequences=batches.append)
    columns = {name: np.fromiter((row[name] for row in ROWS), dtype=object, count=len(ROWS)) for name in ROWS[0]}
    columns["raw_prompt"] = columns["prompt"]
    columns["uid"] = np.array([f"u{i}" for i in range(len(ROWS))], dtype=object)
    columns["index"] = np.arange(len(ROWS))
    batch = tu.get_tensordict(columns)
    tu.assign_non_tensor_data(batch, "global_steps", 4)
    assert trainer._submit_batch_to_rollout(batch) == len(ROWS)
    (batch,) = batches
    return batch


def sessions(batch, monkeypatch):
    """The sessions that verl's agent loop worker starts for each prompt, if two workers share a batch."""
    started, settled = [], asyncio.Event()
    worker = object.__new__(HapoAgentLoopWorker)
    rollout = {"n": N, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "calculate_log_probs": True}
    rollout["agent"] = {"default_agent_loop": "single_turn_agent"}
    worker.config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}})
    worker._hapo, worker._groups, worker.background_tasks = HapoConfig(), {}, set()

    async def session(self, sampling_params, trajectory, *, session_id, uid, **fields):
        assert "__rollout_n__" not in fields
        started.append((uid, session_id, self._groups[uid].expected))

    async def put(key, partition_id, tag):
        settled.set()

    async def generate():
        for part in batch.chunk(2):
            await worker.generate_sequences(part)
        while worker.background_tasks:
            await asyncio.sleep(0)

    monkeypatch.setattr(HapoAgentLoopWorker, "_run_agent_loop", session)
    monkeypatch.setattr(tq, "async_kv_put", put)
    asyncio.run(generate())
    return started


def test_verls_worker_starts_and_awaits_the_allocated_number_of_sessions(monkeypatch):
    rollouts = a_rollouts()
    numbers = rollouts.allocate(submit(experienced(), step=4))
    started = sessions(submitted(monkeypatch, rollouts), monkeypatch)
    assert len(set(numbers)) > 1
    assert started == [(f"u{i}", session, n) for i, n in enumerate(numbers) for session in range(n)]


def test_uniform_allocation_attaches_nothing(monkeypatch):
    batch = submitted(monkeypatch, None)
    assert "__rollout_n__" not in batch
    assert len(sessions(batch, monkeypatch)) == len(ROWS) * N
