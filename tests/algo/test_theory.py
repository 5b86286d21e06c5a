"""The effect of the gates on the expected gradient of a policy with three actions, enumerated with the product's code.

A is the demonstrator's solution, B is another right one, and C is wrong. A rollout has one token, N = 8, and advantages
are not divided by the deviation. `hapo_verl/algo/THEORY.md` explains the numbers.
"""

import math
import random
from functools import cache
from math import factorial

import numpy as np
import pytest
import torch

from hapo_verl.algo.advantage import appended_advantage, group_advantage
from hapo_verl.algo.gate import Situation, fires, firing_probabilities
from hapo_verl.algo.injection import Rollout, worst_rollout
from hapo_verl.algo.policy_loss import Aggregation, Clip, DemonstrationShape, hapo_policy_loss
from hapo_verl.algo.schedule import annealed, hard_off_step
from hapo_verl.algo.teachability import untaught_below

N, A, B, C = 8, 0, 1, 2
REWARD = torch.tensor([1.0, 1.0, 0.0])


def group_rows(actions, gate, mode, situation, rng, demonstration=A):
    """The actions and demonstration flags of a group after gate and injection."""
    rollouts = [Rollout(REWARD[a].item(), bool(REWARD[a]), False, 1) for a in actions]
    successes = sum(rollout.success for rollout in rollouts)
    if not fires(firing_probabilities(gate, N, situation), successes, rng):
        return list(actions), [False] * N
    if mode == "append":
        return [*actions, demonstration], [False] * N + [True]
    worst = worst_rollout(rollouts, rng)
    rows = list(actions)
    rows[worst] = demonstration
    return rows, [i == worst for i in range(N)]


PAPER, LOGARITHM = DemonstrationShape("power", 0.1, 1.0), DemonstrationShape("power", 0.1, 0.0)


def gradient(logits, groups, mode, tokens, shape=PAPER):
    """The gradient of the summed loss divided by `tokens`, one tensor of three numbers."""
    logits = logits.clone().requires_grad_()
    actions = torch.tensor([action for rows, _ in groups for action in rows])
    demonstration_B = torch.tensor([flag for _, flags in groups for flag in flags])
    group_B = torch.tensor([number for number, (rows, _) in enumerate(groups) for _ in rows])
    score_B = REWARD[actions].to(logits.dtype)
    if mode == "append":
        advantage_B = appended_advantage(score_B, group_B, demonstration_B, scale_by_std=False)
    else:
        advantage_B = group_advantage(score_B, group_B, scale_by_std=False)
    logp_BT = logits.log_softmax(-1)[actions].unsqueeze(-1)
    loss = hapo_policy_loss(
        logp_BT,
        logp_BT.detach(),
        advantage_B,
        torch.ones_like(logp_BT),
        demonstration_B,
        shape=shape,
        clip=Clip(low=0.2, high=0.2, dual=3.0),
        aggregation=Aggregation(mode="token-mean", batch_num_tokens=tokens),
    ).loss
    return torch.autograd.grad(loss, logits)[0]


def outcomes(pi):
    """Every possible composition of a group, with its probability."""
    for a in range(N + 1):
        for b in range(N + 1 - a):
            c = N - a - b
            ways = factorial(N) / (factorial(a) * factorial(b) * factorial(c))
            yield [A] * a + [B] * b + [C] * c, ways * pi[A] ** a * pi[B] ** b * pi[C] ** c


@cache
def expected_gradient(pi, gate, mode, divide_by_all_rows=False, shape=PAPER, shown=(1.0, 0.0)):
    """`shown`: probabilities of A and of B to be the demonstration."""
    logits, total = torch.tensor(pi, dtype=torch.float64).log(), torch.zeros(3, dtype=torch.float64)
    for actions, probability in outcomes(pi):
        for demonstration, share in zip((A, B), shown, strict=True):
            if share:
                group = group_rows(actions, gate, mode, Situation(), random.Random(0), demonstration)
                tokens = len(group[0]) if divide_by_all_rows else N
                total += probability * share * gradient(logits, [group], mode, tokens, shape)
    return total


