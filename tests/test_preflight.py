"""A wrong launch ends in the started process, before Ray, with one sentence and exit code 2."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import ray
from hydra import compose, initialize_config_module
from hydra.core.utils import JobReturn, JobStatus

from hapo_verl.config import ConfigError
from hapo_verl.launch.preflight import Preflight
from hapo_verl.rollout.reward import RewardError

# Most of the time is for importing verl: 7 s on two idle cores. A loaded machine takes several times longer.
SECONDS = 90
SENTENCE = "hapo.gate.threshold=1.5: a success rate lies in [0, 1]. Use 0.0 to switch injection off."


def launched(folder, *overrides, **environment):
    """Run `python -m verl.trainer.main_ppo ...`; returns exit code, stderr without log lines, and seconds."""
    command = [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", "+hapo=plus", "+hapo_platform=cpu"]
    given = {"VERL_PLATFORM": "cpu", "RAY_TMPDIR": str(folder), "TMPDIR": str(folder)}
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | given | environment
    started = time.monotonic()
    run = subprocess.run([*command, *overrides], capture_output=True, text=True, env=env, cwd=folder, check=False)
    seconds = time.monotonic() - started
    lines = [line for line in run.stderr.splitlines() if not line.startswith(("INFO:", "WARNING:"))]
    assert run.stdout == ""
    return run.returncode, lines, seconds


def test_a_wrong_key_ends_the_launch_before_ray_with_only_the_sentence(tmp_path):
    code, lines, seconds = launched(tmp_path, "hapo.gate.threshold=1.5")
    assert (code, lines) == (2, [SENTENCE])
    assert seconds < SECONDS
    assert not any(path.name in ("ray", "outputs") for path in tmp_path.iterdir()), "something was started"


@pytest.mark.long
def test_hapo_traceback_shows_the_traceback(tmp_path):
    code, lines, _ = launched(tmp_path, "hapo.gate.treshold=0.5", HAPO_TRACEBACK="1")
    assert code == 2
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "hapo.gate.treshold: no such key. Did you mean hapo.gate.threshold?"


@pytest.fixture
def composed(tmp_path, launch):
    """The configuration of a launch with Hydra's own block; it passes the checks if its overrides do."""
    from tests.launch.test_files import ROW, write

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write(tmp_path / "train.parquet", ROW)

    def compose_launch(*overrides, preset="plus"):
        right = [
            f"data.train_files={tmp_path}/train.parquet",
            f"data.val_files={tmp_path}/train.parquet",
            f"actor_rollout_ref.model.path={tmp_path}/model",
            "actor_rollout_ref.rollout.name=vllm",
            "actor_rollout_ref.rollout.n=8",
            "actor_rollout_ref.actor.use_dynamic_bsz=true",
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
        ]
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", [f"+hapo={preset}", *right, *overrides], return_hydra_config=True)

    return compose_launch


def started(config, capsys):
    """The output of a launch before it starts, and its exit code; None if it continues."""
    try:
        Preflight().on_run_start(config)
        code = None
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    assert printed.out == ""
    return code, printed.err.splitlines()


