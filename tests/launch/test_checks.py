"""A launch that cannot work stops at the start, with one line that names the key, the rule and the fix."""

import inspect
import re

import datasets
import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import PPOTrainerSeparateAsync

from hapo_verl.actor.head import choose_head, chosen_head, chosen_memory
from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.launch.checks import check_demonstrations, check_launch


def test_the_preset_passes(launch):
    assert check_launch(launch()) == HapoConfig()


def test_single_keys_stay_overridable(launch):
    assert check_launch(launch("hapo.gate.threshold=0.7")).gate.threshold == 0.7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "hapo.gate.threshold=1.5",
            "hapo.gate.threshold=1.5: a success rate lies in [0, 1]. Use 0.0 to switch injection off.",
        ),
        ("+hapo.gate.treshold=0.5", "hapo.gate.treshold: no such key. Did you mean hapo.gate.threshold?"),
        (
            "hapo.gate.prior_success=0",
            "hapo.gate.prior_success=0: a Beta prior needs a positive count. Use 1.0 for the uniform prior.",
        ),
        (
            "actor_rollout_ref.rollout.n=1",
            "actor_rollout_ref.rollout.n=1: a group needs at least 2 rollouts. Use actor_rollout_ref.rollout.n=8.",
        ),
        (
            "trainer.v1.trainer_mode=sync",
            "trainer.v1.trainer_mode=sync: not a HAPO trainer. "
            "Use one of hapo_sync, hapo_colocate_async, hapo_separate_async.",
        ),
        (
            "algorithm.adv_estimator=grpo",
            "algorithm.adv_estimator=grpo: a HAPO trainer computes HAPO's advantages. Use algorithm.adv_estimator=hapo.",
        ),
        (
            "algorithm.use_kl_in_reward=True",
            "algorithm.use_kl_in_reward=True: a demonstration has no KL to the policy that sampled it. "
            "Use algorithm.use_kl_in_reward=false and actor_rollout_ref.actor.use_kl_loss=true.",
        ),
        (
            "algorithm.rollout_correction.bypass_mode=True",
            "algorithm.rollout_correction.bypass_mode=True: a demonstration has no rollout log-probs to take for old "
            "ones. Use algorithm.rollout_correction.bypass_mode=false.",
        ),
        (
            "critic.enable=True",
            "critic.enable=True: HAPO's advantages are group-relative and train no critic. Use critic.enable=false.",
        ),
        (
            "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
            "actor_rollout_ref.actor.policy_loss.loss_mode=gspo: HAPO brings its own loss, whose on-policy part is "
            "vanilla. Use actor_rollout_ref.actor.policy_loss.loss_mode=vanilla.",
        ),
        (
            "distillation.enabled=True",
            "distillation.enabled=True: distillation replaces the policy loss that HAPO needs. Use distillation.enabled=false.",
        ),
        (
            "actor_rollout_ref.rollout.enable_rollout_routing_replay=True",
            "actor_rollout_ref.rollout.enable_rollout_routing_replay=True: a demonstration was not routed by the rollout "
            "engine, so its experts cannot be replayed. Use actor_rollout_ref.rollout.enable_rollout_routing_replay=false.",
        ),
        (
            "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null",
            "actor_rollout_ref.rollout.agent.agent_loop_manager_class=None: this agent loop injects no demonstrations. "
            "Use hapo_verl.rollout.worker.HapoAgentLoopManager or a subclass of it.",
        ),
        (
            "reward.reward_model.enable=True",
            "reward.reward_model.enable_resource_pool=False: a reward model on the trainer's devices scores after the "
            "groups are closed, too late for the gate. Use reward.reward_model.enable_resource_pool=True.",
        ),
    ],
)
def test_each_setting_that_cannot_work_gets_its_own_line(launch, override, message):
    with pytest.raises(ConfigError) as error:
        check_launch(launch(override))
    assert str(error.value) == message


def test_rollouts_only_on_their_own_devices_are_refused_while_verl_fails_there(launch):
    separate = "trainer.v1.trainer_mode=hapo_separate_async"
    with pytest.raises(ConfigError) as error:
        check_launch(launch(separate, "actor_rollout_ref.hybrid_engine=False"))
    assert str(error.value) == (
        "actor_rollout_ref.hybrid_engine=False: verl 0.9.1 ends with a TypeError where it logs this mode. "
        "Use actor_rollout_ref.hybrid_engine=true."
    )
    check_launch(launch(separate))
    check_launch(launch("actor_rollout_ref.hybrid_engine=False"))
    # This line of verl fails, because a logger accepts no `flush`.
    source = inspect.getsource(PPOTrainerSeparateAsync._setup)
    (call,) = re.findall(r"logger\.info\([^()]*hybrid replicas disabled.*?\n            \)", source, re.DOTALL)
    assert "flush=True" in call


