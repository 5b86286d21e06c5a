"""Whole runs of verl's trainer with rows without a gradient left out, and with all of them: the same parameters.

Scripted sessions, so that both see the same rollouts, and plain SGD, as in `test_limits.py`. Each method comes with
another way to cut a step: epochs, micro-batches, the head. Prompts come back in an order of their own in every run, and
verl cuts mini-batches in that order: those are compared at the engine, in `tests/driver/test_idle_rows.py`. Beside verl's
own GRPO: `test_limits.py`.
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
    # Two epochs: old log-probs are needed, and the second epoch clips ratios.
    "plus": ["+hapo=plus", "actor_rollout_ref.actor.ppo_epochs=2", *DYNAMIC],
    # One update, micro-batches of a fixed size, a mean of rows; half of the failed groups are injected at most.
    "paper": ["+hapo=paper", "hapo.budget.share=0.5", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"],
    # Its own aggregation and an entropy bonus: every row has a gradient, and nothing is left out.
    "luffy": ["+hapo=luffy", *DYNAMIC],
    # Its clip and its mean over tokens; groups without a signal stay, so that there is something to leave out.
    "dapo": ["+hapo=dapo", "algorithm.filter_groups.enable=false"],
    # The loss inside the head.
    "policy_head": [
        "+hapo=plus",
        "hapo.kernels.head=policy_head",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.ref.strategy=fsdp2",
        *DYNAMIC,
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_the_parameters_are_those_of_a_run_with_all_rows(trainer, case):
    overrides = [*CASES[case], *HAPO, *SCRIPTED, "hapo.gate.threshold=0.3", f"trainer.save_freq={STEPS}"]
    if case in ("luffy", "dapo"):  # gates without a threshold
        overrides.remove("hapo.gate.threshold=0.3")
    skipped = trainer(f"skipped-{case}", *overrides, steps=STEPS, whole=False)
    whole = trainer(f"whole-{case}", *overrides, steps=STEPS)
    shares = [logged.get("hapo/trained/row_share", 1.0) for logged in skipped.steps]
    assert (min(shares) < 1) == (case != "luffy")
    assert {group["outcome"] for group in skipped.groups} == {group["outcome"] for group in whole.groups}
    assert largest(parameters(skipped, STEPS), parameters(whole, STEPS)) < 1e-6
