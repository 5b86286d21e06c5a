"""The contract with TRL: a TRL that has changed under an extension is refused with a clear line."""

import inspect

import pytest

pytest.importorskip("trl", reason="TRL is not installed; it has an environment of its own, see the Makefile")
import trl

from hapo_verl.config import ConfigError
from hapo_verl.trl import HapoGRPOTrainer, contract
from hapo_verl.trl.contract import EXTENDED, check_contract


def test_the_installed_trl_has_the_signatures_that_ours_were_written_for():
    check_contract()


def test_every_private_method_of_trl_that_ours_extend_is_listed():
    theirs = {name for base in HapoGRPOTrainer.__mro__[1:] for name in vars(base)}
    ours = {name for name, value in vars(HapoGRPOTrainer).items() if inspect.isfunction(value)}
    assert {name for name in ours & theirs if not name.startswith("__")} == set(EXTENDED)


def test_a_changed_signature_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(EXTENDED, "_compute_loss", ("self", "model"))
    with pytest.raises(ConfigError) as error:
        check_contract()
    assert str(error.value) == (
        f"trl=={trl.__version__}: GRPOTrainer._compute_loss(self, model, inputs) has changed since TRL "
        f"{contract.READ_IN}, where it took (self, model). pip install trl=={contract.READ_IN}."
    )


@pytest.mark.parametrize("version", ["1.9.0", "1.17.0"])
def test_an_unsupported_trl_is_refused(monkeypatch, version):
    monkeypatch.setattr("trl.__version__", version)
    with pytest.raises(ConfigError, match=rf"trl=={version}: hapo-verl supports 1.16.0 up to, not including, 1.17. "):
        check_contract()