def test_a_preset_name_parsed_as_a_plain_string_is_refused(launch):
    config = launch()
    OmegaConf.set_struct(config, False)
    config.hapo = "paper"
    with pytest.raises(ConfigError) as error:
        check_launch(config)
    assert str(error.value) == "hapo='paper': the block of HAPO's keys is missing. Launch with +hapo=paper."


class CharTokenizer:
    """A tokenizer with one token per character; `$` ends a sequence."""

    eos_token_id = ord("$")
    all_special_ids, added_tokens_decoder = (eos_token_id,), {}

    def encode(self, text, add_special_tokens):
        return [ord(char) for char in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        return "".join(f"{m['role']}:{m['content']}$" for m in messages) + (
            "assistant:" if add_generation_prompt else ""
        )


def check_rows(config, demonstrations):
    rows = {"prompt": ["1"] * len(demonstrations)}
    if demonstrations:
        rows["demonstration"] = demonstrations
    check_demonstrations(datasets.Dataset.from_dict(rows), CharTokenizer(), config, HapoConfig())


def test_data_without_the_column_is_refused_and_its_columns_are_named(launch):
    dataset = datasets.Dataset.from_dict({"prompt": ["1"], "data_source": ["x"]})
    with pytest.raises(ConfigError) as error:
        check_demonstrations(dataset, CharTokenizer(), launch(), HapoConfig())
    assert str(error.value) == (
        "hapo.demonstration_key=demonstration: data.train_files has no such column (it has data_source, prompt). "
        "Add one with a worked solution a row, name yours, or use hapo.demonstrations.source=own."
    )


def test_own_demonstrations_need_no_column(launch):
    dataset = datasets.Dataset.from_dict({"prompt": ["1"], "data_source": ["x"]})
    own = HapoConfig.parse({"demonstrations": {"source": "own"}})
    check_demonstrations(dataset, CharTokenizer(), launch(), own)
    both = HapoConfig.parse({"demonstrations": {"source": "column_or_own"}})
    with pytest.raises(ConfigError, match="has no such column"):
        check_demonstrations(dataset, CharTokenizer(), launch(), both)


def test_data_without_a_usable_demonstration_is_refused_with_the_reasons(launch):
    with pytest.raises(ConfigError) as error:
        check_rows(launch("data.max_response_length=4"), ["four", "fourty", "", None])
    assert str(error.value) == (
        "hapo.demonstration_key=demonstration: none of 4 demonstrations looked at can be injected "
        "(2 overlong, 1 empty, 1 missing). Fill the column; they must fit data.max_response_length=4 with their end of "
        "sequence."
    )


def test_one_usable_demonstration_is_enough(launch):
    check_rows(launch("data.max_response_length=4"), ["four", "one"])


def test_demonstrations_that_answer_inside_a_thought_are_refused_with_the_fix(launch):
    class Thinking(CharTokenizer):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
            chat = super().apply_chat_template(messages, tokenize, add_generation_prompt)
            return chat + ("<think>\n" if add_generation_prompt else "")

    dataset = datasets.Dataset.from_dict({"demonstration": ["4", "<think>4", "4</think>4"]})
    check_demonstrations(dataset, Thinking(), launch(), HapoConfig())
    with pytest.raises(ConfigError) as error:
        check_demonstrations(dataset.select([0, 1]), Thinking(), launch(), HapoConfig())
    assert str(error.value) == (
        "hapo.demonstration_key=demonstration: none of 2 demonstrations looked at can be injected (2 thought). Fill the "
        "column; they must fit data.max_response_length=512 with their end of sequence. Where the chat template opens a "
        "thought, a demonstration has to close it (</think>) in front of its answer, and where the template closes one, "
        "to have none: data.apply_chat_template_kwargs.enable_thinking, where the template knows it, says which."
    )


CALLED = [
    {"role": "assistant", "content": "a", "tool_calls": None},
    {"role": "tool", "content": "b", "tool_calls": None},
    {"role": "assistant", "content": "c", "tool_calls": None},
]


def test_demonstrations_with_tool_answers_are_refused_if_the_loop_calls_no_tools(launch):
    with pytest.raises(ConfigError) as error:
        check_rows(launch(), [CALLED, CALLED[1:]])
    assert str(error.value) == (
        "hapo.demonstration_key=demonstration: none of 2 demonstrations looked at can be injected (2 malformed). Fill "
        "the column; they must fit data.max_response_length=512 with their end of sequence. Those in which tools answer "
        "need actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent, and in actor_rollout_ref.rollout.multi_turn "
        "these tools, format=... of the calls and room for the turns."
    )


HEAD = ("hapo.kernels.head=linear_logprob", "actor_rollout_ref.actor.strategy=fsdp2")


def test_a_head_passes_with_fsdp2_and_reaches_the_engine_in_verls_configuration(launch):
    config = launch(*HEAD)
    choose_head(config, check_launch(config))
    assert chosen_head(config.actor_rollout_ref.model.fused_kernel_options) == "linear_logprob"
    assert chosen_memory(config.actor_rollout_ref.model.fused_kernel_options) is None
    config = launch(*HEAD, "hapo.kernels.memory_gib=3.5")
    choose_head(config, check_launch(config))
    assert chosen_memory(config.actor_rollout_ref.model.fused_kernel_options) == 3.5
    assert config.actor_rollout_ref.model.use_fused_kernels is False


def test_without_a_head_nothing_is_written(launch):
    config = launch()
    before = OmegaConf.to_container(config.actor_rollout_ref.model)
    choose_head(config, check_launch(config))
    assert OmegaConf.to_container(config.actor_rollout_ref.model) == before
    assert chosen_head(config.actor_rollout_ref.model.fused_kernel_options) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("hapo.kernels.head=linear_logprob",),
            "actor_rollout_ref.actor.strategy=fsdp: a head of hapo.kernels exists for FSDP2 only. "
            "Use actor_rollout_ref.actor.strategy=fsdp2, or hapo.kernels.head=off.",
        ),
        (
            (*HEAD, "actor_rollout_ref.ref.strategy=fsdp"),
            "actor_rollout_ref.ref.strategy=fsdp: a head of hapo.kernels exists for FSDP2 only. "
            "Use actor_rollout_ref.ref.strategy=fsdp2, or hapo.kernels.head=off.",
        ),
        (
            (*HEAD, "actor_rollout_ref.model.use_fused_kernels=True"),
            "actor_rollout_ref.model.use_fused_kernels=True: verl's own fused head and one of hapo.kernels exclude each "
            "other. Use actor_rollout_ref.model.use_fused_kernels=false, or hapo.kernels.head=off.",
        ),
        (
            (*HEAD, "actor_rollout_ref.model.use_liger=True"),
            "actor_rollout_ref.model.use_liger=True: Liger's kernels and a head of hapo.kernels have not been run together. "
            "Use actor_rollout_ref.model.use_liger=false, or hapo.kernels.head=off.",
        ),
        (
            (*HEAD, "actor_rollout_ref.actor.calculate_sum_pi_squared=True"),
            "actor_rollout_ref.actor.calculate_sum_pi_squared=True: a sum over the vocabulary needs whole logits. "
            "Use actor_rollout_ref.actor.calculate_sum_pi_squared=false, or hapo.kernels.head=off.",
        ),
        (
            (*HEAD, "hapo.kernels.head=policy_head", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"),
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2: policy_head needs whole rows on a rank. "
            "Use hapo.kernels.head=linear_logprob.",
        ),
        (
            ("hapo.kernels.policy_loss=triton", "trainer.device=cpu"),
            "hapo.kernels.policy_loss=triton: trainer.device=cpu, and Triton compiles for GPUs. "
            "Use hapo.kernels.policy_loss=auto.",
        ),
    ],
)
def test_kernels_that_cannot_run_are_refused(launch, overrides, message):
    with pytest.raises(ConfigError) as error:
        check_launch(launch(*overrides))
    assert str(error.value) == message


