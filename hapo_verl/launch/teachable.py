"""Scores demonstrations with the model before training, to find those that the launch's loss cannot teach.

`hapo_verl.algo.teachability` defines which tokens a loss leaves untaught, and what that means for a demonstration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows of logits converted to fp32 at a time: all those of a long response could take gigabytes.
ROWS = 1024


class Asked(NamedTuple):
    """A demonstration to be scored by the model.

    Attributes:
        prompt: token ids of the prompt, generation prompt included.
        response: token ids of the response.
        mask: for each token of the response, 1 if it trains.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    mask: Sequence[int]


class Scored(NamedTuple):
    """A scored demonstration: log-probabilities (nats) of the tokens that train, and the ids of these tokens."""

    logp: Tensor
    tokens: Tensor


def does_not_fit(model_path: Path) -> str:
    """The reason why the model does not fit into this machine's memory; an empty string if it fits."""
    weights = sum(file.stat().st_size for suffix in ("safetensors", "bin") for file in model_path.glob(f"*.{suffix}"))
    if torch.cuda.is_available():
        free, kind = torch.cuda.mem_get_info()[0], "GPU memory"
    else:
        import psutil

        free, kind = psutil.virtual_memory().available, "memory"
    # A fifth more than the weights, for the activations and logits of one row.
    return (
        f"{weights / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB of {kind} free" if 1.2 * weights > free else ""
    )


@torch.no_grad()
def score(
    model_path: Path, demonstrations: Sequence[Asked], *, temperature: float, seconds: float, trust_remote_code: bool
) -> list[Scored]:
    """Score demonstrations with a model on disk, on a GPU if there is one; shows progress on standard error.

    Args:
        model_path: folder of a Hugging Face causal language model.
        demonstrations: the demonstrations, at least one.
        temperature: temperature of the run's rollouts, by which the actor divides its logits; > 0.
        seconds: time limit, not counting the loading of the model; after it no further demonstration is started. The
            first one is always scored.
        trust_remote_code: as in the launch.

    Returns:
        The scored demonstrations, fewer than given if the time ran out.
    """
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto", trust_remote_code=trust_remote_code)
    model, scored, begun = loaded.to(device).eval(), [], time.monotonic()
    for prompt, response, mask in tqdm(demonstrations, desc="scoring demonstrations", unit="row", leave=False):
        if scored and time.monotonic() - begun > seconds:
            break
        ids = torch.tensor([[*prompt, *response]], device=device)
        # Only the positions that predict the response's tokens; no other logits of the prompt.
        logits_TV = model(ids, use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1]
        token_T = ids[0, len(prompt) :]
        logp_T = torch.cat(
            [
                (part.float() / temperature).log_softmax(-1).gather(-1, token.unsqueeze(-1))[:, 0]
                for part, token in zip(logits_TV.split(ROWS), token_T.split(ROWS), strict=True)
            ]
        )
        keep_T = torch.tensor(mask, device=device).bool()
        scored.append(Scored(logp_T[keep_T].cpu(), token_T[keep_T].cpu()))
    return scored


def untaught(scored: Sequence[Scored], below: float) -> int:
    """The number of demonstrations with a token whose log-probability (nats) is below this bound."""
    return sum(bool((of.logp < below).any()) for of in scored)


def least_likely(scored: Sequence[Scored]) -> tuple[float, int]:
    """The median over demonstrations of the lowest log-probability (nats) of a token, and the id of that token."""
    least = [(of.logp.min().item(), int(of.tokens[of.logp.argmin()])) for of in scored]
    return sorted(least)[(len(least) - 1) // 2]
