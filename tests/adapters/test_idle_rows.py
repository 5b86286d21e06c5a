"""Rows without a gradient, left out: the parameters are those of the whole batch, step for step."""

import pytest

from tests.adapters.idle_process import Setting, run

CUT = {"mini_batches": 2, "epochs": 2}
ALONE = [
    Setting(),
    Setting("paper"),
    Setting("luffy"),
    Setting("dapo"),
    Setting("grpo"),
    Setting(**CUT),
    Setting("luffy", **CUT),
    Setting(dynamic=False),
    Setting(dynamic=False, **CUT),
    Setting(head="policy_head"),
    Setting(head="policy_head", **CUT),
    Setting("paper", head="linear_logprob", mode="seq-mean-token-mean"),
    Setting(mode="seq-mean-token-sum", **CUT),
    Setting(mode="seq-mean-token-mean", **CUT),
    Setting(mode="seq-mean-token-sum-norm"),
    Setting(mode="token-sum"),
    Setting("real", mode="seq-mean-token-mean"),
    Setting("real", mode="seq-mean-token-mean", **CUT),
    Setting("srft"),
    Setting(optimizer="AdamW", idle_steps=(1, 2)),
]
PAIRED = [
    Setting(),
    Setting("paper", **CUT),
    Setting("luffy", dynamic=False, **CUT),
    Setting("dapo", **CUT),
    Setting(head="policy_head"),
    Setting(mode="seq-mean-token-mean", **CUT),
    Setting(mode="seq-mean-token-sum"),
    Setting("real", mode="seq-mean-token-mean", **CUT),
    Setting(optimizer="AdamW", idle_steps=(1, 2)),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(ALONE, 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    return run(PAIRED, 2, tmp_path_factory.mktemp("paired"))


def largest(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def assert_same_steps(setting, sides):
    whole, left_out = sides["whole"], sides["left out"]
    # AdamW divides a gradient near 0 by its own size, and what rounding made of it too.
    rounding = 2e-5 if setting.optimizer == "AdamW" else 1e-6
    assert largest(whole.parameters[0], whole.parameters[-1]) > 1e-2
    for ours, theirs in zip(left_out.parameters, whole.parameters, strict=True):
        assert largest(ours, theirs) < rounding


@pytest.mark.parametrize("setting", ALONE, ids=str)
def test_five_steps_end_at_the_parameters_of_the_whole_batch(alone, setting):
    assert_same_steps(setting, alone[setting])


@pytest.mark.parametrize("setting", PAIRED, ids=str)
def test_on_two_ranks_they_are_too(paired, setting):
    assert_same_steps(setting, paired[setting])
