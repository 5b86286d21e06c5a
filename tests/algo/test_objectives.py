"""Objectives that weight likelihoods: their gradient equals that of the formula, by autograd in fp64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_verl.algo.objectives import Objective, Rows, objectives
from hapo_verl.algo.objectives.chord import Chord
from hapo_verl.algo.objectives.real import Real
from hapo_verl.algo.objectives.srft import Srft
from hapo_verl.algo.policy_loss import UNCLIPPED, Aggregation, DemonstrationShape, hapo_policy_loss, likelihood_loss

LENGTHS = torch.tensor([3, 5, 2, 4, 1, 3, 5, 2, 4, 5, 1, 3])
GROUP = torch.tensor([7, 7, 2, 2, 2, 7, 9, 9, 9, 4, 4, 4])
SCORE = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.float64)
DEMONSTRATION = torch.tensor([i in (0, 4, 9) for i in range(12)])
MASK = torch.arange(5) < LENGTHS[:, None]


def recorded(seed=0):
    """Random log π and log π_old, (B, T), fp64."""
    generator = torch.Generator().manual_seed(seed)
    shape = MASK.shape
    old_BT = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return old_BT + torch.randn(shape, generator=generator, dtype=torch.float64), old_BT


def rows_of(logp_BT, old_BT, entropy_B=None):
    mean = ((logp_BT - old_BT) * MASK).sum(1) / LENGTHS
    entropy_B = torch.zeros_like(mean) if entropy_B is None else entropy_B
    return Rows(
        SCORE, GROUP, DEMONSTRATION, LENGTHS, mean.detach(), entropy_B, batch_size=16, groups=len(set(GROUP.tolist()))
    )


def formula_of_real(logp_BT, old_BT, tau=0.5):
    """The paper's L, computed group by group."""
    s = ((logp_BT - old_BT) * MASK).sum(1) / LENGTHS
    total, groups = 0.0, GROUP.unique().tolist()
    for group in groups:
        positive = [i for i in range(12) if GROUP[i] == group and SCORE[i] == 1]
        negative = [i for i in range(12) if GROUP[i] == group and SCORE[i] == 0]
        if positive and negative:
            total = total + torch.log(1 + sum(torch.exp(-s[i] / tau) for i in positive))
            total = total + torch.log(1 + sum(torch.exp(s[j] / tau) for j in negative))
    return total / len(groups)


def gradient(loss, logp_BT):
    return torch.autograd.grad(loss, logp_BT)[0]


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_real_is_the_papers_loss_and_gradient(tau):
    logp_BT, old_BT = recorded()
    logp_BT.requires_grad_()
    expected = formula_of_real(logp_BT, old_BT, tau)
    method, rows = Real(temperature=tau), rows_of(logp_BT, old_BT)
    term = likelihood_loss(
        logp_BT,
        method.likelihood_weight(rows),
        MASK,
        Aggregation(mode="seq-mean-token-mean", global_batch_size=rows.batch_size),
    )
    assert method.loss(rows).item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient(term, logp_BT), gradient(expected, logp_BT), rtol=1e-7, atol=1e-12)


def test_reals_weights_of_the_first_step_depend_only_on_the_counts():
    weight_B = Real().likelihood_weight(rows_of(*[recorded()[1]] * 2)) * 4 / 16
    # Group 7 has one success and two failures, group 2 two and one, the others one class.
    assert weight_B[[0, 1, 5]].tolist() == pytest.approx([1, -2 / 3, -2 / 3])
    assert weight_B[[2, 3, 4]].tolist() == pytest.approx([2 / 3, 2 / 3, -1])
    assert weight_B[6:].tolist() == [0] * 6


def test_real_with_an_injected_success_among_seven_failures():
    score, group = torch.tensor([1.0] + [0.0] * 7), torch.zeros(8, dtype=torch.long)
    nothing = torch.zeros(8)
    rows = Rows(score, group, score > 0, torch.ones(8, dtype=torch.long), nothing, nothing, batch_size=8, groups=1)
    assert (Real().likelihood_weight(rows) / 8).tolist() == pytest.approx([1.0] + [-0.25] * 7)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e4, 1e4), min_size=12, max_size=12))
def test_reals_weights_are_finite_and_bounded_by_1_over_tau(log_ratios):
    rows = rows_of(*recorded())._replace(log_ratio_B=torch.tensor(log_ratios, dtype=torch.float64))
    weight_B = Real().likelihood_weight(rows) * 4 / 16
    assert bool(weight_B.isfinite().all())
    assert float(weight_B.abs().max()) <= 2 + 1e-12
    assert bool(Real().loss(rows).isfinite())


