"""Fixtures of all tests, such as the composed configuration of a launch, without starting it."""

import socket
from collections.abc import Callable

import hypothesis
import pytest
from omegaconf import DictConfig

from tests import composed, parsed_yaml

parsed_yaml.install()

# The first example of a test may import scipy, and on a busy machine any may wait: the limits of time are pytest's.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")

# Files whose tests are processes with verl's engine, forked from a server that has imported verl: `engine_process.py`.
WITH_ENGINE = "tests/actor/", "tests/driver/test_idle_rows.py", "tests/driver/test_trl.py"


def pytest_configure(config):
    """Import verl, which registers the presets, as in a launch; a process that only distributes tests needs none."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import verl  # noqa: F401


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, all files with engines go to the same worker, so that one server is started."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneServer(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "with engine" if nodeid.startswith(WITH_ENGINE) else super()._split_scope(nodeid)

    return OneServer(config, log)


# The trace that every preset writes beside the checkpoints is off.
PAPER = ["+hapo=paper", "actor_rollout_ref.rollout.n=8", "hapo.trace_dir=null"]


@pytest.fixture
def launch() -> Callable[..., DictConfig]:
    """The configuration of `python -m verl.trainer.main_ppo +hapo=paper ...` with the given overrides."""

    def compose_launch(*overrides: str, preset: list[str] = PAPER) -> DictConfig:
        return composed.launch(*preset, *overrides)

    return compose_launch


@pytest.fixture
def unused_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
