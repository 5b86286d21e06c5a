"""Fixtures of all tests, such as the composed configuration of a launch, without starting it."""

import socket
from collections.abc import Callable

import pytest
import verl  # noqa: F401  registers the presets, as in a launch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from tests import parsed_yaml

parsed_yaml.install()

# The trace that every preset writes beside the checkpoints is off.
PAPER = ["+hapo=paper", "actor_rollout_ref.rollout.n=8", "hapo.trace_dir=null"]


@pytest.fixture
def launch() -> Callable[..., DictConfig]:
    """The configuration of `python -m verl.trainer.main_ppo +hapo=paper ...` with the given overrides."""

    def compose_launch(*overrides: str, preset: list[str] = PAPER) -> DictConfig:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=[*preset, *overrides])

    return compose_launch


@pytest.fixture
def unused_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
