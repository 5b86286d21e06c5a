"""The loss in verl's actor compared with verl's own, on micro-batches in the form that verl's engine passes."""

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.ppo.v1.utils import MetricsAggregator
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import Metric, reduce_metrics
from verl.utils.py_functional import append_to_dict, rename_dict
from verl.workers.engine.utils import postprocess_batch_func
from verl.workers.utils.losses import ppo_loss

from hapo_verl.actor.loss import COUNT, TOKEN_SUM, demonstration_means, hapo_loss, token_means
from hapo_verl.config import HapoConfig
from tests.actor.engine_process import on_ranks

PROMPT, LENGTHS = 3, [4, 1, 6, 3, 5, 2, 6, 4]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def jagged(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def a_batch(demonstrations=(), *, rows=range(8), dp_size=1, extra=()):
    """Rows of a fixed batch of eight, as verl's engine passes a micro-batch to the loss."""
    generator = torch.Generator().manual_seed(0)
    columns = {"old_log_probs": [], "advantages": [], "ref_log_prob": [], "rollout_is_weights": [], "log_probs": []}
    for length in LENGTHS:
        draw = partial(torch.rand, generator=generator)
        columns["old_log_probs"].append(-3 * draw(length))
        columns["advantages"].append((draw(1) - 0.5).expand(length).clone())
        columns["ref_log_prob"].append(-3 * draw(length))
        columns["rollout_is_weights"].append(2 * draw(length))
        columns["log_probs"].append(-3 * draw(PROMPT + length))
    mask = [torch.ones(length, dtype=torch.int64) for length in LENGTHS]
    mask[2][3] = 0  # a tool token
    rows = list(rows)
    data = TensorDict(
        {
            "prompts": jagged([torch.ones(PROMPT, dtype=torch.int64) for _ in rows]),
            "responses": jagged([torch.ones(LENGTHS[i], dtype=torch.int64) for i in rows]),
            "response_mask": jagged([mask[i] for i in rows]),
            "old_log_probs": jagged([columns["old_log_probs"][i] for i in rows]),
            "advantages": jagged([columns["advantages"][i] for i in rows]),
            "hapo_demonstration": torch.tensor([i in demonstrations for i in rows]),
            **{name: jagged([columns[name][i] for i in rows]) for name in extra},
        },
        batch_size=len(rows),
    )
    tu.assign_non_tensor(data, dp_size=dp_size, batch_num_tokens=int(sum(m.sum() for m in mask)), global_batch_size=8)
    log_probs = jagged([columns["log_probs"][i] for i in rows]).requires_grad_()
    return data, log_probs


@pytest.fixture
def actor(launch):
    def build(*overrides):
        config = launch("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8", *overrides)
        return omega_conf_to_dataclass(config.actor_rollout_ref.actor)

    return build


def loss_and_gradient(loss_fn, data, log_probs, entropy=None):
    log_probs = log_probs.detach().clone().requires_grad_()
    output = {"log_probs": log_probs} | ({"entropy": entropy} if entropy is not None else {})
    loss, metrics = loss_fn(model_output=output, data=data)
    loss.backward()
    return loss.detach(), log_probs.grad.values(), metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", [(), ("rollout_is_weights",)])
def test_without_demonstrations_it_is_verls_loss_to_the_last_bit(actor, mode, extra):
    config = actor(f"actor_rollout_ref.actor.loss_agg_mode={mode}", "actor_rollout_ref.actor.loss_scale_factor=7")
    data, log_probs = a_batch(extra=extra)
    ours = loss_and_gradient(partial(hapo_loss, config=config, hapo=HapoConfig()), data, log_probs)
    verls = loss_and_gradient(partial(ppo_loss, config=config), data, log_probs)
    assert torch.equal(ours[0], verls[0])
    assert torch.equal(ours[1], verls[1])


def test_entropy_and_kl_terms_are_verls(actor):
    config = actor(
        "actor_rollout_ref.actor.entropy_coeff=0.01",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.kl_loss_coef=0.1",
    )
    data, log_probs = a_batch(extra=("ref_log_prob",))
    entropy = jagged([torch.rand(PROMPT + length) for length in LENGTHS])
    ours = loss_and_gradient(partial(hapo_loss, config=config, hapo=HapoConfig()), data, log_probs, entropy)
    verls = loss_and_gradient(partial(ppo_loss, config=config), data, log_probs, entropy)
    torch.testing.assert_close(ours[0], verls[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1], verls[1], rtol=1e-5, atol=1e-8)
    for name in ("actor/pg_loss", "actor/entropy_loss", "kl_loss"):
        assert ours[2][name].aggregate() == pytest.approx(verls[2][name].aggregate(), rel=1e-6)


def test_a_demonstration_is_shaped_without_its_old_log_probs_and_weights(actor):
    config = actor()
    data, log_probs = a_batch(demonstrations=[1], rows=[1], extra=("rollout_is_weights",))
    data["old_log_probs"] = torch.full_like(data["old_log_probs"], float("nan"))
    loss, gradient, _ = loss_and_gradient(partial(hapo_loss, config=config, hapo=HapoConfig()), data, log_probs)
    # Row 1 has one token, predicted from the last prompt position.
    probability = log_probs.values()[PROMPT - 1].exp().item()
    advantage, tokens = data["advantages"].values()[0].item(), data["batch_num_tokens"]
    assert loss.item() == pytest.approx(-advantage * probability / (probability + 0.1) / tokens, rel=1e-5)
    slope = 0.1 * probability / (probability + 0.1) ** 2
    assert gradient[PROMPT - 1].item() == pytest.approx(-advantage * slope / tokens, rel=1e-5)
    assert gradient.count_nonzero() == 1


def test_tool_tokens_of_a_demonstration_are_not_in_the_loss(actor):
    config = actor("actor_rollout_ref.actor.entropy_coeff=0.01", "actor_rollout_ref.actor.use_kl_loss=True")
    data, log_probs = a_batch(demonstrations=[2], rows=[2], extra=("ref_log_prob",))
    entropy = jagged([torch.rand(PROMPT + LENGTHS[2], generator=torch.Generator().manual_seed(1))])
    loss_fn = partial(hapo_loss, config=config, hapo=HapoConfig())
    loss, gradient, metrics = loss_and_gradient(loss_fn, data, log_probs, entropy)
    own = torch.tensor([0, 1, 2, 4, 5])
    assert gradient.nonzero().flatten().tolist() == (PROMPT - 1 + own).tolist()
    # Row 2's own tokens, each predicted one position earlier.
    probability = log_probs.values().exp()[PROMPT - 1 + own]
    advantage, tokens = data["advantages"].values()[0].item(), data["batch_num_tokens"]
    shaped = -advantage * (probability / (probability + 0.1)).sum() / tokens
    assert metrics["hapo/loss/demonstration"].aggregate() == pytest.approx(shaped.item(), rel=1e-5)
    reduced = {
        "actor/" + name if name.startswith(TOKEN_SUM) else name: m.aggregate()
        for name, m in metrics.items()
        if hasattr(m, "aggregate")
    }
    assert token_means(reduced)["hapo/demonstration/probability"] == pytest.approx(probability.mean().item(), rel=1e-5)

    changed = data.clone(), log_probs.detach().clone()
    for column, position in (
        (changed[1], PROMPT - 1 + 3),
        *((changed[0][n], 3) for n in ("old_log_probs", "ref_log_prob")),
    ):
        column.values()[position] = -40.0
    assert torch.equal(loss_and_gradient(loss_fn, *changed, entropy)[0], loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [[range(4), range(4, 8)], [[0], [1], range(2, 8)], [[7, 2, 5], [0, 6, 1, 3, 4]]])
def test_micro_batches_and_the_order_of_rows_do_not_matter(actor, mode, cut):
    config = actor(f"actor_rollout_ref.actor.loss_agg_mode={mode}", "actor_rollout_ref.actor.loss_scale_factor=7")
    loss_fn = partial(hapo_loss, config=config, hapo=HapoConfig())
    whole = loss_and_gradient(loss_fn, *a_batch(demonstrations=[1, 6]))
    parts = [loss_and_gradient(loss_fn, *a_batch(demonstrations=[1, 6], rows=rows)) for rows in cut]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0], rtol=1e-5, atol=1e-7)

    starts = torch.tensor([0, *LENGTHS]).cumsum(0) + PROMPT * torch.arange(9)
    order = [i for rows in cut for i in rows]
    gathered = torch.cat([whole[1][starts[i] : starts[i + 1]] for i in order])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gathered, rtol=1e-5, atol=1e-8)


