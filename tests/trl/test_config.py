"""The `hapo` block of a TRL run: the same keys, defaults and errors as for verl. What TRL cannot do is refused."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed; it has an environment of its own, see the Makefile")
from transformers import HfArgumentParser

from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.trl import HapoGRPOConfig, HapoGRPOTrainer
from tests.trl.conftest import rows


def test_the_defaults_equal_verls_except_for_the_baseline(settings):
    ours, verls = HapoGRPOConfig(**settings()).parsed_hapo(), HapoConfig()
    assert ours.advantage.statistics == "on_policy"
    for name in ("gate", "budget", "injection", "loss", "objective", "success_threshold", "demonstration_key", "seed"):
        assert getattr(ours, name) == getattr(verls, name)


def test_the_block_comes_from_a_command_line_too(settings):
    block = '{"gate": {"name": "annealed", "power": 2.0}}'
    (args,) = HfArgumentParser(HapoGRPOConfig).parse_args_into_dataclasses(  # pyright: ignore[reportArgumentType]
        ["--hapo", block, "--bf16", "false", "--use_cpu", "true"]
    )
    assert (args.parsed_hapo().gate.name, args.parsed_hapo().gate.power) == ("annealed", 2.0)


@pytest.mark.parametrize(
    ("hapo", "said"),
    [
        (
            {"gate": {"threshold": 1.5}},
            "hapo.gate.threshold=1.5: a success rate lies in [0, 1]. Use 0.0 to switch injection off.",
        ),
        ({"gat": {}}, "hapo.gat: no such key. Did you mean hapo.gate?"),
        (
            {"injection": {"mode": "append"}},
            "hapo.injection.mode=append: TRL's groups have a fixed number of rows. "
            "Use hapo.injection.mode=replace, here with hapo.advantage.statistics=on_policy.",
        ),
        (
            {"demonstrations": {"source": "own"}},
            "hapo.demonstrations.source=own: TRL's trainer keeps no successes of the policy. "
            "Use hapo.demonstrations.source=column, or verl's trainer.",
        ),
        (
            {"rollouts": {"allocate": "posterior"}},
            "hapo.rollouts.allocate=posterior: TRL's groups have a fixed number of rows. "
            "Use hapo.rollouts.allocate=uniform, or verl's trainer.",
        ),
        (
            {"objective": {"name": "real"}},
            "hapo.objective.name=real: TRL's loss is PPO's surrogate. Use hapo.objective.name=surrogate, or verl's trainer.",
        ),
        (
            {"kernels": {"head": "policy_head"}},
            "hapo.kernels.head=policy_head: TRL computes log-probabilities with a head of its own. Use hapo.kernels.head=off.",
        ),
        ({"trace_dir": "traces"}, "hapo.trace_dir=traces: a key of verl's trainer only. Remove it."),
    ],
)
def test_a_block_that_cannot_work_is_refused_in_one_line(settings, hapo, said):
    with pytest.raises(ConfigError) as error:
        HapoGRPOConfig(hapo=hapo, **settings())
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("loss_type", "bnpo", "Use one of grpo, dr_grpo, dapo, cispo, sapo."),
        ("loss_type", "vespo", "Use one of grpo, dr_grpo, dapo, cispo, sapo."),
        ("loss_type", "luspo", "Use one of grpo, dr_grpo, dapo, cispo, sapo."),
        ("scale_rewards", "batch", "Use scale_rewards=group or none."),
        ("multi_objective_aggregation", "normalize_then_sum", "Use multi_objective_aggregation=sum_then_normalize."),
        ("remove_unused_columns", True, "Use remove_unused_columns=False."),
    ],
)
def test_settings_of_trl_that_cannot_work_are_refused_in_one_line(settings, key, value, fix):
    with pytest.raises(ConfigError) as error:
        HapoGRPOConfig(**settings(**{key: value}))
    assert str(error.value).startswith(f"{key}={value}: ")
    assert str(error.value).endswith(fix)
    assert "\n" not in str(error.value)


def test_trls_own_configuration_has_no_keys_of_ours(settings):
    from trl import GRPOConfig

    with pytest.raises(ConfigError, match=r"args=GRPOConfig: no keys of HAPO\. Use hapo_verl\.trl\.HapoGRPOConfig\."):
        HapoGRPOTrainer("nothing", args=GRPOConfig(**settings()))


def test_a_data_set_without_demonstrations_is_refused_unless_none_are_needed(trainer):
    bare = [{key: value for key, value in row.items() if key != "demonstration"} for row in rows()]
    with pytest.raises(ConfigError) as error:
        trainer(data=bare)
    assert str(error.value) == (
        "hapo.demonstration_key=demonstration: no such column in train_dataset (prompt, answer). "
        "Name the column with the worked solutions."
    )
    trainer({"gate": {"name": "never"}}, data=bare)


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_generation_that_is_not_trls_own_is_refused(trainer):
    with pytest.raises(ConfigError, match="rollout_func: a demonstration is one turn of text here"):
        trainer(rollout_func=lambda prompts, trainer: {})
