"""Every recipe in dry mode: its command composes with the installed verl, and verl and HAPO accept it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_reference_policy
from verl.utils.config import validate_config

from hapo_verl.data.parquet import DataError, read_parquet, write_parquet
from hapo_verl.launch.checks import check_launch
from hapo_verl.launch.sizes import check_sizes

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
OPENR1 = RECIPES / "qwen2.5_math_7b_openr1"
PRESETS = sorted(path.stem for path in (ROOT / "hapo_verl" / "presets" / "hapo").glob("*.yaml"))
sys.path[:0] = [str(OPENR1), str(RECIPES / "ray_cluster")]
import benchmarks  # noqa: E402
import wait_for_nodes  # noqa: E402


def shell(*command, **environment):
    given = {"DRY": "1", "MODEL": "/models/it", "DATA": "/data/it", "PYTHON": "python3", "PATH": os.environ["PATH"]}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=given | environment,
        cwd=ROOT,
        check=False,
    )


def dry(*command, **environment):
    """The commands that a launch script prints in dry mode, each as a list of words."""
    run = shell(*command, **environment)
    assert run.returncode == 0, run.stderr
    return [shlex.split(line) for line in run.stdout.splitlines()]


def composed(launch, command):
    """The configuration of a printed command, after verl's checks and ours."""
    assert command[:3] == ["python3", "-m", "verl.trainer.main_ppo"]
    config = launch(preset=command[3:])
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=False)
    check_launch(config)
    check_sizes(config)
    return config


# For each recipe, the arguments of its launch script and the number of GPUs that train.
LAUNCHES = {
    "qwen2.5_math_7b_openr1": ([], 8),
    "ray_cluster": (["train"], 16),
    "slurm": ([], 16),
    "qwen2.5_32b_fsdp2": ([], 32),
    "separate_async": ([], 8),
}


@pytest.mark.parametrize("recipe", LAUNCHES)
def test_a_recipe_prints_a_command_that_composes_and_passes_every_check(launch, recipe):
    arguments, gpus = LAUNCHES[recipe]
    environment = {"NODES": "2"} if recipe == "ray_cluster" else {}
    *_, command = dry(RECIPES / recipe / "launch.sh", *arguments, "trainer.total_epochs=3", **environment)
    config = composed(launch, command)
    assert config.trainer.nnodes * config.trainer.n_gpus_per_node == gpus
    assert config.trainer.total_epochs == 3
    assert config.actor_rollout_ref.model.path == "/models/it"
    assert config.data.train_files == "/data/it/train.parquet"
    for key, value in yaml.safe_load((RECIPES / recipe / "config.yaml").read_text()).items():
        assert OmegaConf.select(config, key) == value, key


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_launches_in_the_papers_setting(launch, preset):
    (command,) = dry(OPENR1 / "launch.sh", PRESET=preset)
    config = composed(launch, command)
    assert (config.data.train_batch_size, config.actor_rollout_ref.rollout.n) == (128, 8)
    assert config.actor_rollout_ref.rollout.temperature == 1.0
    assert (config.actor_rollout_ref.actor.optim.lr, config.actor_rollout_ref.actor.optim.lr_scheduler_type) == (
        1e-6,
        "constant",
    )
    assert config.data.max_response_length == 8192
    assert config.actor_rollout_ref.rollout.val_kwargs.temperature == 0.6


def test_the_papers_preset_has_the_papers_gate(launch):
    (command,) = dry(OPENR1 / "launch.sh")
    gate = check_launch(composed(launch, command)).gate
    assert (gate.name, gate.threshold, gate.prior_success, gate.prior_failure) == ("paper", 0.8, 1.0, 1.0)


def test_a_checkpoint_is_evaluated_by_verls_own_validation(launch):
    (command,) = dry(OPENR1 / "evaluate.sh", "/out/global_step_500", "trainer.logger=[console]")
    trainer = composed(launch, command).trainer
    assert (trainer.val_only, trainer.val_before_train, trainer.resume_mode) == (True, True, "resume_path")
    assert trainer.resume_from_path == "/out/global_step_500"
    assert trainer.logger == ["console"]
    (command,) = dry(OPENR1 / "evaluate.sh", "trainer.project_name=base")
    assert composed(launch, command).trainer.resume_mode == "disable"


def test_a_ray_cluster_is_started_by_hand_and_waited_for():
    script = RECIPES / "ray_cluster" / "launch.sh"
    assert dry(script, "head") == [["ray", "start", "--head", "--port=6379", "--disable-usage-stats"]]
    assert dry(script, "worker", "10.0.0.1", RAY_PORT="7000") == [
        ["ray", "start", "--address=10.0.0.1:7000", "--disable-usage-stats"]
    ]
    waits, _ = dry(script, "train", NODES="3")
    assert waits == ["python3", str(RECIPES / "ray_cluster" / "wait_for_nodes.py"), "3"]


@pytest.mark.parametrize(
    ("token", "given", "expected"),
    [(True, {}, "token"), (False, {}, "none"), (True, {"RAY_AUTH_MODE": "disabled"}, "disabled")],
)
def test_a_driver_is_told_whether_the_cluster_has_a_token(tmp_path, token, given, expected):
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\necho ${RAY_AUTH_MODE:-none}\n")
    python.chmod(0o755)
    environment = {"DRY": "", "NODES": "2", "HOME": str(tmp_path), "PYTHON": str(python)} | given
    run = shell(RECIPES / "ray_cluster" / "launch.sh", "train", **environment)
    # Two programs join the cluster: the one that waits for nodes, and the trainer.
    assert run.stdout.split() == [expected, expected], run.stderr