def test_token_means_are_over_the_policys_own_tokens(actor):
    data, log_probs = a_batch(demonstrations=[1])
    _, _, metrics = loss_and_gradient(partial(hapo_loss, config=actor(), hapo=HapoConfig()), data, log_probs)
    reduced = {"actor/" + name if name.startswith(TOKEN_SUM) else name: m.aggregate() for name, m in metrics.items()}
    means = token_means(reduced)
    kl = sum((old - new[PROMPT - 1 : -1]).sum() for i, (old, new) in rows_of(data, log_probs) if i not in (1, 2))
    old, new = dict(rows_of(data, log_probs))[2]
    kl += (old - new[PROMPT - 1 : -1])[[0, 1, 2, 4, 5]].sum()
    assert means["actor/ppo_kl"] == pytest.approx(kl.item() / (sum(LENGTHS) - 1 - 1), rel=1e-5)
    assert means["hapo/demonstration/probability"] == pytest.approx(log_probs[1][PROMPT - 1].exp().item(), rel=1e-5)
    assert not any(TOKEN_SUM in name for name in reduced)


@pytest.mark.parametrize("whole", [{}, {"whole_on_policy_tokens": 9.0}])
@pytest.mark.parametrize("tokens", [0.0, 4.0])
def test_without_a_demonstration_its_tokens_have_no_mean_probability(whole, tokens):
    sums = {"on_policy_tokens": 5.0, "teacher_tokens": tokens, "teacher_probability_sum": tokens / 2} | whole
    sums |= dict.fromkeys(("clipped_tokens", "dual_clipped_tokens", "log_ratio_sum"), 0.0)
    means = token_means({f"actor/{TOKEN_SUM}{name}": value for name, value in sums.items()})
    assert [value for name, value in means.items() if "probability" in name] == ([0.5] if tokens else [])