def relative_bias(pi, gate, mode, **settings):
    on_policy = expected_gradient(pi, "never", "replace")
    return ((expected_gradient(pi, gate, mode, **settings) - on_policy).norm() / on_policy.norm()).item()


@pytest.mark.parametrize(
    ("pi", "gate", "replace", "append"),
    [
        ((0.05, 0.05, 0.90), "paper", 0.263, 0.340),
        ((0.05, 0.45, 0.50), "paper", 0.161, 0.054),
        ((0.05, 0.85, 0.10), "paper", 0.176, 0.017),
        ((0.01, 0.98, 0.01), "paper", 0.024, 0.0008),
        ((0.05, 0.45, 0.50), "zero", 0.0011, 0.0004),
    ],
)
def test_the_papers_gate_stays_biased_and_appending_removes_most_of_the_bias(pi, gate, replace, append):
    digits = 4 if replace < 0.01 or append < 0.01 else 3
    assert relative_bias(pi, gate, "replace") == pytest.approx(replace, abs=0.6 * 10**-digits + 4e-4)
    assert relative_bias(pi, gate, "append") == pytest.approx(append, abs=6 * 10 ** -(digits + 1))


@pytest.mark.parametrize(
    ("pi", "gate", "shaping", "replace", "append"),
    [
        ((0.05, 0.05, 0.90), "paper", 0.1, 0.847, 1.018),
        ((0.05, 0.45, 0.50), "paper", 0.1, 0.190, 0.163),
        ((0.05, 0.85, 0.10), "paper", 0.1, 0.185, 0.051),
        ((0.01, 0.98, 0.01), "paper", 0.1, 0.027, 0.0088),
        ((0.05, 0.45, 0.50), "zero", 0.1, 0.0016, 0.0013),
        ((0.05, 0.05, 0.90), "paper", 1.0, 1.223, 1.455),
        ((0.05, 0.45, 0.50), "paper", 1.0, 0.224, 0.233),
        ((0.05, 0.85, 0.10), "paper", 1.0, 0.191, 0.073),
        ((0.01, 0.98, 0.01), "paper", 1.0, 0.027, 0.0096),
        ((0.05, 0.45, 0.50), "zero", 1.0, 0.0020, 0.0018),
    ],
)
def test_the_logarithm_pushes_harder_and_its_bias_is_larger(pi, gate, shaping, replace, append):
    shape = DemonstrationShape("power", shaping, 0.0)
    for mode, expected in (("replace", replace), ("append", append)):
        digits = 4 if expected < 0.01 else 3
        assert relative_bias(pi, gate, mode, shape=shape) == pytest.approx(expected, abs=6 * 10 ** -(digits + 1))
        assert relative_bias(pi, gate, mode, shape=shape) > relative_bias(pi, gate, mode)


@pytest.mark.parametrize(
    ("exponent", "biases"), [(0.0, (0.0513, 0.0715, 0.0782, 0.0790)), (1.0, (0.0171, 0.0065, 0.0008, 0.0))]
)
def test_rarer_demonstrations_weigh_more_in_the_logarithm_and_less_in_the_paper(exponent, biases):
    """At p = .9, with the demonstrator's action at probability .05, .01, .001 and 1e-5."""
    shape = DemonstrationShape("power", 0.1, exponent)
    for q, expected in zip((0.05, 0.01, 0.001, 1e-5), biases, strict=True):
        pi = (q, 0.9 - q, 0.1)
        assert relative_bias(pi, "paper", "append", shape=shape) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("name", "shaping", "exponent", "largest", "where", "rare", "untaught"),
    [
        ("power", 0.1, 1.0, 0.25, 0.1, 1e-6, 2.5e-4),
        ("power", 0.1, 0.5, 0.385, 0.05, 1e-3, 1.5e-6),
        ("power", 0.1, 0.0, 1.0, 0.0, 1.0, 0.0),
        ("power", 1.0, 0.0, 1.0, 0.0, 1.0, 0.0),
        ("power", math.inf, 0.0, 1.0, 1.0, 1.0, 0.0),
        ("power", math.inf, 1.0, 1.0, 1.0, 1e-7, 0.01),
        ("trsft", 0.1, 1.0, 1.0, 0.1, 1e-6, 1e-3),
        ("chord", 0.1, 1.0, 0.25, 0.5, 1e-7, 2.5e-3),
    ],
)
def test_the_weights_equal_those_of_the_table(name, shaping, exponent, largest, where, rare, untaught):
    shape = DemonstrationShape(name, shaping, exponent)

    def weight(q):
        logp = torch.tensor(q, dtype=torch.float64).clamp(min=1e-40).log()
        return shape.weight(logp).item()

    assert shape.largest_weight == pytest.approx(largest, rel=1e-3)
    assert weight(where) == pytest.approx(largest, rel=1e-3)
    # The weight does not rise on either side of its maximum.
    assert all(weight(q) <= weight(where) * (1 + 1e-12) for q in (0.5 * where, min(1.0, 2 * where + 1e-9)))
    assert weight(1e-7) == pytest.approx(rare, rel=0.02)
    assert math.exp(untaught_below(shape)) == pytest.approx(untaught, rel=0.02)


