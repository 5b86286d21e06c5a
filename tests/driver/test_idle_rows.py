"""Steps without the rows that have no gradient, compared with steps with all rows, in verl's driver, worker and engine.

The optimizer is plain SGD unless a test says otherwise. A left-out row only removes zeros from sums, so results differ
only by the order of summation.
"""

import pytest

from tests.driver.step_process import PROMPTS, ROLLOUTS, STEPS, UNEVEN, Run, run

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
_ACTOR = "actor_rollout_ref.actor"
FIXED = (
    f"{_ACTOR}.use_dynamic_bsz=false",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=false",
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
)
TWICE = f"{_ACTOR}.ppo_mini_batch_size=4", f"{_ACTOR}.ppo_epochs=2"


def plus(*overrides, **settings):
    return Run(("+hapo=plus", *overrides), "append", **settings)


def paper(*overrides, **settings):
    return Run(("+hapo=paper", *overrides), "replace", **settings)


def luffy(*overrides, **settings):
    # LUFFY's aggregation divides by the run's response length, 8,192 tokens by default.
    return Run(("+hapo=luffy", f"{_ACTOR}.loss_scale_factor=2", *overrides), "always", **settings)


def dapo(*overrides, **settings):
    return Run(("+hapo=dapo", *overrides), **settings)


def real(*overrides, **settings):
    return Run(("+hapo=real_ssi", *overrides), "replace", **settings)


HEAD = "hapo.kernels.head=policy_head", "hapo.kernels.policy_loss=reference"
# Steps in which nothing has a gradient: weight decay and moments move the parameters there too.
SILENT = {"optimizer": "AdamW", "silent": (1, 2)}
# `make test` runs the most different settings, `make test-long` all other combinations; a run takes 3 to 5 s.
ALONE = [
    plus(f"{_ACTOR}.loss_agg_mode=token-mean"),
    plus(*TWICE),
    paper(*TWICE, f"{_ACTOR}.loss_agg_mode=seq-mean-token-mean"),
    plus(*HEAD),
    luffy(*TWICE),
    dapo(),
    real(),
    plus(**SILENT),
    plus(*TWICE, sizes=UNEVEN),
]
MORE_ALONE = [
    paper(f"{_ACTOR}.loss_agg_mode=seq-mean-token-sum"),
    plus(*FIXED),
    real(*TWICE, sizes=UNEVEN),
    *(plus(f"{_ACTOR}.loss_agg_mode={mode}") for mode in MODES[1:]),
    *(paper(f"{_ACTOR}.loss_agg_mode={mode}") for mode in MODES[:2]),
    paper(*TWICE, *FIXED),
    plus(*HEAD, *TWICE),
    plus("hapo.kernels.head=linear_logprob"),
    plus(f"{_ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", f"{_ACTOR}.loss_scale_factor=7"),
    real(*TWICE),
]
PAIRED = [plus()]
MORE_PAIRED = [
    paper(*TWICE, *FIXED, f"{_ACTOR}.loss_agg_mode=seq-mean-token-mean"),
    real(*TWICE),
    plus(**SILENT),
    plus(*HEAD),
    paper(*TWICE),
    luffy(*FIXED),
    dapo(*TWICE),
]
GRPO = Run(("+hapo=grpo",)), Run((), trainer="verl")
UNEVEN_GRPO = tuple(one._replace(sizes=UNEVEN) for one in GRPO)


