"""What a launch's loss can teach its model: the demonstrations, scored by the model as it is before training.

A token whose weight is under 1 % of the largest that the loss can give is hardly pushed. One such token that the reward
asks for is enough, and the policy never writes the demonstration (`hapo_verl/algo/THEORY.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hapo_verl.algo.policy_loss import DemonstrationShape

# Of the largest weight: below it a token counts as not taught.
LEAST_WEIGHT = 0.01


class Scored(NamedTuple):
    """A demonstration under the model: log-probabilities of the tokens that train, nats, and the tokens' ids."""

    logp: Tensor
    tokens: Tensor


@torch.no_grad()
def score(
    model_path: Path, prompts: Sequence[Sequence[int]], responses: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Scored]:
    """Demonstrations under the model on disk, on a GPU where one is visible; progress on standard error.

    Args:
        model_path: folder of a Hugging Face causal language model.
        prompts: token ids of each prompt, generation prompt included.
        responses: token ids of each demonstration, and its mask, 1 on the tokens that train.
    """
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    model = loaded.to(device).eval()
    scored = []
    for prompt, (response, mask) in tqdm(
        list(zip(prompts, responses, strict=True)), desc="scoring demonstrations", unit="row", leave=False
    ):
        ids = torch.tensor([[*prompt, *response]], device=device)
        # What predicts the response's tokens, and no logits of the prompt.
        logits_TV = model(ids, use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1].float()
        token_T = ids[0, len(prompt) :]
        logp_T = logits_TV.log_softmax(-1).gather(-1, token_T.unsqueeze(-1))[:, 0]
        keep_T = torch.tensor(mask, device=device).bool()
        scored.append(Scored(logp_T[keep_T].cpu(), token_T[keep_T].cpu()))
    return scored


def untaught(scored: Sequence[Scored], shape: DemonstrationShape) -> list[bool]:
    """Of each demonstration, whether it has a token that the loss hardly pushes."""
    least = LEAST_WEIGHT * shape.largest_weight
    return [bool((shape.weight(of.logp) < least).any()) for of in scored]


def least_likely(scored: Sequence[Scored]) -> tuple[float, int]:
    """The least probability of a demonstration's token, median over demonstrations, and the token's id there."""
    least = sorted((of.logp.min().item(), int(of.tokens[of.logp.argmin()])) for of in scored)
    logp, token = least[len(least) // 2]
    return float(torch.tensor(logp).exp()), token
