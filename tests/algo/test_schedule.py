"""The schedules of thresholds and budgets: closed forms are compared with enumeration, budgets with counting."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hapo_verl.algo.gate import injection_bound
from hapo_verl.algo.schedule import RunningSuccess, adaptive, admitted, annealed, hard_off_step

UNIFORM = {"prior_success": 1.0, "prior_failure": 1.0}


def test_the_annealed_threshold_falls_from_its_start_to_zero():
    assert annealed(0.8, 0, horizon=100) == 0.8
    assert annealed(0.8, 50, horizon=100) == pytest.approx(0.4)
    assert annealed(0.8, 50, horizon=100, power=2) == pytest.approx(0.2)
    assert annealed(0.8, 100, horizon=100) == annealed(0.8, 1000, horizon=100) == 0.0


@given(
    threshold=st.floats(0.01, 1),
    horizon=st.integers(1, 2000),
    power=st.floats(0.25, 4),
    rollouts=st.integers(2, 32),
)
def test_from_the_hard_off_step_on_the_gate_does_not_fire_even_for_a_failed_group(threshold, horizon, power, rollouts):
    off = hard_off_step(threshold, horizon=horizon, power=power, rollouts=rollouts, **UNIFORM)

    def fires(step):
        gamma = annealed(threshold, step, horizon=horizon, power=power)
        return injection_bound(rollouts, threshold=gamma, **UNIFORM) >= 0

    assert not any(fires(step) for step in range(off, min(off + 50, horizon + 2)))
    # The gate still fires one step earlier, unless threshold and least confidence are equal within rounding.
    assert off < 2 or fires(off - 2)


def test_the_hard_off_step_of_the_defaults():
    # gamma <= 0.1 = (1 + 0) / (1 + 1 + 8): seven eighths of the way from 0.8 to 0.
    off = hard_off_step(0.8, horizon=200, power=1.0, rollouts=8, **UNIFORM)
    assert injection_bound(8, threshold=annealed(0.8, off, horizon=200), **UNIFORM) == -1
    assert injection_bound(8, threshold=annealed(0.8, 174, horizon=200), **UNIFORM) == 0
    assert off in (175, 176)


def test_the_adaptive_threshold_follows_the_remaining_failure_rate():
    state = RunningSuccess()
    assert adaptive(0.8, state) == 0.8
    state = state.after(0.2, memory=0.5)
    assert adaptive(0.8, state) == 0.8
    state = state.after(0.6, memory=0.5)
    assert state == RunningSuccess(first=0.2, mean=0.4)
    assert adaptive(0.8, state) == pytest.approx(0.8 * 0.6 / 0.8)
    # If success falls below its start, the threshold does not rise above its start.
    assert adaptive(0.8, RunningSuccess(first=0.5, mean=0.1)) == 0.8
    assert adaptive(0.8, RunningSuccess(first=1.0, mean=1.0)) == 0.0


@given(
    share=st.floats(0, 1),
    submissions=st.lists(st.integers(0, 40), min_size=1, max_size=10),
    seed=st.integers(0, 100),
)
def test_a_budget_is_never_exceeded_and_never_wasted(share, submissions, seed):
    rng, submitted, total = random.Random(seed), 0, 0
    for prompts in submissions:
        chosen = admitted(prompts, share, submitted=submitted, rng=rng)
        assert len(chosen) == prompts
        submitted, total = submitted + prompts, total + sum(chosen)
        assert share * submitted - 1 < total <= share * submitted


def test_every_prompt_is_equally_likely_to_be_admitted():
    counts = [0] * 10
    for seed in range(2000):
        for place, chosen in enumerate(admitted(10, 0.3, submitted=0, rng=random.Random(seed))):
            counts[place] += chosen
    assert all(abs(count - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5 for count in counts)
