"""Any value under any key is either accepted and meaningful, or refused with one line that names the key as typed."""

import dataclasses
import math
import random
from functools import cache

import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hapo_verl.algo.gate import Situation, confidence, fires, firing_probabilities
from hapo_verl.algo.objectives import Rows, objectives
from hapo_verl.algo.policy_loss import Aggregation, Clip, DemonstrationShape, hapo_policy_loss
from hapo_verl.config import GATES, ConfigError, HapoConfig
from hapo_verl.driver.gatekeeper import Gatekeeper
from hapo_verl.launch.checks import check_configuration
from hapo_verl.launch.sizes import _COUNTS, _COUNTS_OR_NULL, check_sizes
from tests import composed
from tests.fuzz.campaign import campaign, is_one_line, values


def keys(cls, path=""):
    """Every key of the block, of every gate and every objective."""
    for field in dataclasses.fields(cls):
        name = f"{path}{field.name}"
        if field.name in ("gate", "objective"):
            choices = GATES if field.name == "gate" else objectives()
            yield name, None
            for choice in choices.values():
                for own in dataclasses.fields(choice):
                    yield f"{name}.{own.name}", choice.name
        elif dataclasses.is_dataclass(field.default_factory):
            yield name, None
            yield from keys(field.default_factory, f"{name}.")
        else:
            yield name, None


KEYS = sorted({*keys(HapoConfig)}, key=str)
numbers = st.one_of(st.integers(-3, 3), st.floats(-2, 2), st.floats(min_value=0, allow_nan=False))


def block_with(key, value, choice):
    block, (*parents, last) = {}, key.split(".")
    inner = block
    for parent in parents:
        inner = inner.setdefault(parent, {})
    if choice is not None:
        inner["name"] = choice
    inner[last] = value
    return block


def assert_meaningful(hapo):
    """Check that everything computed from an accepted configuration is finite and in its range."""
    rng = random.Random(0)
    keeper = Gatekeeper(hapo, total_steps=10)
    for step in (1, 2, 10, 11):
        assert 0 <= keeper.threshold(step) <= 1
        columns = {"raw_prompt": ["1?"], "extra_info": [{"index": 1}]}
        (given,) = keeper.situations(columns, step, prompt_column="prompt")
        # Nothing is remembered about this prompt, because the gate has not observed it.
        assert (given.pop("key") is None) != hapo.demonstrations.remembers
        assert given.pop("own", b"") == b""
        situation = Situation(**given)
        probabilities = firing_probabilities(hapo.gate.name, 8, situation)
        assert len(probabilities) == 9
        assert all(0 <= probability <= 1 for probability in probabilities)
        fires(probabilities, 4, rng)
        c = confidence(4, 8, prior_success=situation.prior_success, prior_failure=situation.prior_failure)
        assert 0 <= c <= 1
    least, most = hapo.rollouts.bounds(8)
    assert least >= 2
    assert most >= 2
    policy = torch.tensor([[-1.0, -2.0], [-0.5, -30.0]], requires_grad=True)
    result = hapo_policy_loss(
        policy,
        policy.detach() - 0.1,
        torch.tensor([1.0, -1.0]),
        torch.ones(2, 2),
        torch.tensor([True, False]),
        shape=DemonstrationShape(hapo.loss.shape, hapo.loss.shaping, hapo.loss.exponent),
        clip=Clip(0.2, 0.2, 3.0),
        aggregation=Aggregation("token-mean"),
    )
    result.loss.backward()
    assert policy.grad.isfinite().all()
    if hapo.objective.weighs_likelihood:
        one = torch.tensor([1.0, 0.0], dtype=torch.float64)
        rows = Rows(one, torch.zeros(2, dtype=torch.int64), one > 2, one.long() + 3, -one, one, batch_size=2, groups=1)
        assert hapo.objective.likelihood_weight(rows).isfinite().all()
    for seconds in (hapo.poll_interval, hapo.watch_interval, hapo.stall_report, hapo.stall_limit, hapo.reward_timeout):
        assert seconds is None or (seconds > 0 and math.isfinite(float(seconds)))
    assert math.isfinite(float(hapo.success_threshold))
    assert isinstance(hapo.seed, int)