def test_a_slurm_job_starts_ray_on_each_node_before_it_trains():
    head, one, worker, both, _ = dry(RECIPES / "slurm" / "launch.sh")
    assert head[-4:] == ["--nodelist=node0", str(RECIPES / "ray_cluster" / "launch.sh"), "head", "--block"]
    assert worker[-4:] == [str(RECIPES / "ray_cluster" / "launch.sh"), "worker", "node0", "--block"]
    assert (one[-1], both[-1]) == ("1", "2")
    run = shell(RECIPES / "slurm" / "launch.sh", SLURM_SUBMIT_DIR="/tmp")
    assert run.returncode == 2
    assert run.stderr == "slurm/launch.sh: /tmp is not the repository's root. Submit from there.\n"


def test_the_kuberay_manifest_is_yaml_whose_entry_point_is_the_command(launch):
    given = {"IMAGE": "registry/hapo:1", "CLAIM": "scratch", "NODES": "4", "REPO": str(ROOT), "PRESET": "plus"}
    run = shell(RECIPES / "kuberay" / "launch.sh", "data.seed=1", **given)
    manifest = yaml.safe_load(run.stdout)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    cluster = manifest["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 4, 4]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry/hapo:1"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8

    (command,) = dry("bash", "-c", manifest["spec"]["entrypoint"])
    config = composed(launch, command)
    assert (config.trainer.nnodes, config.data.seed, config.hapo.injection.mode) == (4, 1, "append")
    assert config.trainer.default_local_dir == "/mnt/hapo/checkpoints/plus"


@pytest.mark.parametrize(
    ("line", "problem"),
    [("key : value", "1:key : value"), ("key:", "1:key:"), ("  nested: 1", "1:  nested: 1")],
)
def test_a_line_that_is_not_a_setting_is_refused_with_its_number(tmp_path, line, problem):
    config = tmp_path / "config.yaml"
    config.write_text(f"{line}\n")
    run = shell(RECIPES / "train.sh", config, "--")
    assert run.returncode == 2
    assert run.stderr == f"train.sh: {config}, line {problem}: not 'key: value' on one line, nor a comment.\n"


def test_a_missing_model_or_data_folder_is_named():
    for name in ("MODEL", "DATA"):
        run = shell(OPENR1 / "launch.sh", **{name: ""})
        assert run.returncode != 0
        assert f"{name}: Set {name} to the folder" in run.stderr


def test_nodes_are_waited_for_and_missing_nodes_are_named():
    node = {"Alive": True, "Resources": {"GPU": 8.0}}
    others = [
        {"Alive": False, "Resources": {"GPU": 8.0}, "NodeManagerAddress": "dead"},
        {"Alive": True, "Resources": {"CPU": 8.0}, "NodeManagerAddress": "no GPU"},
    ]
    looks = iter([[], others, [node | {"NodeManagerAddress": "a"}, *others]] * 2)

    def look():
        found = next(looks)
        if not found:
            raise ConnectionError("no cluster yet")
        return found

    assert wait_for_nodes.wait(1, look, seconds=60, pause=0) == ["a"]
    assert wait_for_nodes.wait(1, lambda: others, seconds=0, pause=0) == []


def test_benchmarks_become_validation_rows_with_their_number_of_samples(tmp_path, capsys):
    system = {"role": "system", "content": "Think."}
    write_parquet([{"prompt": [system, {"role": "user", "content": "x"}]}], tmp_path / "train.parquet")
    for name in benchmarks.BENCHMARKS:
        record = {"question": f"{name}?", "final_answer": ["$\\frac{1}{2}$"]}
        write_parquet(
            [record if name == "olympiadbench" else {"problem": f"{name}?", "answer": 2}], tmp_path / f"{name}.parquet"
        )
    command = ["--input", tmp_path, "--train", tmp_path / "train.parquet", "--output", tmp_path / "out.parquet"]
    assert benchmarks.main([str(part) for part in command]) == 0
    rows = {row["data_source"]: row for row in read_parquet(tmp_path / "out.parquet")}
    assert {name: row["__rollout_n__"] for name, row in rows.items()} == {
        "aime24": 32,
        "aime25": 32,
        "amc": 1,
        "math500": 1,
        "minerva": 1,
        "olympiadbench": 1,
    }
    assert rows["amc"]["prompt"] == [system, {"role": "user", "content": "amc?"}]
    assert rows["amc"]["reward_model"]["ground_truth"] == "2"
    assert rows["olympiadbench"]["reward_model"]["ground_truth"] == "\\frac{1}{2}"

    (tmp_path / "minerva.parquet").unlink()
    assert benchmarks.main([str(part) for part in command]) == 1
    assert (
        capsys.readouterr().err
        == f"benchmarks: {tmp_path / 'minerva.parquet'}: no such file. Name a local parquet file.\n"
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "2"}, "amc, row 7: no `problem` or `question`. Rename the column."),
        ({"problem": "?", "answer": None}, "amc, row 7: no single `answer` or `final_answer`. One answer a row."),
        ({"problem": "?", "answer": ["1", "2"]}, "amc, row 7: no single `answer` or `final_answer`. One answer a row."),
    ],
)
def test_a_benchmark_row_without_problem_or_answer_is_named(record, message):
    with pytest.raises(DataError) as error:
        benchmarks.row(record, "amc", 7, [])
    assert str(error.value) == message