def test_srft_is_its_formula():
    logp_BT, old_BT = recorded()
    logp_BT.requires_grad_()
    entropy_B = torch.linspace(0.1, 1.2, 12, dtype=torch.float64)
    entropy = sum(h * n for h, n in zip(entropy_B.tolist(), LENGTHS.tolist(), strict=True)) / int(LENGTHS.sum())
    expected = 0.0
    for i, t in itertools.product(range(12), range(5)):
        if t < LENGTHS[i]:
            own = 0.1 * math.exp(entropy) if SCORE[i] == 1 else -1
            weight = 0.5 * math.exp(-entropy) if DEMONSTRATION[i] else own
            expected = expected - weight * logp_BT[i, t]
    expected = expected / int(LENGTHS.sum())
    weight_B = Srft().likelihood_weight(rows_of(logp_BT, old_BT, entropy_B))
    how = Aggregation(mode="token-mean", batch_num_tokens=int(LENGTHS.sum()))
    term = likelihood_loss(logp_BT, weight_B, MASK, how)
    assert term.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient(term, logp_BT), gradient(expected, logp_BT), rtol=1e-10, atol=1e-12)


def test_advantages_as_the_objectives_change_them():
    rows = torch.tensor([3.0, -1.0]), torch.tensor([True, False]), torch.tensor([4, 12])
    assert Objective().advantage(*rows).tolist() == [3.0, -1.0]
    assert Srft().advantage(*rows).tolist() == [3.0, 0.0]
    assert Real().advantage(*rows).tolist() == [0.0, 0.0]
    # .1 of 16 tokens to the demonstration's 4, .9 of them to the other 12.
    assert Chord().advantage(*rows).tolist() == pytest.approx([0.4, -1.2])


@pytest.mark.parametrize("demonstrations", [[], [1], [0, 4, 9], range(12)])
def test_chord_is_the_sum_of_its_two_means_also_with_rows_of_one_kind(demonstrations):
    logp_BT, old_BT = recorded()
    logp_BT.requires_grad_()
    advantage_B = torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    demonstration_B = torch.tensor([i in demonstrations for i in range(12)])

    def mean(value_BT, of_B):
        active_BT = MASK & of_B[:, None]
        return torch.where(active_BT, value_BT, 0.0).sum() / active_BT.sum().clamp(min=1)

    ratio_BT, probability_BT = (logp_BT - old_BT).exp(), logp_BT.detach().exp()
    expected = 0.8 * mean(-advantage_B[:, None] * ratio_BT, ~demonstration_B)
    expected = expected + 0.2 * mean(-probability_BT * (1 - probability_BT) * logp_BT, demonstration_B)
    loss = hapo_policy_loss(
        logp_BT,
        old_BT,
        Chord(imitation=0.2).advantage(advantage_B, demonstration_B, LENGTHS),
        MASK,
        demonstration_B,
        shape=DemonstrationShape("chord", 0.1, 1.0),
        clip=UNCLIPPED,
        aggregation=Aggregation("token-mean"),
    ).loss
    torch.testing.assert_close(gradient(loss, logp_BT), gradient(expected, logp_BT), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["real", "srft"])
def test_weights_do_not_depend_on_the_order_of_rows(name):
    method, rows = objectives()[name], rows_of(*recorded(), torch.rand(12, dtype=torch.float64))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = Rows(*(column[order] for column in rows[:-2]), *rows[-2:])
    torch.testing.assert_close(method.likelihood_weight(shuffled), method.likelihood_weight(rows)[order])


@pytest.mark.parametrize("mode", ["token-sum", "seq-mean-token-sum"])
def test_masked_tokens_do_not_change_the_likelihood(mode):
    logp_BT = torch.where(MASK, recorded()[0], float("nan")).requires_grad_()
    term = likelihood_loss(logp_BT, torch.ones(12, dtype=torch.float64), MASK, Aggregation(mode=mode))
    slope = gradient(term, logp_BT)
    assert math.isfinite(term.item())
    torch.testing.assert_close(slope, MASK.double() * (-1 if mode == "token-sum" else -1 / 12))


def test_every_file_of_the_folder_is_a_method_and_the_base_has_no_weights():
    assert list(objectives()) == ["surrogate", "chord", "real", "srft"]
    assert not Objective().weighs_likelihood
    with pytest.raises(NotImplementedError, match="surrogate weighs no likelihood"):
        Objective().likelihood_weight(rows_of(*recorded()))
