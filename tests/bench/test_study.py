"""The study's methods are the presets: its settings of the plain loop equal those of the presets in verl."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hapo_verl.config import HapoConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from study import (
    COLUMNS,
    LANGUAGE_METHODS,
    LANGUAGE_TASKS,
    METHODS,
    TASKS,
    Run,
    Settings,
    gate_runs,
    language_runs,
    method_runs,
)


@pytest.mark.parametrize("name", [*METHODS, "chord", "s_grpo"])
def test_a_method_of_the_study_is_the_preset_of_its_name(launch, name):
    config = launch(preset=[f"+hapo={name}"])
    hapo = HapoConfig.parse({str(key): value for key, value in config.hapo.items()})
    settings, actor = Settings(**LANGUAGE_METHODS[name]), config.actor_rollout_ref.actor
    assert settings.gate == hapo.gate.name
    assert settings.mode == hapo.injection.mode
    assert settings.statistics == (hapo.advantage.statistics or "")
    assert settings.objective == hapo.objective.name
    assert settings.clip == hapo.loss.clip
    assert settings.shaping == hapo.loss.shaping
    assert settings.exponent == hapo.loss.exponent
    assert settings.shape == hapo.loss.shape
    assert settings.scale_by_std == config.algorithm.norm_adv_by_std_in_grpo
    assert settings.aggregation == actor.loss_agg_mode
    assert settings.entropy == actor.entropy_coeff
    assert settings.filter_groups == bool(config.algorithm.filter_groups.enable)
    assert not actor.use_kl_loss


def test_every_run_has_a_name_of_its_own():
    language = language_runs(LANGUAGE_TASKS, 3, (5e-5, 1e-4))
    for runs in (gate_runs(TASKS, 5), method_runs(["never", "rarely", "sometimes"], 3), language):
        assert len({run.name for run in runs}) == len(runs)


def test_tokens_are_counted_up_to_the_step_at_which_success_is_measured():
    history = {"generated_tokens": [(1, 7), (2, 5), (3, 3), (4, 1)], "heldout_success": [(2, 0.5), (3, 0.9), (4, 0.4)]}
    measure = COLUMNS["methods"]["tokens to .9"]
    assert measure({"history": history}) == 7 + 5 + 3
    never = measure({"history": history | {"heldout_success": [(2, 0.5), (4, 0.89)]}})
    assert never != never


def test_tokens_and_seconds_of_the_language_study_are_counted_up_to_half_of_the_problems():
    history = {"generated_tokens": [(1, 7), (2, 5), (3, 3), (4, 1)], "heldout_success": [(0, 0.0), (2, 0.5), (4, 0.9)]}
    record = {"history": history, "seconds": 200.0, "settings": {"steps": 4}}
    assert COLUMNS["language"]["tokens to .5"](record) == 7 + 5
    assert COLUMNS["language"]["seconds to .5, about"](record) == 100.0


def test_a_run_with_another_model_or_device_has_another_name():
    settings = [Settings(), Settings(model="/models/Qwen3-0.6B"), Settings(device="cuda"), Settings(seed=1)]
    assert len({Run("words", "plus 1e-4", of).name for of in settings}) == 4


def test_the_runs_in_verls_trainer_train_on_digits(monkeypatch, tmp_path):
    import study

    asked = []

    def run(command, check):
        asked.append(command[command.index("--task") + 1])
        folder = Path(command[command.index("--output") + 1]) / "run"
        folder.mkdir()
        (folder / "result.json").write_text("{}")

    monkeypatch.setattr(study.subprocess, "run", run)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    (tmp_path / "quickstart").mkdir()
    study.train_in_verl(1)
    assert asked == ["digits"] * len(study.TRAINER)


def test_samples_are_two_answers_to_each_problem_of_the_main_set():
    from elsewhere import sampled_success  # study has put its folder on the path

    asked = []

    class Policy:
        model = SimpleNamespace(device="cpu")
        task = SimpleNamespace(heldout={"heldout_success": ["a", "b"], "new_templates_success": ["c"]})

        def rollouts(self, problems, counts, generator):
            asked.append((problems, counts, generator.initial_seed()))
            return SimpleNamespace(score_B=torch.tensor([1.0, 0.0, 0.0, 0.0]))

    assert sampled_success(Policy()) == 0.25
    assert asked == [(["a", "b"], [2, 2], 0)]
