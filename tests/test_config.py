"""The `hapo:` block: its defaults, and one clear line for every wrong key or value."""

import math

import pytest
from omegaconf import OmegaConf

from hapo_verl.config import (
    GATES,
    AnnealedGate,
    ConfigError,
    GateConfig,
    HapoConfig,
    KernelsConfig,
    LossConfig,
    PaperGate,
    PosteriorGate,
    ThompsonGate,
    defaults,
)


def test_an_empty_block_gives_the_papers_settings():
    hapo = HapoConfig.parse({})
    assert hapo.gate == PaperGate(name="paper", threshold=0.8, prior_success=1.0, prior_failure=1.0)
    assert hapo.injection.mode == "replace"
    assert hapo.budget.share == 1.0
    assert hapo.loss == LossConfig(shape="power", shaping=0.1, exponent=1.0, clip=True)
    assert hapo.kernels == KernelsConfig(policy_loss="auto", head="off", memory_gib=None)


def test_the_defaults_pass_their_own_checks():
    assert HapoConfig.parse(defaults()) == HapoConfig()


@pytest.mark.parametrize("name", GATES)
def test_every_gate_has_its_own_keys_with_their_defaults(name):
    assert HapoConfig.parse({"gate": {**defaults()["gate"], "name": name}}).gate == GATES[name]


def test_each_gate_accepts_its_own_keys():
    parsed = HapoConfig.parse({"gate": {"name": "annealed", "horizon": 300, "power": 2, "memory": None}})
    assert parsed.gate == AnnealedGate(horizon=300, power=2)
    assert HapoConfig.parse({"gate": {"name": "thompson", "strength": 4}}).gate == ThompsonGate(strength=4)
    assert HapoConfig.parse({"gate": {"name": "posterior"}}).gate == PosteriorGate()
    assert HapoConfig.parse({"gate": {"name": "zero"}}).gate == GateConfig("zero")


def test_off_without_quotes_on_a_command_line_is_the_head_off():
    assert HapoConfig.parse({"kernels": {"head": False}}).kernels.head == "off"


@pytest.mark.parametrize("written", ["inf", ".inf"])
def test_an_infinite_lambda_is_a_number_on_a_command_line_and_in_yaml(launch, written):
    block = OmegaConf.create(f"loss: {{shaping: {written}}}")
    assert HapoConfig.parse(OmegaConf.to_container(block)).loss.shaping == math.inf
    typed = launch(f"hapo.loss.shaping={written}").hapo.loss.shaping
    assert HapoConfig.parse({"loss": {"shaping": typed}}).loss.shaping == math.inf


