"""The settings file of an executor: the block has the same keys as for verl, and what OpenRLHF cannot do is refused."""

import os
import runpy
import shutil
import subprocess
import sys

import pytest

from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.openrlhf.settings import Settings
from tests.openrlhf.conftest import RECIPES


def test_the_defaults_equal_verls_and_a_rewards_path_is_relative_to_the_file(settings, tmp_path):
    read = Settings.read(settings())
    assert read.hapo == HapoConfig()
    assert (read.reward, read.groups_per_engine, read.first_step) == (str(tmp_path / "reward.py"), None, 1)


def test_a_reward_may_be_a_server(settings):
    assert Settings.read(settings(reward="http://localhost:5000/score")).reward == "http://localhost:5000/score"


@pytest.mark.parametrize(
    ("hapo", "more", "said"),
    [
        (
            {"gate": {"threshold": 1.5}},
            {},
            "hapo.gate.threshold=1.5: a success rate lies in [0, 1]. Use 0.0 to switch injection off.",
        ),
        ({"gat": {}}, {}, "hapo.gat: no such key. Did you mean hapo.gate?"),
        (
            {"loss": {"exponent": 1.0}},
            {},
            "hapo.loss: OpenRLHF's loss and trainer have nothing that reads it. Remove it.",
        ),
        (
            {"trace_dir": "trace"},
            {},
            "hapo.trace_dir: OpenRLHF's loss and trainer have nothing that reads it. Remove it.",
        ),
        (
            {"gate": {"name": "posterior"}},
            {},
            "hapo.gate.name=posterior: remembers all prompts of a run; an executor sees those of its own vLLM engine. "
            "Use hapo.gate.name=annealed.",
        ),
        (
            {"gate": {"name": "annealed"}},
            {"groups_per_engine": 8},
            "hapo.gate.horizon=None: an executor is not told how many steps a run has. "
            "Set hapo.gate.horizon to that number.",
        ),
        (
            {"injection": {"mode": "append"}},
            {},
            "hapo.injection.mode=append: OpenRLHF's groups have a fixed number of rows. Use hapo.injection.mode=replace.",
        ),
        (
            {"advantage": {"statistics": "on_policy"}},
            {},
            "hapo.advantage.statistics=on_policy: OpenRLHF's group_norm compares all rows of a group. "
            "Use hapo.advantage.statistics=all.",
        ),
        (
            {"gate": {"name": "annealed", "horizon": 10}},
            {},
            "groups_per_engine=None: schedules and budgets count steps by it. "
            "Use --rollout.batch_size divided by --vllm.num_engines.",
        ),
        (
            {"budget": {"share": 0.5}},
            {"groups_per_engine": 0.5},
            "groups_per_engine=0.5: schedules and budgets count steps by it. "
            "Use --rollout.batch_size divided by --vllm.num_engines.",
        ),
        ({}, {"first_step": 0}, "first_step=0: a step is a positive integer. Use 1 to begin."),
        ({}, {"reward": "none.py"}, "reward=none.py: no such Python file, and no URL. Name a file with reward_func."),
        ({}, {"reward": None}, "reward=None: no such Python file, and no URL. Name a file with reward_func."),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(settings, hapo, more, said):
    with pytest.raises(ConfigError) as error:
        Settings.read(settings(hapo, **more))
    assert str(error.value) == said


@pytest.mark.parametrize("content", ["- 1", "rewards: reward.py", "5"])
def test_unknown_keys_and_other_content_are_refused(tmp_path, content):
    path = tmp_path / "hapo.yaml"
    path.write_text(content)
    with pytest.raises(
        ConfigError, match=r"other keys than hapo, reward, groups_per_engine, first_step, or none\. Use these\."
    ):
        Settings.read(path)


@pytest.mark.parametrize("content", [None, "hapo: {", "\udcff"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, content):
    path = tmp_path / "hapo.yaml"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as error:
        Settings.read(path)
    assert "cannot be read" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_recipes_settings_work():
    read = Settings.read(RECIPES / "openrlhf" / "hapo.yaml")
    assert (read.hapo.gate.name, read.groups_per_engine) == ("annealed", 128 // 8)


@pytest.mark.parametrize(
    ("answer", "reward"), [("2 x 12 = 24\n#### 24", 1), ("#### 1,024.", 0), ("#### 4\n#### 24.", 1), ("24", 0)]
)
def test_the_recipes_reward_reads_the_last_line(answer, reward):
    namespace = runpy.run_path(str(RECIPES / "openrlhf" / "reward.py"))
    said = namespace["reward_func"]([f"question #### 24 {answer}"], ["question #### 24 "], ["24"])
    assert said["rewards"].tolist() == said["scores"].tolist() == [reward]


def test_the_launch_script_reports_in_one_line_what_cannot_work(tmp_path):
    for file in ("run.sh", "hapo.yaml", "reward.py"):
        shutil.copy(RECIPES / "openrlhf" / file, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "DRY": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

    def launch():
        command = ["bash", str(tmp_path / "run.sh"), "model", "train.jsonl", "heldout.jsonl", "--train.seed", "1"]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)

    printed = launch().stdout.split()
    assert printed[:3] == ["python3", "-m", "openrlhf.cli.train_ppo_ray"]
    assert printed[-2:] == ["--train.seed", "1"]
    (tmp_path / "hapo.yaml").write_text("hapo: {gat: {}}")
    assert launch().stderr == "hapo.gat: no such key. Did you mean hapo.gate?\n"


def test_the_settings_import_neither_openrlhf_nor_verl():
    code = "import sys, hapo_verl.openrlhf.settings; sys.exit(bool({'openrlhf', 'verl', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
