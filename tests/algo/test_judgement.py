"""The gate on a batch of groups: which groups it is applied to, which rollout is replaced, and the metrics."""

import math

from hapo_verl.algo.gate import Situation
from hapo_verl.algo.gate_state import GateState
from hapo_verl.algo.injection import Rollout
from hapo_verl.algo.judgement import Judgement, described, judged
from hapo_verl.config import HapoConfig


def rollouts(*scores):
    return [Rollout(score, score >= 1, truncated=False, length=i) for i, score in enumerate(scores)]


def judge(scores, situations, gate="paper", seed="0"):
    return judged(rollouts(*scores), 4, situations, gate=gate, seed=seed)


def test_each_group_is_judged_by_its_own_rows_and_the_worst_is_a_row_of_the_batch():
    found = judge([0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0.5, 0], [Situation()] * 3)
    assert found == [Judgement(True, 0, True, True, 3), Judgement(True, 4), Judgement(True, 1, True, True, 11)]


def test_a_group_with_a_row_that_has_no_score_is_not_judged():
    assert judge([0, math.nan, 0, 0], [Situation()]) == [Judgement(gated=False)]


def test_an_exhausted_budget_replaces_no_rollout():
    (found,) = judge([0, 0, 0, 0], [Situation(admitted=False)])
    assert (found.fired, found.admitted, found.worst) == (True, False, None)


def test_only_the_seed_decides_among_equal_rollouts():
    equal = [Rollout(0.0, False, truncated=False, length=5)] * 4
    worst = {judged(equal, 4, [Situation()], gate="always", seed=str(seed))[0].worst for seed in range(50)}
    assert worst == {0, 1, 2, 3}
    assert len({judged(equal, 4, [Situation()], gate="always", seed="7")[0].worst for _ in range(5)}) == 1


def test_what_is_logged_adds_up():
    judgements = judge([0, 0, 0, 0, 1, 1, 1, 1, math.nan, 0, 0, 0, 0, 0, 0, 1], [Situation()] * 4)
    found = described(judgements, 4, injected=1, reasons=["rejected"], threshold=0.8, reward=0.4)
    assert found["hapo/gate/firing_rate"] == 2 / 3
    assert found["hapo/gate/not_gated"] == 1 / 4
    assert found["hapo/injected/group_share"] == found["hapo/refused/rejected"] == 1 / 4
    assert found["hapo/on_policy_success"] == 5 / 12
    assert found["hapo/refused/missing"] == 0
    assert (found["hapo/gate/threshold"], found["hapo/on_policy_reward"]) == (0.8, 0.4)


def test_a_gate_learns_only_from_groups_that_it_can_judge():
    state = GateState(HapoConfig.parse({"gate": {"name": "posterior"}}), total_steps=1, resume_key="", data_key="")
    state.know([11, 12], ["a", "a"])
    found = state.judge(rollouts(0, 0, 0, 1, math.nan, 1, 1, 1), 4, [11, 12], step=1, seed=0)
    assert [(judgement.gated, judgement.successes) for judgement in found] == [(True, 1), (False, 0)]
    assert state.posterior is not None
    assert state.posterior.success_K.tolist() == [1, 0]
    assert state.posterior.failure_K.tolist() == [3, 0]
