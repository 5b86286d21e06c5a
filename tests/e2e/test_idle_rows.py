"""Runs of verl's trainer that leave out rows without a gradient end with the same parameters as runs with all rows.

Sessions are scripted, so that both runs see the same rollouts, and the optimizer is plain SGD, as in `test_limits.py`.
Each method has a different division of a step: epochs, micro-batches or the head. Prompts finish in a different order
in every run, and verl cuts mini-batches in that order. Therefore mini-batches are compared at the engine, in
`tests/driver/test_idle_rows.py`. The comparison with verl's own GRPO is in `test_limits.py`.
"""

import pytest

from tests.e2e.test_limits import HAPO, SCRIPTED, largest, parameters

pytestmark = [pytest.mark.e2e, pytest.mark.long]

STEPS = 5
DYNAMIC = [
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=256",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=256",
]
CASES = {
    # With two epochs old log-probs are needed, and the second epoch clips ratios.
    "plus": ["+hapo=plus", "actor_rollout_ref.actor.ppo_epochs=2", *DYNAMIC],
    # One update, micro-batches of a fixed size, a mean over rows; at most half of the groups are injected.
    "paper": ["+hapo=paper", "hapo.budget.share=0.5", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"],
    # LUFFY has its own aggregation and an entropy bonus: every row has a gradient, and nothing is left out.
    "luffy": ["+hapo=luffy", *DYNAMIC],
    # DAPO's clip and mean over tokens; groups without a signal are not filtered, so that rows can be left out.
    "dapo": ["+hapo=dapo", "algorithm.filter_groups.enable=false"],
    # The loss is computed inside the head.
    "policy_head": [
        "+hapo=plus",
        "hapo.kernels.head=policy_head",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.ref.strategy=fsdp2",
        *DYNAMIC,
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_the_parameters_equal_those_of_a_run_with_all_rows(trainer, case):
    overrides = [*CASES[case], *HAPO, *SCRIPTED, "hapo.gate.threshold=0.3", f"trainer.save_freq={STEPS}"]
    if case in ("luffy", "dapo"):  # Their gates have no threshold.
        overrides.remove("hapo.gate.threshold=0.3")
    skipped = trainer(f"skipped-{case}", *overrides, steps=STEPS, whole=False)
    whole = trainer(f"whole-{case}", *overrides, steps=STEPS)
    shares = [logged.get("hapo/trained/row_share", 1.0) for logged in skipped.steps]
    assert (min(shares) < 1) == (case != "luffy")
    assert {group["outcome"] for group in skipped.groups} == {group["outcome"] for group in whole.groups}
    assert largest(parameters(skipped, STEPS), parameters(whole, STEPS)) < 1e-6
