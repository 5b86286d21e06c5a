"""Every Ray node must load this version of the plugin, or the run stops at the start."""

import re
import shutil

import pytest
import ray

import hapo_kernels
import hapo_verl
from hapo_verl.config import ConfigError
from hapo_verl.launch.checks import check_cluster

# Each new Ray worker imports verl. That a right cluster passes is part of every end-to-end launch.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def cluster_without_plugin():
    ray.shutdown()
    environment = {"VERL_USE_EXTERNAL_PLUGINS": "none"}
    ray.init(num_cpus=1, include_dashboard=False, runtime_env={"env_vars": environment}, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_worker_with_another_version_is_named_with_the_fix(cluster, monkeypatch):
    monkeypatch.setattr("hapo_verl.__version__", "9.9.9")
    with pytest.raises(ConfigError, match=r"^Ray node [\d.]+: hapo-verl 0\.1\.0, the driver has 9\.9\.9\. pip install"):
        check_cluster()


def test_a_worker_with_another_commit_of_this_version_is_named_with_both_digests(cluster, tmp_path, monkeypatch):
    """First the driver's files are in another folder, then a byte of one of them differs."""
    for package in (hapo_verl, hapo_kernels):
        copy = tmp_path / package.__name__
        shutil.copytree(package.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(package.__spec__, "submodule_search_locations", [str(copy)])
    check_cluster()
    changed = tmp_path / "hapo_kernels" / "policy_loss" / "terms.py"
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(ConfigError) as error:
        check_cluster()
    found = re.fullmatch(
        r"Ray node [\d.]+: hapo-verl 0\.1\.0 with other files than the driver's \(digest ([0-9a-f]{12}) there, "
        r"([0-9a-f]{12}) here\)\. Install the same commit on every node\.",
        str(error.value),
    )
    assert found[1] != found[2]


# Last, for it ends the others' cluster.
def test_a_worker_whose_verl_loads_no_plugin_is_named(cluster_without_plugin):
    with pytest.raises(ConfigError, match="hapo-verl is not loaded by `import verl`, the driver has"):
        check_cluster()