def with_whole(runs):
    return [one for pair in runs for one in (pair, pair.whole())]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run([*with_whole(ALONE), *GRPO, *UNEVEN_GRPO], 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def more_alone(tmp_path_factory):
    return run(with_whole(MORE_ALONE), 1, tmp_path_factory.mktemp("more_alone"))


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    return run(with_whole(PAIRED), 2, tmp_path_factory.mktemp("paired"))


@pytest.fixture(scope="module")
def more_paired(tmp_path_factory):
    return run(with_whole(MORE_PAIRED), 2, tmp_path_factory.mktemp("more_paired"))


def largest(ours, theirs):
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def assert_same_steps(one, ours, whole):
    """Check that parameters after every step, and metrics with the same name, are equal."""
    # Adam divides a gradient by its own size, which makes rounding errors larger.
    rounding = 1e-5 if one.optimizer == "AdamW" else 2e-6
    moved = largest(whole["parameters"][-1], whole["parameters"][0])
    assert moved > 5e-3
    for step in range(STEPS):
        assert largest(ours["parameters"][step], whole["parameters"][step]) < rounding * max(1, moved)
    for step in range(STEPS):
        ours_logged, whole_logged = ours["metrics"][step], whole["metrics"][step]
        for name in set(ours_logged) & set(whole_logged) - {"perf/mfu/actor", "actor/perf/cpu_memory_used_gb"}:
            assert ours_logged[name] == pytest.approx(whole_logged[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("one", ALONE, ids=str)
def test_the_parameters_equal_those_of_training_on_all_rows(alone, one):
    assert_same_steps(one, alone[one][0], alone[one.whole()][0])


@pytest.mark.long
@pytest.mark.parametrize("one", MORE_ALONE, ids=str)
def test_the_parameters_equal_those_of_training_on_all_rows_in_more_settings(more_alone, one):
    assert_same_steps(one, more_alone[one][0], more_alone[one.whole()][0])


@pytest.mark.parametrize("one", PAIRED, ids=str)
def test_the_parameters_are_equal_on_two_ranks(paired, one):
    for ours, whole in zip(paired[one], paired[one.whole()], strict=True):
        assert_same_steps(one, ours, whole)


@pytest.mark.long
@pytest.mark.parametrize("one", MORE_PAIRED, ids=str)
def test_the_parameters_are_equal_on_two_ranks_in_more_settings(more_paired, one):
    for ours, whole in zip(more_paired[one], more_paired[one.whole()], strict=True):
        assert_same_steps(one, ours, whole)


@pytest.mark.parametrize("pair", [GRPO, UNEVEN_GRPO], ids=["even groups", "uneven groups"])
def test_without_demonstrations_the_parameters_equal_verls_own_grpo(alone, pair):
    ours, verls = (alone[one][0] for one in pair)
    moved = largest(verls["parameters"][-1], verls["parameters"][0])
    assert moved > 5e-3
    for step in range(STEPS):
        assert largest(ours["parameters"][step], verls["parameters"][step]) < 2e-6 * max(1, moved)


def passes(result):
    """The numbers of rows in each pass for old log-probs, and in each update."""
    return [[len(keys) for kind, keys in result["calls"] if kind == which] for which in ("score", "train")]


@pytest.mark.parametrize("one", [plus(f"{_ACTOR}.loss_agg_mode=token-mean"), plus(*HEAD), dapo(), real()], ids=str)
def test_a_single_update_skips_old_log_probs_and_trains_only_rows_with_a_gradient(alone, one):
    (result,) = alone[one]
    scored, trained = passes(result)
    assert scored == []
    assert len(trained) == STEPS
    assert trained[-1] == len(result["moving"]) if one != real() else trained[-1] < PROMPTS * ROLLOUTS


def test_several_updates_share_one_old_log_prob_pass_over_the_same_rows(alone):
    (result,) = alone[plus(*TWICE)]
    scored, trained = passes(result)
    assert scored == trained
    assert max(trained) < PROMPTS * ROLLOUTS


@pytest.mark.parametrize("even", [plus(*TWICE), *GRPO], ids=str)
def test_groups_of_different_sizes_make_mini_batches_of_the_same_size(alone, even):
    (same,), (different,) = alone[even], alone[even._replace(sizes=UNEVEN)]
    rows = 40 if even == plus(*TWICE) else PROMPTS * ROLLOUTS
    for result in (same, different):
        assert [logged["rows"] for logged in result["metrics"]] == [rows] * STEPS


def test_an_optimizer_step_without_a_gradient_still_decays_weights(alone):
    (result,) = alone[plus(**SILENT)]
    assert result["metrics"][1]["actor/grad_norm"] == 0
    assert largest(result["parameters"][1], result["parameters"][0]) > 1e-6