def test_a_key_replaces_only_its_own_default():
    assert HapoConfig.parse({"gate": {"threshold": 0.7}}).gate == PaperGate(threshold=0.7)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"gate": {"treshold": 0.7}},
            "hapo.gate.treshold: no such key. Did you mean hapo.gate.threshold?",
        ),
        ({"gates": {}}, "hapo.gates: no such key. Did you mean hapo.gate?"),
        (
            {"gate": {"threshold": 1.5}},
            "hapo.gate.threshold=1.5: a success rate lies in [0, 1]. Use 0.0 to switch injection off.",
        ),
        (
            {"gate": {"threshold": float("nan")}},
            "hapo.gate.threshold=nan: a success rate lies in [0, 1]. Use 0.0 to switch injection off.",
        ),
        (
            {"gate": {"prior_success": 0}},
            "hapo.gate.prior_success=0: a Beta prior needs a positive count. Use 1.0 for the uniform prior.",
        ),
        (
            {"gate": {"prior_failure": -1.0}},
            "hapo.gate.prior_failure=-1.0: a Beta prior needs a positive count. Use 1.0 for the uniform prior.",
        ),
        (
            {"gate": {"name": "papper"}},
            "hapo.gate.name='papper': not a gate. Use one of: "
            "paper, annealed, adaptive, posterior, thompson, zero, never, always.",
        ),
        (
            {"gate": {"horizon": 300}},
            "hapo.gate.horizon=300: not a key of the gate paper, which has threshold, prior_success, prior_failure. "
            "Use hapo.gate.name=annealed or remove it.",
        ),
        (
            {"gate": {"name": "zero", "threshold": 0.5}},
            "hapo.gate.threshold=0.5: not a key of the gate zero, which has no keys. Use hapo.gate.name=paper or remove it.",
        ),
        (
            {"gate": {"name": "annealed", "horizon": 0}},
            "hapo.gate.horizon=0: a number of steps is a positive integer. Use null for all steps of the run.",
        ),
        (
            {"gate": {"name": "posterior", "discount": 1.5}},
            "hapo.gate.discount=1.5: the share of earlier visits that counts lies in [0, 1]. Use 0.5.",
        ),
        (
            {"objective": {"name": "reel"}},
            "hapo.objective.name='reel': not an objective. Use one of: surrogate, chord, real, srft.",
        ),
        (
            {"objective": {"name": "srft", "temperature": 1.0}},
            "hapo.objective.temperature=1.0: not a key of the objective srft, which has demonstration_weight, "
            "success_weight, failure_weight. Use hapo.objective.name=real or remove it.",
        ),
        (
            {"objective": {"name": "real", "temperature": 0}},
            "hapo.objective.temperature=0: the temperature of the logits s/tau lies in [1e-6, 1e6]. Use 0.5.",
        ),
        (
            {"advantage": {"statistics": "group"}},
            "hapo.advantage.statistics='group': no such statistics. Use one of: all, on_policy, null.",
        ),
        ({"loss": {"clip": "off"}}, "hapo.loss.clip='off': either true or false. Use true."),
        ({"injection": {"mode": "add"}}, "hapo.injection.mode='add': no such mode. Use one of: replace, append."),
        (
            {"budget": {"share": -0.1}},
            "hapo.budget.share=-0.1: a share of groups lies in [0, 1]. Use 1.0 for no limit.",
        ),
        ({"gate": 0.8}, "hapo.gate=0.8: a block of keys is needed. Launch with +hapo=paper."),
        (
            {"loss": {"shaping": 0.0}},
            "hapo.loss.shaping=0.0: lambda of q/(q+lambda) must be positive, or inf. Use 0.1, the value of the paper.",
        ),
        (
            {"loss": {"shaping": float("nan")}},
            "hapo.loss.shaping=nan: lambda of q/(q+lambda) must be positive, or inf. Use 0.1, the value of the paper.",
        ),
        (
            {"loss": {"shaping": "-inf"}},
            "hapo.loss.shaping='-inf': lambda of q/(q+lambda) must be positive, or inf. Use 0.1, the value of the paper.",
        ),
        (
            {"loss": {"exponent": 1.5}},
            "hapo.loss.exponent=1.5: kappa is 0, or lies in [1e-6, 1]. Use 1.0, the value of the paper, or 0.0.",
        ),
        (
            {"loss": {"exponent": True}},
            "hapo.loss.exponent=True: kappa is 0, or lies in [1e-6, 1]. Use 1.0, the value of the paper, or 0.0.",
        ),
        ({"loss": {"shape": "sft"}}, "hapo.loss.shape='sft': no such shape. Use one of: power, trsft, chord."),
        (
            {"loss": {"shape": "trsft", "shaping": ".inf"}},
            "hapo.loss.shaping=inf: with hapo.loss.shape=trsft no token would have a weight. "
            "Use 0.1, the value of TRAPO.",
        ),
        (
            {"kernels": {"policy_loss": "cuda"}},
            "hapo.kernels.policy_loss='cuda': no such kernel. Use one of: auto, reference, triton.",
        ),
        (
            {"kernels": {"head": "fused"}},
            "hapo.kernels.head='fused': no such head. Use one of: off, linear_logprob, policy_head.",
        ),
        (
            {"kernels": {"head": "policy_head", "memory_gib": 0}},
            "hapo.kernels.memory_gib=0: a size in GiB is positive. Use null for the default, or what the doctor names "
            "as the least.",
        ),
        (
            {"kernels": {"memory_gib": 3}},
            "hapo.kernels.memory_gib=3: hapo.kernels.head=off takes all rows at once. "
            "Use hapo.kernels.head=policy_head or linear_logprob, or hapo.kernels.memory_gib=null.",
        ),
        (
            {"poll_interval": 0},
            "hapo.poll_interval=0: seconds between two polls must be positive. Use null for verl's 2.0.",
        ),
        (
            {"watch_interval": 0},
            "hapo.watch_interval=0: seconds between two looks must be positive. "
            "Use 5.0, or null to wait for ever where a worker has died.",
        ),
        (
            {"stall_report": 0},
            "hapo.stall_report=0: seconds without progress must be positive. Use 1800.0, or null to say nothing.",
        ),
        (
            {"stall_limit": -1},
            "hapo.stall_limit=-1: seconds without progress must be positive. Use 7200.0, or null to wait for ever.",
        ),
        (
            {"reward_timeout": "1h"},
            "hapo.reward_timeout='1h': seconds that a reward function may take must be positive. "
            "Use 3600.0, or null to wait for ever.",
        ),
        (
            {"demonstrations": {"source": "teacher"}},
            "hapo.demonstrations.source='teacher': no such source. Use one of: column, own, column_or_own.",
        ),
        (
            {"rollouts": {"allocate": "thompson"}},
            "hapo.rollouts.allocate='thompson': no such allocation. Use one of: uniform, posterior.",
        ),
        (
            {"rollouts": {"least": 1}},
            "hapo.rollouts.least=1: a group needs at least 2 rollouts. Use 2.",
        ),
        (
            {"rollouts": {"most": 8.0}},
            "hapo.rollouts.most=8.0: a group needs at least 2 rollouts. Use null for twice actor_rollout_ref.rollout.n.",
        ),
        (
            {"demonstrations": {"own_memory_mib": 0}},
            "hapo.demonstrations.own_memory_mib=0: a size in MiB is positive. "
            "Use 256, which holds 100,000 prompts with 1,000 tokens each.",
        ),
        (
            {"demonstrations": {"own_max_age": 0.5}},
            "hapo.demonstrations.own_max_age=0.5: a number of steps is a positive integer. Use null for no limit.",
        ),
        ({"demonstration_key": ""}, "hapo.demonstration_key='': a column name is needed. Use demonstration."),
        ("paper", "hapo='paper': a block of keys is needed. Launch with +hapo=paper."),
        (
            {"loss": {"shape": "trsft", "shaping": float("inf")}},
            "hapo.loss.shaping=inf: with hapo.loss.shape=trsft no token would have a weight. Use 0.1, the value of TRAPO.",
        ),
        # Found by tests/fuzz.
        (
            {"objective": {"name": "srft", "success_weight": 1e308}},
            "hapo.objective.success_weight=1e+308: a weight must be positive and at most 1e6. Use 0.1.",
        ),
        (
            {"objective": {"name": "real", "temperature": 1e-308}},
            "hapo.objective.temperature=1e-308: the temperature of the logits s/tau lies in [1e-6, 1e6]. Use 0.5.",
        ),
        (
            {"loss": {"exponent": 1e-60}},
            "hapo.loss.exponent=1e-60: kappa is 0, or lies in [1e-6, 1]. Use 1.0, the value of the paper, or 0.0.",
        ),
        (
            {"gate": {"name": ["paper"]}},
            "hapo.gate.name=['paper']: not a gate. Use one of: "
            "paper, annealed, adaptive, posterior, thompson, zero, never, always.",
        ),
        (
            {"watch_interval": 10**309},
            f"hapo.watch_interval={10**309}: seconds between two looks must be positive. "
            "Use 5.0, or null to wait for ever where a worker has died.",
        ),
        ({"see\rd": 1}, "hapo.'see\\rd': no such key. Did you mean hapo.seed?"),
    ],
)
def test_a_wrong_key_or_value_gets_one_line_that_names_the_fix(block, message):
    with pytest.raises(ConfigError) as error:
        HapoConfig.parse(block)
    assert str(error.value) == message