@pytest.mark.parametrize("preset", ["grpo", "dapo", "luffy", "srft", "real", "real_ssi", "paper", "plus"])
def test_every_preset_contains_the_preflight_check_and_passes_it(composed, preset, capsys):
    config = composed("actor_rollout_ref.ref.strategy=fsdp2", preset=preset)
    assert config.hydra.callbacks.hapo._target_ == "hapo_verl.launch.preflight.Preflight"
    assert started(config, capsys) == (None, [])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("hapo.gate.threshold=1.5", SENTENCE),
        ("hapo.trace=x", "hapo.trace: no such key. Did you mean hapo.trace_dir?"),
        ("trainer.v1.trainer_mode=sync", "trainer.v1.trainer_mode=sync: not a HAPO trainer."),
        ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator=grpo: a HAPO trainer computes HAPO's advantages."),
        ("actor_rollout_ref.rollout.n=1", "actor_rollout_ref.rollout.n=1: a group needs at least 2 rollouts."),
        ("actor_rollout_ref.rollout.name=???", "actor_rollout_ref.rollout.name: verl needs the name of an engine."),
        ("data.train_batch_size=null", "data.train_batch_size=None: a count is a positive integer."),
        ("data.train_batch_size=1000", "actor_rollout_ref.actor.ppo_mini_batch_size=256: data.train_batch_size=1000"),
        (
            "actor_rollout_ref.model.path=/no/such",
            "actor_rollout_ref.model.path=/no/such: no such folder on this machine.",
        ),
        ("data.train_files=/no/such.parquet", "data.train_files=/no/such.parquet: no such file on this machine."),
        ("hapo.demonstration_key=target", "data.train_files={folder}/train.parquet: no column target."),
    ],
)
def test_errors_of_the_configuration_and_its_files_are_reported_before_the_start(
    composed, override, sentence, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, lines = started(composed(override), capsys)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(sentence.format(folder=tmp_path))


def test_a_budget_that_is_too_small_for_the_head_is_reported_before_the_start(composed, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 1024, "vocab_size": 100000}')
    head = ("hapo.kernels.head=policy_head", "actor_rollout_ref.actor.strategy=fsdp2")
    code, lines = started(composed(*head, "hapo.kernels.memory_gib=0.1"), capsys)
    assert (code, lines) == (
        2,
        [
            "hapo.kernels.memory_gib=0.1: a head of 100000 tokens and 1024 hidden units needs 0.58 GiB or more. "
            "Use hapo.kernels.memory_gib=0.58 or more, or null."
        ],
    )
    assert started(composed(*head, "hapo.kernels.memory_gib=0.58"), capsys) == (None, [])


def test_a_file_that_another_machine_may_have_does_not_end_a_launch_on_a_cluster(
    composed, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    code, lines = started(composed("data.train_files=/no/such.parquet"), capsys)
    assert code is None
    assert lines == [
        "hapo: data.train_files=/no/such.parquet: no such file on this machine. Name local parquet files. "
        "The launch goes on: the trainer may run on another machine."
    ]
    assert started(composed("hapo.gate.threshold=1.5"), capsys) == (2, [SENTENCE])
    # A launch joins a cluster that was started on this machine without an explicit address.
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert started(composed("data.train_files=/no/such.parquet"), capsys)[0] == 2
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").touch()
    assert started(composed("data.train_files=/no/such.parquet"), capsys)[0] is None


def ended(error, config, capsys):
    result = JobReturn(_return_value=error, status=JobStatus.FAILED if error else JobStatus.COMPLETED)
    try:
        Preflight().on_job_end(config, job_return=result)
    except SystemExit as exit_:
        return exit_.code, capsys.readouterr().err
    return None, capsys.readouterr().err


def test_errors_that_only_the_trainer_finds_are_one_sentence_too(composed, capsys):
    config, error = composed(), ConfigError("a sentence. And the fix.")
    through_ray = ray.exceptions.RayTaskError("run", "a traceback", error).as_instanceof_cause()
    assert ended(through_ray, config, capsys) == (2, "a sentence. And the fix.\n")
    assert ended(error, config, capsys) == (2, "a sentence. And the fix.\n")
    assert ended(RewardError("none."), config, capsys) == (2, "none.\n")
    for other in (ValueError("x"), ray.exceptions.RayTaskError("run", "a traceback", ValueError("x"))):
        assert ended(other, config, capsys) == (None, "")
    assert ended(None, config, capsys) == (None, "")


def test_every_job_of_a_sweep_is_checked_and_a_single_run_only_once(composed, capsys, monkeypatch):
    from hydra.types import RunMode

    from hapo_verl.launch import preflight

    config = composed("hapo.gate.threshold=1.5")
    for mode, code in ((RunMode.RUN, None), (RunMode.MULTIRUN, 2)):
        monkeypatch.setattr(preflight.HydraConfig, "get", lambda mode=mode: SimpleNamespace(mode=mode))
        try:
            Preflight().on_job_start(config, task_function=None)
            found = None
        except SystemExit as exit_:
            found = exit_.code
        assert found == code


def test_the_preflight_check_imports_neither_the_trainer_nor_the_engine():
    code = (
        "import sys, verl, hapo_verl.launch.preflight\n"
        "print([name for name in ('verl.trainer.ppo.v1', 'vllm', 'verl.experimental.agent_loop') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
