"""Measures after a training run what the curve of greedy answers does not show: samples, and what changed elsewhere.

sampled    success of two answers at temperature 1 to each held-out problem: what a rollout is worth
KL         mean over tokens of KL(π₀ ‖ π), nats, on 64 prompts that have nothing to do with the task, each with the
           greedy continuation of the initial policy π₀
capitals   share of 40 capitals that the policy can name; the initial policy can answer these questions
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from plain_loop import Policy, Rows, Settings, make_task

OPENINGS = (
    "Write a sentence about",
    "What is special about",
    "Tell a short story about",
    "Explain to a child what is meant by",
    "Give advice on",
    "Write a title for a text about",
    "Name something that goes with",
    "Describe in a few words",
)
SUBJECTS = ("rain", "the sea", "friendship", "a garden", "music", "winter", "bread", "a long journey")
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin",
    "Poland": "Warsaw", "Hungary": "Budapest", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires", "Kenya": "Nairobi",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "India": "New Delhi", "Canada": "Ottawa", "Australia": "Canberra",
    "Belgium": "Brussels", "South Korea": "Seoul", "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Indonesia": "Jakarta", "Philippines": "Manila", "Lebanon": "Beirut", "England": "London",
}  # fmt: skip
TOKENS = 24


@torch.no_grad()
def divergence(initial: Policy, policy: Policy) -> float:
    """Mean over tokens of KL(π₀ ‖ π), nats, on the initial policy's own continuations of neutral prompts."""
    prompts = [f"{opening} {subject}." for opening, subject in itertools.product(OPENINGS, SUBJECTS)]
    total, tokens = 0.0, 0
    # A few prompts at a time, since each token has a distribution over 49,152 tokens.
    for first in range(0, len(prompts), 16):
        prompt_BS, prompt_mask_BS = initial.encode(prompts[first : first + 16])
        response_BT, mask_BT = initial.sample(prompt_BS, prompt_mask_BS, None, TOKENS)
        # Scores, groups and the mark of demonstrations are not read.
        rows = Rows(prompt_BS, prompt_mask_BS, response_BT, mask_BT, *[mask_BT[:, 0]] * 3)
        before_BTV, after_BTV = (model.log_probabilities(rows) for model in (initial, policy))
        kl_BT = (before_BTV.exp() * (before_BTV - after_BTV)).sum(-1)
        total, tokens = total + (kl_BT * mask_BT).sum().item(), tokens + int(mask_BT.sum())
    return total / tokens


def capitals(policy: Policy) -> float:
    """The share of capitals that the policy names in its greedy answers."""
    prompts = policy.encode([f"What is the capital of {country}?" for country in CAPITALS])
    texts = policy.texts(*policy.sample(*prompts, None, TOKENS))
    return sum(name in text for name, text in zip(CAPITALS.values(), texts, strict=True)) / len(CAPITALS)


def sampled_success(policy: Policy, samples: int = 2) -> float:
    """The success rate of answers at temperature 1 to the first set of held-out problems."""
    problems = next(iter(policy.task.heldout.values()))
    generator = torch.Generator(policy.model.device).manual_seed(0)
    return policy.rollouts(problems, [samples] * len(problems), generator).score_B.mean().item()


def probe(settings: Settings) -> Any:
    """The `probe` of `plain_loop.train` for a run with these settings."""

    def ask(policy: Policy) -> dict[str, float]:
        initial = Policy.of(settings, make_task(settings))
        return {
            "sampled_success": sampled_success(policy),
            "divergence": divergence(initial, policy),
            "capitals": capitals(policy),
            "capitals_before": capitals(initial),
        }

    return ask