def test_counting_the_demonstrations_tokens_too_shrinks_every_row_equally():
    """verl's token-mean counts every token of the batch; at a success rate of .9 that is most of the remaining bias."""
    pi = (0.05, 0.85, 0.10)
    assert relative_bias(pi, "paper", "append", divide_by_all_rows=True) == pytest.approx(0.059, abs=6e-4)


@pytest.mark.parametrize("mode", ["replace", "append"])
@pytest.mark.parametrize("gate", ["paper", "thompson", "zero", "always"])
def test_sampled_groups_agree_with_the_enumeration(gate, mode):
    pi, batches, groups = (0.05, 0.45, 0.50), 60, 100
    draws, rng = np.random.default_rng(0), random.Random(0)
    logits = torch.tensor(pi, dtype=torch.float64).log()
    means = torch.stack(
        [
            gradient(
                logits,
                [group_rows(row, gate, mode, Situation(), rng) for row in draws.choice(3, (groups, N), p=pi).tolist()],
                mode,
                groups * N,
            )
            for _ in range(batches)
        ]
    )
    exact = torch.zeros(3, dtype=torch.float64)
    for actions, probability in outcomes(pi):
        firing = firing_probabilities(gate, N, Situation())[int(REWARD[actions].sum())]
        for name, weight in (("always", firing), ("never", 1 - firing)):
            if weight:
                group = group_rows(actions, name, mode, Situation(), random.Random(0))
                exact += probability * weight * gradient(logits, [group], mode, N)
    standard_error = means.std(dim=0) / batches**0.5
    assert ((means.mean(dim=0) - exact).abs() <= 4 * standard_error).all()
    assert (standard_error < 0.05 * exact.norm()).all()


@pytest.mark.parametrize("shape", [PAPER, LOGARITHM])
@pytest.mark.parametrize("mode", ["replace", "append"])
def test_an_annealed_run_equals_grpo_bit_for_bit_from_its_hard_off_step_on(mode, shape):
    prior = {"prior_success": 1.0, "prior_failure": 1.0}
    off = hard_off_step(0.8, horizon=200, power=1.0, rollouts=N, **prior)
    logits = torch.tensor([0.05, 0.45, 0.50]).log()
    groups = np.random.default_rng(0).choice(3, (50, N), p=(0.05, 0.45, 0.50)).tolist()
    groups.append([C] * N)
    for step in range(off, 205):
        situation = Situation(threshold=annealed(0.8, step, horizon=200))
        ours = [group_rows(row, "annealed", mode, situation, random.Random(0)) for row in groups]
        grpo = [group_rows(row, "never", "replace", situation, random.Random(0)) for row in groups]
        assert ours == grpo
        if step == off:
            assert torch.equal(gradient(logits, ours, mode, 408, shape), gradient(logits, grpo, "replace", 408, shape))
    before = Situation(threshold=annealed(0.8, off - 2, horizon=200))
    assert any(any(group_rows(row, "annealed", mode, before, random.Random(0))[1]) for row in groups)