def test_a_head_on_a_device_with_another_engine_is_refused(launch, monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "metax")
    with pytest.raises(
        ConfigError, match=r"^hapo\.kernels\.head=linear_logprob: verl takes another training engine on"
    ):
        check_launch(launch(*HEAD))


FSDP2 = "actor_rollout_ref.actor.strategy=fsdp2"
REAL = (FSDP2, "hapo.objective.name=real", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (FSDP2, "hapo.objective.name=real"),
            "actor_rollout_ref.actor.loss_agg_mode=token-mean: hapo.objective.name=real is defined with another mode. "
            "Use actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean.",
        ),
        (
            (*REAL, "actor_rollout_ref.actor.shuffle=true"),
            "actor_rollout_ref.actor.shuffle=True: hapo.objective.name=real needs whole groups in a mini-batch. "
            "Use actor_rollout_ref.actor.shuffle=false.",
        ),
        (
            (*REAL, "algorithm.rollout_correction.rollout_is=token"),
            "algorithm.rollout_correction.rollout_is=token: hapo.objective.name=real has no ratio that an importance "
            "weight could correct. Use algorithm.rollout_correction.rollout_is=null.",
        ),
        (
            ("hapo.objective.name=srft", *HEAD, "hapo.kernels.head=policy_head"),
            "hapo.kernels.head=policy_head: hapo.objective.name=srft has a term that this head does not compute. "
            "Use hapo.kernels.head=linear_logprob.",
        ),
        (
            ("hapo.objective.name=srft",),
            "actor_rollout_ref.actor.strategy=fsdp: hapo.objective.name=srft evaluates the policy before "
            "every optimizer step, which exists for FSDP2 only. Use actor_rollout_ref.actor.strategy=fsdp2.",
        ),
        (
            ("hapo.objective.name=chord", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"),
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean: hapo.objective.name=chord is defined "
            "with another mode. Use actor_rollout_ref.actor.loss_agg_mode=token-mean.",
        ),
    ],
)
def test_an_objective_that_does_not_fit_the_launch_is_refused(launch, overrides, message):
    with pytest.raises(ConfigError) as error:
        check_launch(launch(*overrides))
    assert str(error.value) == message


