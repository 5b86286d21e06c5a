"""The doctor: one line per check, with the fix if a check fails, and an exit code."""

import os
import subprocess
import sys

import pytest
import torch

from hapo_verl.config import ConfigError
from hapo_verl.launch import diagnosis
from hapo_verl.launch.diagnosis import Finding, findings


def doctor(*arguments, **environment):
    command = [sys.executable, "-W", "ignore", "-m", "hapo_verl.doctor", "--no-ray", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    return run.returncode, run.stdout.splitlines()


def test_a_plugin_that_verl_does_not_load_and_a_wrong_launch_are_named_with_the_fix():
    code, lines = doctor("actor_rollout_ref.rollout.n=8", VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_PLUGINS="none")
    assert code == 1
    assert (
        "FAIL  plugin in this process: `import verl` does not load it. Unset VERL_USE_EXTERNAL_PLUGINS=none." in lines
    )
    assert (
        "FAIL  preset +hapo=paper: is taken for a plain string, and verl would train GRPO. "
        "Make `import verl` load the plugin."
    ) in lines
    assert "FAIL  launch: hapo=None: the block of HAPO's keys is missing. Launch with +hapo=paper." in lines


def test_a_check_that_fails_does_not_hide_the_next(monkeypatch):
    def broken():
        raise ConfigError("one line. And the fix.")

    monkeypatch.setattr(diagnosis, "_verl", broken)
    monkeypatch.setattr(diagnosis, "_kernels", lambda _: 1 / 0)
    found = {finding.name: finding for finding in findings([], ray=False)}
    assert found["verl"] == Finding("verl", False, "one line. And the fix.")
    assert found["kernels"] == Finding("kernels", False, "ZeroDivisionError: division by zero")
    assert found["ray"].right


def test_missing_training_data_is_named(launch):
    found = {
        finding.name: finding for finding in findings(["+hapo=paper", "data.train_files=/no/such.parquet"], ray=False)
    }
    assert found["demonstrations"].detail == (
        "data.train_files=/no/such.parquet: no such file on this machine. Name local parquet files."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it finds on a machine without a GPU")
def test_the_kernels_line_reports_what_runs_and_why(launch):
    overrides = ["+hapo=paper", "hapo.kernels.head=linear_logprob", "hapo.kernels.policy_loss=reference"]
    for given, detail in {
        (): (
            "policy loss: reference (PyTorch), because no GPU is visible; head: verl's own, as configured; "
            "group advantages: reference, on the trainer's CPU"
        ),
        tuple(overrides): (
            "policy loss: reference, as configured; head: linear_logprob, reference (PyTorch), because no GPU is "
            "visible; group advantages: reference, on the trainer's CPU"
        ),
    }.items():
        assert diagnosis._kernels(given) == detail
