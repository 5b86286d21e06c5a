"""The numbers of rollouts compared with enumeration of all choices, Beta functions, simulation, and the gradient."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.special import betaln
from scipy.stats import beta

from hapo_verl.algo.advantage import group_advantage
from hapo_verl.algo.allocation import allocate, expected_signal, gains

PRIORS = [(1.0, 1.0), (0.3, 4.0), (9.0, 0.2), (1e-3, 1e-3), (40.0, 60.0), (2.5, 0.7)]


def signal(n, a, b):
    return expected_signal(n, prior_success=a, prior_failure=b)


@pytest.mark.parametrize(("a", "b"), PRIORS)
def test_the_expected_signal_is_the_quotient_of_beta_functions(a, b):
    assert signal(1, a, b) == 0
    for n in (2, 3, 8, 33):
        quotients = math.exp(betaln(a + n, b) - betaln(a, b)) + math.exp(betaln(a, b + n) - betaln(a, b))
        assert signal(n, a, b) == pytest.approx(1 - quotients, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.0, 5.0), (1.5, 1.2)])
def test_the_expected_signal_is_the_integral_over_the_posterior(a, b):
    for n in (2, 5, 16):
        integral, _ = integrate.quad(lambda p, n=n: (1 - p**n - (1 - p) ** n) * beta.pdf(p, a, b), 0, 1)
        assert signal(n, a, b) == pytest.approx(integral, rel=1e-7)


def test_simulated_groups_have_a_signal_as_often_as_computed():
    rng = np.random.default_rng(0)
    for a, b in PRIORS:
        successes = rng.binomial(6, rng.beta(a, b, size=200_000))
        assert np.mean((successes > 0) & (successes < 6)) == pytest.approx(signal(6, a, b), abs=0.004)


def test_under_a_uniform_prior_a_signal_has_probability_n_minus_1_over_n_plus_1():
    for n in range(1, 20):
        assert signal(n, 1.0, 1.0) == pytest.approx((n - 1) / (n + 1))


def test_the_gain_of_an_almost_certain_prompt_keeps_its_precision():
    # 1 - G(n) is 1 to the last bit here, so a difference of two of them would be noise or 0.
    first = next(gains(1e-12, 1e3))
    assert first == pytest.approx(2e-12 / 1001, rel=1e-9)


@pytest.mark.parametrize(("a", "b"), PRIORS)
def test_each_further_rollout_gains_less_but_more_than_zero(a, b):
    values = list(itertools.islice(gains(a, b), 64))
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    assert min(values) > 0


def choices(prompts, total, least, most):
    return [n for n in itertools.product(range(least, most + 1), repeat=prompts) if sum(n) == total]


def test_no_other_allocation_is_better():
    rng = random.Random(0)
    for _ in range(150):
        prompts, least = rng.randint(1, 4), rng.randint(1, 3)
        most = rng.randint(least, 7)
        total = rng.randint(prompts * least, prompts * most)
        priors = [(rng.gammavariate(0.5, 4) + 1e-9, rng.gammavariate(0.5, 4) + 1e-9) for _ in range(prompts)]

        def expected(rollouts, priors=priors):
            return sum(signal(n, *prior) for n, prior in zip(rollouts, priors, strict=True))

        chosen = allocate(priors, total=total, least=least, most=most)
        assert tuple(chosen) in choices(prompts, total, least, most)
        best = max(expected(other) for other in choices(prompts, total, least, most))
        assert expected(chosen) == pytest.approx(best, rel=1e-12, abs=1e-15)


def test_an_uncertain_prompt_gets_the_rollouts_of_certain_ones():
    solved, hopeless, doubtful = (40.0, 0.01), (0.01, 40.0), (3.0, 3.0)
    assert allocate([solved, doubtful, hopeless], total=18, least=2, most=14) == [2, 14, 2]
    # A rare success needs many rollouts to occur, and even odds need few.
    even, rare = allocate([(50.0, 50.0), (5.0, 95.0)], total=16, least=2, most=14)
    assert even < rare


@pytest.mark.parametrize("prior", PRIORS)
def test_equal_prompts_get_equal_numbers_and_the_first_ones_get_the_remainder(prior):
    assert allocate([prior] * 4, total=32, least=2, most=16) == [8] * 4
    assert allocate([prior] * 4, total=34, least=2, most=16) == [9, 9, 8, 8]


def test_bounds_hold_and_a_total_outside_them_is_an_error():
    assert allocate([(1.0, 1.0)] * 3, total=24, least=8, most=8) == [8, 8, 8]
    assert allocate([(1.0, 1.0), (1e-9, 1.0)], total=16, least=4, most=8) == [8, 8]
    assert allocate([], total=0, least=2, most=16) == []
    for total in (5, 13):
        with pytest.raises(ValueError, match=f"{total} rollouts for 3 prompts with 2 to 4 rollouts each"):
            allocate([(1.0, 1.0)] * 3, total=total, least=2, most=4)


@pytest.mark.parametrize("scale_by_std", [False, True])
@pytest.mark.parametrize("rollouts", [2, 3, 5])
def test_a_groups_expected_gradient_points_along_its_success_rates_gradient(rollouts, scale_by_std):
    policy = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    # Gradients of log π(action) and of the success rate with respect to the logits.
    score = torch.eye(3, dtype=torch.float64) - policy
    success = policy * (reward - policy @ reward)
    gradient = torch.zeros(3, dtype=torch.float64)
    for actions in itertools.product(range(3), repeat=rollouts):
        group = torch.zeros(rollouts, dtype=torch.int64)
        advantage = group_advantage(reward[list(actions)], group, scale_by_std=scale_by_std)
        gradient += policy[list(actions)].prod() * (advantage @ score[list(actions)]) / rollouts
    factor = (gradient @ success) / (success @ success)
    assert factor > 0
    assert torch.allclose(gradient, factor * success, rtol=1e-9, atol=1e-12)
    if not scale_by_std:
        assert factor.item() == pytest.approx((rollouts - 1) / rollouts)
