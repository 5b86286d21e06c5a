"""REAL and SRFT in verl's engine: the formula's gradient in fp64, for any division into micro-batches, ranks and padding.

A rollout and a demonstration contain tool tokens; these are in no mean and have no gradient.
"""

import pytest
import torch

from tests.actor.objective_process import DEMONSTRATIONS, SCORES, UIDS, Step, mask_of, model, rows, run

MIXED = (5, 0, 7, 3, 2, 6, 1, 4)
ALONE = [Step(name, micro_batch=size) for name in ("real", "srft") for size in (1, 8)]
ALONE += [Step("real", packed=False), Step("srft", order=MIXED, padding=2)]
ALONE += [Step("real", head="linear_logprob"), Step("srft", head="linear_logprob")]
ALONE += [Step("real", dynamic=True), Step("srft", dynamic=True)]
PAIRED = [Step(name, order=order) for name in ("real", "srft") for order in (tuple(range(8)), MIXED)]
PAIRED += [
    Step("real", order=MIXED, dynamic=True),
    Step("real", order=MIXED, padding=4),
    Step("srft", order=MIXED, padding=4),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(ALONE, 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    return run(PAIRED, 2, tmp_path_factory.mktemp("paired"))


def formula_of_real(folder):
    policy, logps, _ = model(folder)
    olds = [old.double()[mask_of(row).bool()] for row, old in enumerate(rows()[1])]
    s = [(logp - old).mean() for logp, old in zip(logps, olds, strict=True)]
    total = 0.0
    for uid in "ab":  # all of c's rows fail
        of_group = [i for i in range(8) if UIDS[i] == uid]
        total = total + torch.log(1 + sum(torch.exp(-s[i] / 0.5) for i in of_group if SCORES[i] == 1))
        total = total + torch.log(1 + sum(torch.exp(s[i] / 0.5) for i in of_group if SCORES[i] == 0))
    return policy, total / 3


def formula_of_srft(folder):
    policy, logps, entropies = model(folder)
    entropy = torch.cat(entropies).mean().detach()
    total = 0.0
    for i in range(8):
        probability = logps[i].exp()
        if DEMONSTRATIONS[i]:
            total = total - (0.5 * torch.exp(-entropy) * logps[i] + probability / (probability + 0.1)).sum()
        else:
            total = total - ((0.1 * torch.exp(entropy) if SCORES[i] else -1) * logps[i]).sum()
    return policy, total / sum(map(len, logps))


FORMULAS = {"real": formula_of_real, "srft": formula_of_srft}


def assert_gradient_of_the_formula(result, name):
    policy, loss = FORMULAS[name](result["folder"])
    loss.backward()
    expected = {parameter: value.grad for parameter, value in policy.named_parameters()}
    assert set(result["gradients"]) == set(expected)
    for parameter, gradient in result["gradients"].items():
        bound = 1e-5 * float(expected[parameter].abs().max()) + 1e-7
        torch.testing.assert_close(gradient.double(), expected[parameter], rtol=1e-4, atol=bound, msg=parameter)
    return loss.item()


@pytest.mark.parametrize("step", ALONE, ids=str)
def test_an_optimizer_step_follows_the_formula(alone, step):
    loss = assert_gradient_of_the_formula(alone[step][0], step.objective)
    if step.objective == "real":
        assert alone[step][0]["metrics"]["hapo/loss/real"] == pytest.approx(
            [loss] * len(alone[step][0]["metrics"]["hapo/loss/real"]), rel=1e-5
        )


@pytest.mark.parametrize("step", PAIRED, ids=str)
def test_on_two_ranks_it_follows_the_formula(paired, step):
    for rank in range(2):
        assert_gradient_of_the_formula(paired[step][rank], step.objective)


def test_padding_has_weight_zero(paired):
    weights = torch.cat([rank["weights"] for rank in paired[Step("real", order=MIXED, padding=4)]])
    assert weights[8:].tolist() == [0.0] * 4
    assert bool(weights[:2].any())