POSTERIOR = ("hapo.rollouts.allocate=posterior", "hapo.gate.name=posterior")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("hapo.gate.name=paper",),
            "hapo.rollouts.allocate=posterior: hapo.gate.name=paper keeps no posterior of a prompt. "
            "Use hapo.gate.name=posterior or thompson, or hapo.rollouts.allocate=uniform.",
        ),
        (
            ("trainer.v1.trainer_mode=hapo_colocate_async",),
            "trainer.v1.trainer_mode=hapo_colocate_async: hapo.rollouts.allocate=posterior shares out the rollouts of a "
            "whole step, and in this mode a step is no fixed set of prompts. "
            "Use trainer.v1.trainer_mode=hapo_sync, or hapo.rollouts.allocate=uniform.",
        ),
        (
            ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward"),
            "algorithm.filter_groups.enable=True: groups that are replaced would change the number of rows, which "
            "hapo.rollouts.allocate=posterior keeps. "
            "Use algorithm.filter_groups.enable=false, or hapo.rollouts.allocate=uniform.",
        ),
        (
            ("trainer.v1.sampler.sync_refill_failed_groups=true",),
            "trainer.v1.sampler.sync_refill_failed_groups=True: groups that are replaced would change the number "
            "of rows, which hapo.rollouts.allocate=posterior keeps. "
            "Use trainer.v1.sampler.sync_refill_failed_groups=false, or hapo.rollouts.allocate=uniform.",
        ),
        (
            ("hapo.rollouts.least=9",),
            "hapo.rollouts.least=9: prompts get actor_rollout_ref.rollout.n=8 rollouts on average. "
            "Use hapo.rollouts.least=2.",
        ),
        (
            ("hapo.rollouts.most=7",),
            "hapo.rollouts.most=7: prompts get actor_rollout_ref.rollout.n=8 rollouts on average. "
            "Use hapo.rollouts.most=null for twice as many.",
        ),
    ],
)
def test_rollouts_that_cannot_be_allocated_are_refused_and_uniform_ones_are_not(launch, overrides, message):
    with pytest.raises(ConfigError) as error:
        check_launch(launch(*POSTERIOR, *overrides))
    assert str(error.value) == message
    check_launch(launch(*POSTERIOR, *overrides, "hapo.rollouts.allocate=uniform"))


@pytest.mark.parametrize("gate", ["posterior", "thompson"])
def test_rollouts_are_allocated_by_a_gate_that_remembers_prompts(launch, gate):
    hapo = check_launch(launch(*POSTERIOR, f"hapo.gate.name={gate}", "hapo.rollouts.most=8", "hapo.rollouts.least=8"))
    assert hapo.rollouts.bounds(8) == (8, 8)
    assert check_launch(launch(*POSTERIOR)).rollouts.bounds(8) == (2, 16)


PRESETS = ("grpo", "dapo", "luffy", "srft", "chord", "s_grpo", "real", "real_ssi", "paper", "plus")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_its_own_checks(launch, name):
    config = launch("actor_rollout_ref.rollout.n=8", preset=[f"+hapo={name}"])
    hapo = check_launch(config)
    assert (hapo.gate.name, hapo.injection.mode, hapo.objective.name) == {
        "grpo": ("never", "replace", "surrogate"),
        "dapo": ("never", "replace", "surrogate"),
        "luffy": ("always", "replace", "surrogate"),
        "srft": ("always", "append", "srft"),
        "chord": ("always", "append", "chord"),
        "s_grpo": ("zero", "append", "surrogate"),
        "real": ("never", "replace", "real"),
        "real_ssi": ("paper", "replace", "real"),
        "paper": ("paper", "replace", "surrogate"),
        "plus": ("annealed", "append", "surrogate"),
    }[name]
