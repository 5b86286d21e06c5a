"""Untaught tokens: the bound is compared with the weights themselves, and the counts with counting by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_verl.algo.policy_loss import DemonstrationShape
from hapo_verl.algo.teachability import BINS_A_DECADE, COUNTED, COUNTS, count, describe, untaught_below

PAPER = DemonstrationShape("power", 0.1, 1.0)
SHAPES = st.one_of(
    st.builds(
        DemonstrationShape,
        st.just("power"),
        st.one_of(st.floats(1e-3, 1e3), st.just(math.inf)),
        st.one_of(st.floats(0.02, 1.0), st.just(0.0)),
    ),
    st.builds(DemonstrationShape, st.just("trsft"), st.floats(1e-3, 1.0), st.just(1.0)),
    st.just(DemonstrationShape("chord", 0.1, 1.0)),
)


@settings(max_examples=300)
@given(SHAPES, st.floats(1e-6, 50.0))
def test_the_bound_is_where_the_weight_is_a_hundredth_of_the_largest(shape, nats):
    bound, largest = untaught_below(shape), shape.largest_weight
    grid = torch.linspace(-60.0, 0.0, 6001, dtype=torch.float64)
    weights = shape.weight(grid)
    assert weights.max().item() == pytest.approx(largest, rel=1e-3)
    rising = grid <= grid[weights.argmax()]
    if bound == -math.inf:
        assert (weights[rising] >= 0.01 * largest).all()
        return
    above = min(bound + nats, grid[rising][-1].item())
    at, below, above = shape.weight(torch.tensor([bound, bound - nats, above], dtype=torch.float64)).tolist()
    assert at == pytest.approx(0.01 * largest, rel=1e-9)
    assert below < 0.01 * largest < above


def test_the_papers_loss_teaches_no_token_below_2_5e_4_and_its_logarithm_teaches_all():
    assert math.exp(untaught_below(PAPER)) == pytest.approx(2.5e-4, rel=0.01)
    assert untaught_below(DemonstrationShape("power", 0.1, 0.0)) == -math.inf
    # A token that the policy already writes counts as taught, even if its weight is a hundredth of the largest.
    assert untaught_below(DemonstrationShape("power", 0.001, 0.0)) == -math.inf


def counted(probabilities, mask, demonstrations, shape=PAPER):
    logp_BT = torch.tensor(probabilities).log()
    return count(logp_BT, torch.tensor(mask).bool(), torch.tensor(demonstrations), untaught_below=untaught_below(shape))


def test_tokens_and_demonstrations_are_counted_and_nothing_else():
    probabilities = [[0.5, 1e-7, 1e-5], [0.9, 0.8, 1e-9], [1e-8, 0.5, 0.5], [0.5, 0.5, 0.5]]
    # Row 3 is the policy's own, and row 4 has no trained token. The last token of row 2 is a tool token.
    counts = counted(probabilities, [[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], [True, True, False, True])
    assert counts[: len(COUNTS)].tolist() == [5, 2, 2, 1]
    found = describe(counts.tolist())
    assert (found["untaught_tokens"], found["with_untaught_token"]) == (2 / 5, 1 / 2)
    masked = torch.tensor(probabilities).log()
    masked[1, 2], masked[3] = float("nan"), float("inf")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    again = count(masked, mask, torch.tensor([True, True, False, True]), untaught_below=untaught_below(PAPER))
    assert torch.equal(again, counts)


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_of_added_parts_are_those_of_the_whole_to_within_a_bin(seed):
    generator = torch.Generator().manual_seed(seed)
    logp_BT = -25 * torch.rand(400, 30, generator=generator).pow(3)
    mask_BT, demonstration_B = torch.ones(400, 30).bool(), torch.rand(400, generator=generator) < 0.7
    parts = logp_BT.split([1, 7, 92, 300]), mask_BT.split([1, 7, 92, 300]), demonstration_B.split([1, 7, 92, 300])
    total = sum(count(*part, untaught_below=-8.0) for part in zip(*parts, strict=True))
    assert torch.equal(total, count(logp_BT, mask_BT, demonstration_B, untaught_below=-8.0))
    # verl averages over ranks and mini-batches, so any multiple of the counts must give the same result.
    found, again = describe(total.tolist()), describe((total / 6).tolist())
    assert found == pytest.approx(again)
    least_D = logp_BT.amin(1)[demonstration_B] / math.log(10)
    for name, share in (("least_probability_median", 0.5), ("least_probability_q05", 0.05)):
        exact = least_D.quantile(share).item()
        assert math.log10(found[name]) == pytest.approx(exact, abs=1.01 / BINS_A_DECADE), name


@pytest.mark.parametrize(
    ("least", "reported"), [(1.0, (10**-0.25, 1.0)), (1e-30, (1e-12, 1e-12)), (3e-7, (1e-7, 1e-6))]
)
def test_a_single_demonstration_is_reported_to_within_a_bin(least, reported):
    found = describe(counted([[1.0, least]], [[1, 1]], [True]).tolist())
    for name in ("least_probability_median", "least_probability_q05"):
        assert reported[0] * (1 - 1e-9) <= found[name] <= reported[1] * (1 + 1e-9)


def test_without_a_demonstration_there_are_no_metrics():
    counts = counted([[0.5, 0.5]], [[1, 1]], [False])
    assert counts.shape == (COUNTED,)
    assert not counts.any()
    assert describe(counts.tolist()) == {}
