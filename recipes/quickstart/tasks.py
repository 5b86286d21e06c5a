"""The tasks of the quickstart: each writes its data and model, and gives the settings that it needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import digits
import gsm8k
import smollm2
import tiny_model
import word_problems

HERE = Path(__file__).parent
PROMPTS = 8  # prompts per step of the language model
# Compute logits of trained tokens only: the head has a fifth of the parameters, and prompts are longer than answers.
LANGUAGE_HAPO = {"hapo.kernels.head": "linear_logprob"}
# The language model's matrix products gain from one thread per core; the tiny model's do not.
LANGUAGE_ENVIRONMENT = {
    "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1)),
    # Waiting threads sleep; on a busy machine spinning threads would keep others from their core.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A run has a dozen processes with many threads, and glibc would keep memory for each thread.
    "MALLOC_ARENA_MAX": "2",
}


class Prepared(NamedTuple):
    """A task whose files have been written.

    Attributes:
        title: title of the table and the picture.
        data_source: data source of the main held-out problems, as in verl's metric names.
        more: label → data source of further held-out problems.
        settings: changes to config.yaml.
        environment: environment variables of the trainer's processes, beside `cpu_environment`.
        hapo: keys of HAPO, used only with HAPO's trainer.
    """

    title: str
    data_source: str
    more: dict[str, str]
    settings: dict[str, Any]
    environment: dict[str, str]
    hapo: dict[str, Any]


class Task(NamedTuple):
    """A task: the number of steps of each preset (key `""`: all others), and the function that writes its files."""

    steps: dict[str, int]
    prepare: Callable[[Path, int, int, Any], Prepared]


def files(folder: Path, model: Path, reward: Path | None, *heldout: str) -> dict[str, Any]:
    """verl's keys for the paths of data, model and reward function."""
    validation = [str(folder / "data" / f"{name}.parquet") for name in heldout]
    paths = {
        "data.train_files": folder / "data" / "train.parquet",
        "data.val_files": validation[0] if len(validation) == 1 else f"[{','.join(validation)}]",
        "actor_rollout_ref.model.path": model,
    }
    if reward is not None:
        paths |= {
            "reward.custom_reward_function.path": reward,
            "reward.custom_reward_function.name": "compute_score",
        }
    return paths


def language_settings() -> dict[str, Any]:
    """The settings for a pretrained model of 135M parameters; bf16 only if this CPU has instructions for it."""
    settings = yaml.safe_load((HERE / "language.yaml").read_text())
    if not smollm2.fast_in_bf16():
        settings |= {
            "actor_rollout_ref.rollout.dtype": "float32",
            "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "fp32",
        }
    return settings


def words(folder: Path, steps: int, seed: int, args: Any) -> Prepared:
    """Prepare word problems for SmolLM2-135M-Instruct."""
    word_problems.write(folder / "data", train=PROMPTS * steps, heldout=args.heldout or 50, seed=seed)
    paths = files(folder, smollm2.write(smollm2.CACHE), HERE / "word_problems.py", "heldout", "new_templates")
    lengths = {
        "data.max_prompt_length": word_problems.PROMPT_TOKENS,
        "data.max_response_length": word_problems.RESPONSE_TOKENS,
    }
    return Prepared(
        "word problems, SmolLM2-135M-Instruct",
        f"{word_problems.DATA_SOURCE}_heldout",
        {"held-out success, new templates": f"{word_problems.DATA_SOURCE}_new_templates"},
        language_settings() | lengths | paths,
        LANGUAGE_ENVIRONMENT,
        LANGUAGE_HAPO,
    )


def reversed_digits(folder: Path, steps: int, seed: int, args: Any) -> Prepared:
    """Prepare digits to reverse for a random tiny model."""
    digits.write(folder / "data", digits=args.digits, train=16 * steps, heldout=args.heldout or 100, seed=seed)
    tiny_model.write(folder / "model", alphabet="0123456789", hidden=128, layers=2, seed=seed)
    paths = files(folder, folder / "model", HERE / "digits.py", "heldout")
    # The answer and its end of sequence; a higher limit would only slow down learning.
    settings = {"data.max_response_length": args.digits + 1} | paths
    return Prepared(f"reverse {args.digits} digits", digits.DATA_SOURCE, {}, settings, {}, {})


def real_word_problems(folder: Path, steps: int, seed: int, args: Any) -> Prepared:
    """Prepare GSM8K's shortest rows for SmolLM2-135M-Instruct."""
    model = smollm2.write(smollm2.CACHE)
    settings = gsm8k.write(folder / "data", args.gsm8k, model)
    paths = files(folder, model, None, "heldout")
    return Prepared(
        "GSM8K, SmolLM2-135M-Instruct",
        gsm8k.GSM8K,
        {},
        language_settings() | settings | paths,
        LANGUAGE_ENVIRONMENT,
        LANGUAGE_HAPO,
    )


TASKS = {
    "words": Task({"": 20}, words),
    # Enough for each preset to learn the digits. luffy and grpo get as many steps as paper, the others as many as plus.
    "digits": Task({"": 120, "paper": 180, "luffy": 180, "grpo": 180}, reversed_digits),
    "gsm8k": Task({"": 3}, real_word_problems),
}