@campaign
@given(key=st.sampled_from(KEYS), value=st.one_of(numbers, values))
def test_any_value_of_our_keys_is_meaningful_or_refused_with_the_key(key, value):
    name, choice = key
    try:
        hapo = HapoConfig.parse(block_with(name, value, choice))
    except ConfigError as error:
        assert is_one_line(error)
        assert f"hapo.{name}" in str(error) or str(error).startswith("hapo.")
        assert str(error).startswith(f"hapo.{name.split('.')[0]}")
    else:
        assert_meaningful(hapo)


# These keys are used together.
losses = st.fixed_dictionaries(
    {},
    optional={
        "shape": st.sampled_from(["power", "trsft", "chord"]),
        "shaping": st.one_of(st.floats(min_value=0), st.sampled_from([5e-324, 1e-300, 0.1, 1e300, math.inf])),
        "exponent": st.floats(0, 1),
        "clip": st.booleans(),
    },
)


@campaign
@given(loss=losses)
def test_any_combination_of_loss_keys_works_or_is_refused_in_one_line(loss):
    try:
        hapo = HapoConfig.parse({"loss": loss})
    except ConfigError as error:
        assert is_one_line(error)
        assert str(error).startswith("hapo.loss.")
    else:
        assert_meaningful(hapo)


@campaign
@given(block=values)
def test_any_block_is_meaningful_or_refused_in_one_line(block):
    try:
        hapo = HapoConfig.parse(block)
    except ConfigError as error:
        assert is_one_line(error)
        assert str(error).startswith("hapo")
    else:
        assert_meaningful(hapo)


VERLS = [
    *_COUNTS,
    *_COUNTS_OR_NULL,
    "trainer.v1.trainer_mode",
    "algorithm.adv_estimator",
    "algorithm.use_kl_in_reward",
    "actor_rollout_ref.actor.strategy",
    "actor_rollout_ref.actor.use_dynamic_bsz",
    "actor_rollout_ref.actor.loss_agg_mode",
    "actor_rollout_ref.actor.policy_loss.loss_mode",
    "actor_rollout_ref.hybrid_engine",
    "actor_rollout_ref.rollout.nnodes",
    "actor_rollout_ref.rollout.n_gpus_per_node",
    "actor_rollout_ref.rollout.checkpoint_engine.backend",
    "actor_rollout_ref.actor.shuffle",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz",
    "algorithm.rollout_correction.rollout_is",
    "trainer.v1.separate_async.parameter_sync_step",
    "trainer.device",
    "critic.enable",
    "reward.reward_model.enable",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    "hapo",
    *(f"hapo.{name}" for name, _ in KEYS),
]


@cache
def launch():
    config = composed.launch(
        "+hapo=plus",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
    )
    OmegaConf.set_struct(config, False)
    check_configuration(config)
    check_sizes(config)
    return config


# Values that YAML can hold: no tuples, and integers of a usual size.
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.sampled_from([0, 1, 2, 3, 7, 8, 64, 255, 1024, "8", "hapo_sync", "hapo_separate_async", "fsdp2", "x", ""]),
    st.floats(),
    st.lists(st.integers(), max_size=2),
)


def nested(keys):
    """Whether a key lies below another key: it cannot be set if the other one is a list."""
    return any(key.startswith(f"{other}.") for key in keys for other in keys)


@campaign
@given(changes=st.dictionaries(st.sampled_from(VERLS), plain, min_size=1, max_size=2).filter(lambda c: not nested(c)))
def test_any_value_of_verls_keys_that_we_read_passes_or_is_refused_with_the_key(changes):
    config = launch()
    # Only the blocks that are changed are copied: to copy everything takes most of the time.
    before = {key.split(".")[0]: config[key.split(".")[0]].copy() for key in changes}
    try:
        for key, value in changes.items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        check_configuration(config)
        assert check_sizes(config)
    except ConfigError as error:
        assert is_one_line(error)
        assert str(error).partition("=")[0].partition(":")[0].split(".")[0] in (
            "hapo",
            "reward",
            "critic",
            "data",
            "trainer",
            "algorithm",
            "actor_rollout_ref",
        )
    finally:
        for block, value in before.items():
            config[block] = value