def as_the_trainer_sees_it(mini_batches, data):
    """Combine the actor's metrics with verl's own functions; mini_batches[number][rank] is a list of micro-batches'."""
    metrics = {}
    for ranks in mini_batches:
        of_ranks = [postprocess_batch_func([{"metrics": m} for m in parts], None, data)["metrics"] for parts in ranks]
        append_to_dict(metrics, {name: Metric.aggregate_dp([of[name] for of in of_ranks]) for name in of_ranks[0]})
    return reduce_metrics(rename_dict(metrics, "actor/"))


def test_demonstration_metrics_do_not_depend_on_how_verl_splits_and_averages(actor):
    demonstrations = [0, 1, 2, 4, 5, 7]
    loss_fn = partial(hapo_loss, config=actor(), hapo=HapoConfig())

    def metrics_of(*rows):
        data, log_probs = a_batch(demonstrations=demonstrations, rows=rows)
        # Probabilities go down to e^-12.
        return loss_fn(model_output={"log_probs": 4 * log_probs}, data=data)[1]

    data, log_probs = a_batch(demonstrations=demonstrations)
    seen = as_the_trainer_sees_it(
        [[[metrics_of(0), metrics_of(1)], [metrics_of(2), metrics_of(3)]], [[metrics_of(4, 5)], [metrics_of(7, 6)]]],
        data,
    )
    cut, whole = (
        demonstration_means(seen),
        demonstration_means(as_the_trainer_sees_it([[[metrics_of(*range(8))]]], data)),
    )
    assert cut == pytest.approx(whole)
    assert not any(COUNT in name for name in seen)

    own = {i: [t for t in range(LENGTHS[i]) if (i, t) != (2, 3)] for i in demonstrations}
    logp = {i: 4 * log_probs.detach()[i][PROMPT - 1 : -1][own[i]] for i in demonstrations}
    # The paper's weight is below a hundredth of its largest value, 1/4.
    untaught = {i: (0.1 * row.exp() / (row.exp() + 0.1) ** 2 < 0.0025) & (row < -2.4) for i, row in logp.items()}
    tokens = sum(len(row) for row in logp.values())
    assert 0 < cut["hapo/demonstration/with_untaught_token"] < 1
    assert cut["hapo/demonstration/untaught_tokens"] == pytest.approx(
        sum(int(u.sum()) for u in untaught.values()) / tokens
    )
    assert cut["hapo/demonstration/with_untaught_token"] == pytest.approx(
        sum(bool(u.any()) for u in untaught.values()) / 6
    )
    least = torch.stack([row.min() for row in logp.values()]) / math.log(10)
    # The median of six values lies between the third and the fourth.
    third, fourth = least.sort().values[2:4].tolist()
    assert third - 0.25 <= math.log10(cut["hapo/demonstration/least_probability_median"]) <= fourth + 0.25
    assert math.log10(cut["hapo/demonstration/least_probability_q05"]) == pytest.approx(least.min().item(), abs=0.25)


