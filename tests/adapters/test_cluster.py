"""Every Ray node must load this version of the plugin, or the run stops at the start."""

import pytest
import ray

from hapo_verl.adapters.checks import check_cluster
from hapo_verl.config import ConfigError


@pytest.fixture
def cluster():
    def start(**environment):
        ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": environment}, log_to_driver=False)

    yield start
    ray.shutdown()


def test_a_worker_with_this_version_passes(cluster):
    cluster()
    check_cluster()


def test_a_worker_with_another_version_is_named_with_the_fix(cluster, monkeypatch):
    cluster()
    monkeypatch.setattr("hapo_verl.__version__", "9.9.9")
    with pytest.raises(ConfigError, match=r"^Ray node [\d.]+: hapo-verl 0\.1\.0, the driver has 9\.9\.9\. pip install"):
        check_cluster()


def test_a_worker_whose_verl_loads_no_plugin_is_named(cluster):
    cluster(VERL_USE_EXTERNAL_PLUGINS="none")
    with pytest.raises(ConfigError, match="hapo-verl is not loaded by `import verl`, the driver has"):
        check_cluster()
