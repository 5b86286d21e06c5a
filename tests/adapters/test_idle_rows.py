"""Steps without the rows that have no gradient against steps with them: verl's driver, worker and engine around both.

Plain SGD where nothing else is said; rows left out take zeros out of sums, so what differs is the order of the others.
"""

import pytest

from tests.adapters.step_process import STEPS, Run, run

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
_ACTOR = "actor_rollout_ref.actor"
FIXED = (
    f"{_ACTOR}.use_dynamic_bsz=false",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=false",
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
)
TWICE = f"{_ACTOR}.ppo_mini_batch_size=4", f"{_ACTOR}.ppo_epochs=2"


def plus(*overrides, **settings):
    return Run(("+hapo=plus", *overrides), "append", **settings)


def paper(*overrides, **settings):
    return Run(("+hapo=paper", *overrides), "replace", **settings)


ALONE = [
    *(preset(f"{_ACTOR}.loss_agg_mode={mode}") for preset in (plus, paper) for mode in MODES),
    plus(*TWICE),
    paper(*TWICE, f"{_ACTOR}.loss_agg_mode=seq-mean-token-mean"),
    plus(*FIXED),
    paper(*TWICE, *FIXED),
    plus("hapo.kernels.head=policy_head", "hapo.kernels.policy_loss=reference"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run([one for pair in ALONE for one in (pair, pair.whole())], 1, tmp_path_factory.mktemp("alone"))


def largest(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def assert_same_steps(ours, whole):
    """Parameters after every step, and what both log under one name."""
    moved = largest(whole["parameters"][-1], whole["parameters"][0])
    assert moved > 5e-3
    for step in range(STEPS):
        assert largest(ours["parameters"][step], whole["parameters"][step]) < 2e-6 * max(1, moved)
    for step in range(STEPS):
        ours_logged, whole_logged = ours["metrics"][step], whole["metrics"][step]
        for name in set(ours_logged) & set(whole_logged) - {"perf/mfu/actor", "actor/perf/cpu_memory_used_gb"}:
            assert ours_logged[name] == pytest.approx(whole_logged[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("one", ALONE, ids=str)
def test_the_parameters_are_those_of_all_rows(alone, one):
    assert_same_steps(alone[one][0], alone[one.whole()][0])
