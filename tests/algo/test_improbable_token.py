"""A demonstration with one token that the policy never writes: the paper's loss cannot teach it, its logarithm can.

The policy is a table with a distribution over 32 tokens at each of four positions, and only the exact tokens of the
demonstration are rewarded. Three of them are likely; the last one has probability 1e-7, like ` ####` under an instruct
model. Gate, injection, advantages and loss are those of a run. The optimizer is plain gradient ascent: Adam with a
separate parameter for each token would hide how small a gradient is, and a network has no such parameters.
"""

import math
import random

import pytest
import torch

from hapo_verl.algo.advantage import appended_advantage, group_advantage
from hapo_verl.algo.gate import Situation, fires, firing_probabilities
from hapo_verl.algo.injection import Rollout, worst_rollout
from hapo_verl.algo.policy_loss import Aggregation, Clip, DemonstrationShape, hapo_policy_loss

V, ROLLOUTS, STEPS = 32, 8, 40
DEMONSTRATION = torch.tensor([3, 5, 7, 11])
PROBABILITIES = torch.tensor([0.6, 0.5, 0.4, 1e-7])


def fresh_policy():
    """Logits (T, V) under which the demonstration's tokens have these probabilities."""
    logits_TV = torch.zeros(len(DEMONSTRATION), V)
    for t, p in enumerate(PROBABILITIES):
        logits_TV[t, DEMONSTRATION[t]] = math.log(p * (V - 1) / (1 - p))
    return logits_TV.requires_grad_()


def train(shape, mode, seed=0):
    """Train, and return the exact on-policy success rate after the last step, and how often the gate fired."""
    logits_TV = fresh_policy()
    optimizer = torch.optim.SGD([logits_TV], lr=20.0)
    generator, rng, fired = torch.Generator().manual_seed(seed), random.Random(seed), 0
    for _ in range(STEPS):
        probability_TV = logits_TV.detach().softmax(-1)
        response_BT = torch.multinomial(probability_TV, ROLLOUTS, replacement=True, generator=generator).T
        score_B = (response_BT == DEMONSTRATION).all(1).float()
        demonstration_B = torch.zeros(ROLLOUTS, dtype=torch.bool)
        if fires(firing_probabilities("paper", ROLLOUTS, Situation()), int(score_B.sum()), rng):
            fired += 1
            rollouts = [Rollout(s, s >= 1, False, len(DEMONSTRATION)) for s in score_B.tolist()]
            if mode == "replace":
                worst = worst_rollout(rollouts, rng)
                response_BT[worst], score_B[worst], demonstration_B[worst] = DEMONSTRATION, 1.0, True
            else:
                response_BT = torch.cat([response_BT, DEMONSTRATION.unsqueeze(0)])
                score_B = torch.cat([score_B, torch.ones(1)])
                demonstration_B = torch.cat([demonstration_B, torch.ones(1, dtype=torch.bool)])
        group_B = torch.zeros(len(score_B), dtype=torch.int64)
        if mode == "replace":
            advantage_B = group_advantage(score_B, group_B, scale_by_std=True)
        else:
            advantage_B = appended_advantage(score_B, group_B, demonstration_B, scale_by_std=True)
        logp_BT = logits_TV.log_softmax(-1)[torch.arange(len(DEMONSTRATION)), response_BT]
        loss = hapo_policy_loss(
            logp_BT,
            logp_BT.detach(),
            advantage_B,
            torch.ones_like(logp_BT),
            demonstration_B,
            shape=shape,
            clip=Clip(low=0.2, high=0.2, dual=3.0),
            aggregation=Aggregation("token-mean"),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probability_TV = logits_TV.detach().softmax(-1)
    return probability_TV[torch.arange(len(DEMONSTRATION)), DEMONSTRATION].prod().item(), fired


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_the_logarithm_teaches_a_token_of_probability_1e_7(mode):
    success, _ = train(DemonstrationShape("power", 0.1, 0.0), mode)
    assert success > 0.9


@pytest.mark.parametrize("mode", ["append", "replace"])
def test_the_papers_loss_does_not_teach_it_and_its_gate_keeps_firing(mode):
    success, fired = train(DemonstrationShape("power", 0.1, 1.0), mode)
    assert success < 1e-5
    assert fired == STEPS


@pytest.mark.parametrize(
    ("shape", "learns"),
    [
        (DemonstrationShape("power", 0.1, 0.5), False),
        (DemonstrationShape("power", math.inf, 0.0), True),
        (DemonstrationShape("power", math.inf, 1.0), False),
        (DemonstrationShape("trsft", 0.1, 1.0), False),
        (DemonstrationShape("chord", 0.1, 1.0), False),
    ],
)
def test_a_shape_learns_it_if_its_weight_does_not_vanish_with_the_probability(shape, learns):
    success, _ = train(shape, "append")
    assert (success > 0.9) == learns
    assert learns or success < 1e-3
