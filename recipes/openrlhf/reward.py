"""1 for an answer whose last number, behind ####, is the label: GSM8K's form."""

import re

import torch

ANSWER = re.compile(r"####\s*(-?[\d,.]+)")


def reward_func(queries, prompts, labels, **_):
    """As OpenRLHF calls it: texts of prompt and answer, prompts, labels; one row a call."""
    found = [ANSWER.findall(query[len(prompt) :]) for query, prompt in zip(queries, prompts, strict=True)]
    numbers = [answers[-1].replace(",", "").rstrip(".") if answers else None for answers in found]
    reward = torch.tensor([float(n == label.replace(",", "")) for n, label in zip(numbers, labels, strict=True)])
    return {"rewards": reward, "scores": reward}