def test_a_loss_that_is_a_logarithm_or_a_likelihood_teaches_every_token(actor):
    for block in ({"loss": {"exponent": 0.0}}, {"objective": {"name": "srft"}}):
        data, log_probs = a_batch(demonstrations=[1])
        data["hapo_likelihood_weight"] = torch.ones(8)
        loss_fn = partial(hapo_loss, config=actor(), hapo=HapoConfig.parse(block))
        metrics = loss_fn(model_output={"log_probs": 30 * log_probs}, data=data)[1]
        found = demonstration_means(as_the_trainer_sees_it([[[metrics]]], data))
        assert (found["hapo/demonstration/untaught_tokens"], found["hapo/demonstration/with_untaught_token"]) == (0, 0)
        assert found["hapo/demonstration/least_probability_median"] < 1e-6


def test_a_step_without_demonstrations_has_no_metrics_of_them(actor):
    data, log_probs = a_batch()
    metrics = hapo_loss(config=actor(), hapo=HapoConfig(), model_output={"log_probs": log_probs}, data=data)[1]
    assert demonstration_means(as_the_trainer_sees_it([[[metrics]]], data)) == {}


def test_verl_averages_demonstration_metrics_over_the_updates_of_a_step(actor):
    data, log_probs = a_batch(demonstrations=[1])
    metrics = hapo_loss(config=actor(), hapo=HapoConfig(), model_output={"log_probs": log_probs}, data=data)[1]
    names = demonstration_means(as_the_trainer_sees_it([[[metrics]]], data))
    assert {MetricsAggregator()._get_aggregation_type(name) for name in names} == {"weighted_avg"}


def rows_of(data, log_probs):
    return list(enumerate(zip(data["old_log_probs"], log_probs.detach(), strict=True)))


def test_a_batch_from_another_agent_loop_is_refused(actor):
    data, log_probs = a_batch()
    del data["hapo_demonstration"]
    with pytest.raises(RuntimeError, match="hapo_demonstration: a row of the batch lacks this field"):
        hapo_loss(config=actor(), hapo=HapoConfig(), model_output={"log_probs": log_probs}, data=data)


def _of_rank(config, folder):
    rows = [[0, 1, 2, 3], [4, 5, 6, 7]][torch.distributed.get_rank()]
    data, log_probs = a_batch(demonstrations=[1, 3], rows=rows, dp_size=2)
    scale = torch.tensor(1.0, requires_grad=True)
    loss, _ = hapo_loss(
        config=config, hapo=HapoConfig(), model_output={"log_probs": log_probs.detach() * scale}, data=data
    )
    loss.backward()
    # Data parallelism averages gradients over ranks.
    for value in (scale.grad, loss := loss.detach()):
        torch.distributed.all_reduce(value)
    return loss.item() / 2, scale.grad.item() / 2


def test_two_ranks_over_gloo_give_the_loss_and_gradient_of_one_rank(actor, tmp_path):
    config = actor()
    results = on_ranks(_of_rank, [config], 2, tmp_path)
    data, log_probs = a_batch(demonstrations=[1, 3])
    scale = torch.tensor(1.0, requires_grad=True)
    loss, _ = hapo_loss(
        config=config, hapo=HapoConfig(), model_output={"log_probs": log_probs.detach() * scale}, data=data
    )
    loss.backward()
    for rank in range(2):
        assert results[rank][0] == pytest.approx((loss.item(), scale.grad.item()), rel=1e-5)
