"""A policy that is its own teacher: after a kill its weights are reset, and its own successes are injected.

Two launches of one run, on data without demonstrations. The first one's model has learned half of the answers; its
driver is killed after step 3. Then the weights of a model that has learned nothing take the place of those in the
checkpoint. The second launch resumes there, and the remembered successes are all that it has of the first one's
knowledge.
"""

import json

import numpy as np
import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hapo_verl.algo.own_successes import MIB, OwnSuccesses, unpacked
from hapo_verl.driver.gatekeeper import row_name
from hapo_verl.driver.own_past import OWN_PAST_FILE
from tests.e2e.conftest import DIGITS, PROMPTS, ROLLOUTS

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1800)]
KILLED_AFTER, STEPS = 3, 6
SETTINGS = [
    "+hapo=paper",
    "trainer.v1.trainer_mode=hapo_sync",
    "hapo.demonstrations.source=own",
    "hapo.injection.mode=append",
    "hapo.poll_interval=0.05",
    "hapo.trace_dir={folder}/trace",
    "actor_rollout_ref.actor.optim.optimizer=SGD",
    "actor_rollout_ref.actor.optim.lr=0.01",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
    "trainer.save_freq=1",
    "trainer.test_freq=-1",
]


def forget(checkpoint, model):
    """Replace the weights of a checkpoint by those of a model."""
    (path,) = (checkpoint / "actor").glob("model_world_size_1_rank_0.pt")
    state, weights = torch.load(path, weights_only=False), AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, parameter in state.items():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.copy_(weights[name])
    torch.save(state, path)


def without_demonstrations(run):
    """Remove the column from the training data."""
    train = run.folder / "data" / "train.parquet"
    pandas.read_parquet(train).drop(columns="demonstration").to_parquet(train)


@pytest.fixture(scope="module")
def past(killed_and_resumed, able, model):
    return killed_and_resumed(
        *SETTINGS,
        f"actor_rollout_ref.model.path={able}",
        after=KILLED_AFTER,
        change=without_demonstrations,
        between=lambda checkpoint: forget(checkpoint, model),
        steps=STEPS,
        whole=False,
        rows=2 * PROMPTS,
    )


def steps_of(past):
    """Each step, its groups and its rows by group, from the launch whose work counts."""
    traced = {
        id(run): [json.loads(line) for line in (run.folder / "trace" / "rows.jsonl").read_text().splitlines()]
        for run in (past.killed, past.resumed)
    }
    for step, run in past.steps():
        groups = [group for group in run.groups if group["step"] == step]
        yield step, groups, {g["uid"]: [row for row in traced[id(run)] if row["uid"] == g["uid"]] for g in groups}


def remembered(past, model):
    """The expected state for each step: its groups, its rows and the remembered success of each prompt before it."""
    end, known = AutoTokenizer.from_pretrained(model).eos_token_id, {}
    for step, groups, rows in steps_of(past):
        yield step, groups, rows, dict(known)
        for group in groups:
            own = [row for row in rows[group["uid"]] if not row["hapo_demonstration"]]
            successes = [row["responses"] for row in own if row["score"] >= 1 and row["responses"][-1] == end]
            if successes:
                known[group["index"]] = (min(successes, key=lambda tokens: (len(tokens), tokens)), step)
    yield STEPS + 1, [], {}, known


def test_the_policy_succeeds_before_its_weights_are_reset_and_never_after(past):
    saved = past.saved
    assert saved in (KILLED_AFTER - 1, KILLED_AFTER)
    successes = {step: sum(sum(g["successes"]) for g in groups) for step, groups, _ in steps_of(past)}
    assert min(count for step, count in successes.items() if step <= saved) > PROMPTS * ROLLOUTS * 0.2
    assert max(count for step, count in successes.items() if step > saved) <= 1


def test_every_group_for_which_the_gate_fires_gets_its_own_last_success(past, model):
    helped_after = 0
    for step, groups, rows, known in remembered(past, model):
        for group in groups:
            injected = [row["responses"] for row in rows[group["uid"]] if row["hapo_demonstration"]]
            tokens, written = known.get(group["index"], (None, None))
            if not group["fired"]:
                assert (group["outcome"], injected) == ("not_fired", [])
            elif tokens is None:
                assert (group["outcome"], injected) == ("missing", [])
            else:
                assert (group["outcome"], group["own_step"], injected) == ("injected", written, [tokens])
                helped_after += step > past.saved >= written
    assert helped_after > PROMPTS


def test_the_forgotten_success_has_a_gradient_where_no_rollout_has_one(past):
    after = past.resumed
    injected = {
        group["uid"] for group in after.groups if group["outcome"] == "injected" and not any(group["successes"])
    }
    rows = [row for row in after.loss_rows if row["uid"] in injected and any(row["advantages"])]
    assert len(rows) == len(injected) > 0
    assert all(row["hapo_demonstration"] and min(row["advantages"]) > 0 for row in rows)


def test_own_demonstrations_are_counted_separately(past):
    after = past.resumed
    for number, logged in enumerate(after.steps):
        groups = [group for group in after.groups if group["step"] == past.saved + 1 + number]
        share = sum(group["outcome"] == "injected" for group in groups) / PROMPTS
        assert logged["hapo/injected/own_share"] == logged["hapo/injected/group_share"] == pytest.approx(share)
        assert logged["hapo/injected/own_row_share"] == logged["hapo/injected/row_share"]
    assert max(logged["hapo/injected/own_share"] for logged in after.steps) > 0


def test_the_last_checkpoint_holds_what_both_launches_have_seen(past, model):
    *_, (_, _, _, known) = remembered(past, model)
    rows = past.killed.train.to_dict("records")
    kept = OwnSuccesses(MIB)
    with np.load(past.checkpoints / f"global_step_{STEPS}" / OWN_PAST_FILE, allow_pickle=False) as arrays:
        kept.restore(arrays)
    found = {row["extra_info"]["index"]: kept.recall(row_name(row, "prompt")[0], STEPS + 1) for row in rows}
    found = {index: unpacked(own) for index, own in found.items() if own}
    assert {index: (own.response.tokens, own.step) for index, own in found.items()} == known
    assert all(own.response.mask == [1] * (DIGITS + 1) and own.response.num_turns == 2 for own in found.values())
