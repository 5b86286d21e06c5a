"""The metrics of a run's groups, on a batch that is small enough to count by hand."""

import pytest
import torch
from verl.trainer.ppo.v1.utils import MetricsAggregator

from hapo_verl.algo.gate import Situation, firing_probabilities
from hapo_verl.driver.metrics import group_metrics, silence

PAPER = firing_probabilities("paper", 8, Situation())


def a_group(successes, outcome, own_step=None):
    """A group of eight rollouts, of which the first ones are successful."""
    flags = [i < successes for i in range(8)]
    return {
        "outcome": outcome,
        "scores": [float(flag) for flag in flags],
        "successes": flags,
        "fired": successes <= 6,
        "firing": PAPER,
        "threshold": 0.8,
        "confidence": (1 + successes) / 10,
        "replaced": 7 if outcome == "injected" else None,
        "unsteady": outcome == "rejected",
        "own_step": own_step,
    }


GROUPS = {
    "a": a_group(0, "injected"),
    "b": a_group(0, "rejected"),
    "c": a_group(4, "injected", own_step=3),
    "d": a_group(8, "not_fired"),
    "e": {"outcome": "not_gated", "scores": [], "successes": [], "firing": None},
}


@pytest.fixture
def metrics():
    demonstration_B = torch.zeros(40, dtype=torch.bool)
    demonstration_B[[7, 23]] = True
    tokens_B = torch.where(demonstration_B, 10, 5)
    own_B = torch.zeros(40, dtype=torch.bool)
    own_B[23] = True
    return group_metrics(GROUPS, demonstration_B=demonstration_B, own_B=own_B, tokens_B=tokens_B)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hapo/gate/firing_rate", 3 / 4),
        ("hapo/gate/firing_rate_at_S/0", 1.0),
        ("hapo/gate/firing_rate_at_S/4", 1.0),
        ("hapo/gate/firing_rate_at_S/8", 0.0),
        # The gate always fires at S = 0 and never at S = 8. At p = 1/2 it fires unless S is 7 or 8: 1 - 9/256.
        ("hapo/gate/firing_rate_expected", (1 + 1 + (1 - 9 / 256) + 0) / 4),
        ("hapo/gate/threshold", 0.8),
        ("hapo/gate/not_admitted", 0.0),
        ("hapo/gate/confidence", (0.1 + 0.1 + 0.5 + 0.9) / 4),
        ("hapo/gate/not_gated", 1 / 5),
        ("hapo/demonstration/unsteady", 1 / 5),
        ("hapo/injected/group_share", 2 / 5),
        ("hapo/injected/row_share", 2 / 40),
        ("hapo/injected/token_share", 20 / (20 + 38 * 5)),
        ("hapo/injected/own_share", 1 / 5),
        ("hapo/injected/own_row_share", 1 / 40),
        ("hapo/injected/own_token_share", 10 / (20 + 38 * 5)),
        ("hapo/on_policy_success", 12 / 32),
        ("hapo/without_signal/before_injection", 3 / 4),
        ("hapo/without_signal/after_injection", 2 / 4),
        ("hapo/refused/rejected", 1 / 5),
        ("hapo/refused/overlong", 0.0),
    ],
)
def test_each_metric_equals_the_count_by_hand(metrics, name, value):
    assert metrics[name] == pytest.approx(value)


def test_verl_averages_every_metric_over_the_updates_of_a_step(metrics):
    aggregator = MetricsAggregator()
    assert {name: aggregator._get_aggregation_type(name) for name in metrics} == dict.fromkeys(metrics, "weighted_avg")


def test_a_batch_without_a_single_gated_group_logs_zeros():
    none_B = torch.zeros(0, dtype=torch.bool)
    values = group_metrics({"e": GROUPS["e"]}, demonstration_B=none_B, own_B=none_B, tokens_B=torch.zeros(0))
    assert values["hapo/gate/firing_rate"] == 0.0


NOTHING = {
    "a": a_group(0, "rejected"),
    "b": a_group(0, "missing"),
    "c": a_group(0, "rejected"),
    "d": a_group(8, "not_fired"),
}


def test_if_no_group_has_a_signal_the_message_says_what_to_check():
    assert silence(NOTHING) == (
        "none of 4 groups has a signal: the rollouts of each got the same reward (0 in 3, 1 in 1 of them), and no "
        "demonstration was injected (2 rejected, 1 missing). Read a few responses beside what the reward function expects "
        "of them (trainer.rollout_data_dir=FOLDER writes them), look whether they end within data.max_response_length, and "
        "ask python -m hapo_verl.doctor about the demonstrations."
    )
    assert "and no demonstration was injected. Read a few" in silence({"a": a_group(0, "not_fired")})
    assert silence({"d": a_group(8, "not_fired")}) == (
        "none of 1 groups has a signal: the rollouts of each got the same reward (1 in 1 of them), a success. The "
        "policy solves these prompts already: train on harder ones."
    )


@pytest.mark.parametrize("other", [a_group(0, "injected"), a_group(4, "not_fired")])
def test_one_group_with_a_signal_gives_no_message(other):
    assert silence(NOTHING | {"e": other}) is None
    assert silence({}) is None
