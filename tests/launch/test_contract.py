"""The contract with verl: a verl that has changed under an override is refused with a clear line."""

import hashlib
import inspect
import sys

import pytest

from hapo_verl.config import ConfigError
from hapo_verl.launch import contract
from hapo_verl.launch.contract import OVERRIDES, REPLACED, Override, check_contract, parameters_of, verl_method

# Digests of the verl 0.9.1 methods that ours replace. If one changes, read verl's method, then update ours and this.
REPLACED_BODIES = {
    "_compute_advantage": "2a4a2aa4a475b228",
    "_agent_loop_postprocess": "523edacbff73640d",
    "prepare_model_outputs": "5239f536e8f617e3",
    "_handle_generating_state": "c5a8a2c76f069bae",
    "_handle_processing_tools_state": "6fb81493273afe9b",
    "_build_assistant_message": "ca7e74a20f481a11",
    "_call_tool": "f89d8960df1fe382",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override.method)
def test_the_installed_verl_has_the_signatures_that_ours_were_written_for(override):
    assert parameters_of(override) == override.parameters


def test_the_bodies_of_replaced_methods_are_unchanged():
    digests = {
        override.method: hashlib.sha256(inspect.getsource(verl_method(override)).encode()).hexdigest()[:16]
        for override in OVERRIDES
        if override.how == REPLACED
    }
    assert digests == REPLACED_BODIES


def test_every_private_override_of_ours_is_listed():
    from hapo_verl.actor.engine import HapoFSDPEngine
    from hapo_verl.driver.trainer import HapoTrainer
    from hapo_verl.rollout.worker import HapoAgentLoopManager, HapoAgentLoopWorker

    for ours in (HapoTrainer, HapoAgentLoopWorker, HapoAgentLoopManager, HapoFSDPEngine):
        verls = {name for base in ours.__mro__ if base.__module__.startswith("verl.") for name in vars(base)}
        methods = {name for name, value in vars(ours).items() if inspect.isfunction(value) and name in verls}
        private = {name for name in methods if name.startswith("_") and not name.startswith("__")}
        assert private <= {override.method for override in OVERRIDES}


def test_a_changed_signature_is_one_line_that_says_what_to_install(monkeypatch):
    changed = Override(OVERRIDES[0].owner, "_compute_advantage", ("self", "batch"))
    monkeypatch.setattr(contract, "OVERRIDES", (changed,))
    with pytest.raises(ConfigError) as error:
        check_contract()
    assert str(error.value) == (
        "verl==0.9.1: verl.trainer.ppo.v1.trainer_base.PPOTrainer._compute_advantage(self, batch, metrics) has changed "
        "since verl 0.9.1, where it took (self, batch). pip install verl==0.9.1."
    )


@pytest.mark.parametrize("version", ["0.8.4", "0.10.0"])
def test_an_unsupported_verl_is_refused(monkeypatch, version):
    monkeypatch.setattr("verl.__version__", version)
    with pytest.raises(ConfigError, match=rf"verl=={version}: hapo-verl supports 0.9.1 up to, not including, 0.10\. "):
        check_contract()


@pytest.fixture
def a_trl(monkeypatch, tmp_path):
    """Installs a TRL whose package has this text."""

    def install(text):
        folder = tmp_path / "trl-1.16.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.16.0\n")
        (tmp_path / "trl.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "trl", raising=False)

    yield install
    sys.modules.pop("trl", None)


def test_a_trl_version_with_which_verl_loads_no_model_is_refused(a_trl):
    a_trl("")
    with pytest.raises(ConfigError) as error:
        check_contract()
    assert str(error.value) == (
        "trl==1.16.0: verl 0.9.1 loads no model where this TRL is installed, because it imports "
        "trl.AutoModelForCausalLMWithValueHead, which TRL no longer has. pip uninstall trl; hapo_verl.trl takes an "
        "environment of its own."
    )


def test_a_trl_version_that_works_with_verl_is_accepted(a_trl):
    a_trl("class AutoModelForCausalLMWithValueHead: pass")
    check_contract()
