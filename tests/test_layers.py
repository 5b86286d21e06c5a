"""Imports point one way: plugin -> adapters -> algo -> hapo_kernels -> torch, triton."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["hapo_verl.algo.policy_loss", "hapo_verl.algo.advantage", "hapo_verl.config"])
def test_the_algorithm_does_not_import_verl(module):
    code = f"import sys, {module}; sys.exit('verl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_configuration_does_not_import_torch():
    code = "import sys, hapo_verl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
