"""Fixtures with a tiny model that reverses digits in TRL's trainer; these tests need TRL's environment, see Makefile."""

import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES / "quickstart"), str(RECIPES / "plain_loop")]

PER_GROUP = 4


def reward(completions, answer, **_):
    """The rewards: 1 for exactly the answer, else 0."""
    return [float(completion[0]["content"] == right) for completion, right in zip(completions, answer, strict=True)]


def rows(count=8):
    """Questions of three digits, with solutions."""
    questions = [f"{number:03d}" for number in range(count)]
    return [
        {"prompt": [{"role": "user", "content": q}], "answer": q[::-1], "demonstration": q[::-1]} for q in questions
    ]


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer), a fresh pair each time it is called."""
    import tiny_model

    def make():
        tokenizer = tiny_model.make_tokenizer("0123456789")
        return tiny_model.make_model(tokenizer, hidden=64, layers=2, seed=0), tokenizer

    return make


@pytest.fixture
def settings(tmp_path):
    """The settings of a run that takes a second or two, with two prompts per step."""

    def of(**more):
        values = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2 * PER_GROUP,
            "num_generations": PER_GROUP,
            "max_completion_length": 6,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return {**values, **more}

    return of


@pytest.fixture
def trainer(tiny, settings):
    """A trainer of the tiny model, not yet trained."""

    def of(hapo=None, *, data=None, reward_funcs=reward, **more):
        from datasets import Dataset

        from hapo_verl.trl import HapoGRPOConfig, HapoGRPOTrainer

        extra = {key: more.pop(key) for key in ("peft_config", "tools", "rollout_func") if key in more}
        model, tokenizer = tiny()
        return HapoGRPOTrainer(
            model=model,
            reward_funcs=reward_funcs,
            args=HapoGRPOConfig(hapo=hapo or {}, **settings(**more)),
            train_dataset=Dataset.from_list(rows() if data is None else data),
            processing_class=tokenizer,
            **extra,
        )

    return of