@pytest.mark.parametrize("gate", ["paper", "always", "zero"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_a_budget_bounds_the_bias_of_any_gate_at_any_policy(gate, share):
    """|bias| <= share * (norm of the demonstration's term + norm of the removed rollout's term)."""
    for pi in ((0.05, 0.05, 0.90), (0.05, 0.85, 0.10), (0.3, 0.3, 0.4)):
        on_policy = expected_gradient(pi, "never", "replace")
        # A budget admits a group independently of the group's outcome.
        mixed = share * expected_gradient(pi, gate, "replace") + (1 - share) * on_policy
        assert (mixed - on_policy).norm().item() <= share * expected_norms(pi) + 1e-12


@cache
def expected_norms(pi):
    """The expected norm of a group's gradient plus that of the same group with a demonstration in it."""
    logits, total = torch.tensor(pi, dtype=torch.float64).log(), 0.0
    for actions, probability in outcomes(pi):
        own = gradient(logits, [(actions, [False] * N)], "replace", N)
        injected = gradient(
            logits, [group_rows(actions, "always", "replace", Situation(), random.Random(0))], "replace", N
        )
        total += probability * (own.norm() + injected.norm()).item()
    return total


LIKELIHOOD = DemonstrationShape("power", math.inf, 0.0)
EARLIER = (0.8, 0.2)


def own(pi):
    """The probabilities that the policy's own success is A or B, if the policy has not changed since."""
    return pi[A] / (pi[A] + pi[B]), pi[B] / (pi[A] + pi[B])


def bias_along_and_across(pi, mode, shape, shown):
    """The bias relative to the on-policy gradient: the part along that gradient and the part orthogonal to it."""
    on_policy = expected_gradient(pi, "never", "replace")
    difference = expected_gradient(pi, "paper", mode, shape=shape, shown=shown) - on_policy
    along = (difference @ on_policy / on_policy.norm() ** 2).item()
    return along, ((difference - along * on_policy).norm() / on_policy.norm()).item()


@pytest.mark.parametrize(
    ("pi", "teacher", "itself", "earlier"),
    [
        ((0.05, 0.05, 0.90), (1.286, 0.825), (1.286, 0.0), (1.286, 0.495)),
        ((0.05, 0.45, 0.50), (0.030, 0.243), (0.142, 0.0), (0.055, 0.189)),
        ((0.05, 0.85, 0.10), (-0.028, 0.071), (0.008, 0.0), (-0.021, 0.056)),
    ],
)
def test_a_policys_own_success_pulls_along_its_gradient_until_the_policy_changes(pi, teacher, itself, earlier):
    for shown, expected in (((1.0, 0.0), teacher), (own(pi), itself), (EARLIER, earlier)):
        assert bias_along_and_across(pi, "append", LIKELIHOOD, shown) == pytest.approx(expected, abs=6e-4)
    for mode in ("append", "replace"):
        assert bias_along_and_across(pi, mode, LIKELIHOOD, own(pi))[1] < 1e-7


def test_a_weight_that_depends_on_the_token_slightly_rotates_the_own_successs_pull():
    for pi, mode, shape, teacher, itself in (
        ((0.05, 0.45, 0.50), "append", LOGARITHM, 0.1619, 0.0118),
        ((0.05, 0.85, 0.10), "append", LOGARITHM, 0.0477, 0.0022),
        ((0.05, 0.45, 0.50), "append", PAPER, 0.0540, 0.0018),
        ((0.05, 0.85, 0.10), "append", PAPER, 0.0159, 0.0005),
    ):
        assert bias_along_and_across(pi, mode, shape, (1.0, 0.0))[1] == pytest.approx(teacher, abs=6e-5)
        assert bias_along_and_across(pi, mode, shape, own(pi))[1] == pytest.approx(itself, abs=6e-5)


def test_replacing_a_failure_by_the_own_success_makes_the_step_shorter():
    along, across = bias_along_and_across((0.05, 0.85, 0.10), "replace", LIKELIHOOD, own((0.05, 0.85, 0.10)))
    assert along == pytest.approx(-0.168, abs=6e-4)
    assert across < 1e-7
