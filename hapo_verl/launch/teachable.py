"""What a launch's loss can teach, and its model: the demonstrations, scored by the model as it is before training.

`hapo_verl.algo.teachability` says what a token is that a loss leaves untaught, and what becomes of its demonstration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Logits that are turned into fp32 at a time: a long response over a large vocabulary has gigabytes of them.
ROWS = 1024


class Asked(NamedTuple):
    """A demonstration as the model is asked for it.

    Attributes:
        prompt: token ids, generation prompt included.
        response: token ids.
        mask: 1 on the response's tokens that train.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    mask: Sequence[int]


class Scored(NamedTuple):
    """A demonstration under the model: log-probabilities of the tokens that train, nats, and the tokens' ids."""

    logp: Tensor
    tokens: Tensor


def does_not_fit(model_path: Path) -> str:
    """Why the model is not to be loaded on this machine; an empty string where it is."""
    weights = sum(file.stat().st_size for suffix in ("safetensors", "bin") for file in model_path.glob(f"*.{suffix}"))
    if torch.cuda.is_available():
        free, kind = torch.cuda.mem_get_info()[0], "GPU memory"
    else:
        import psutil

        free, kind = psutil.virtual_memory().available, "memory"
    # Beside the weights there are the activations and logits of one row.
    return (
        f"{weights / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB of {kind} free" if 1.2 * weights > free else ""
    )


@torch.no_grad()
def score(
    model_path: Path, demonstrations: Sequence[Asked], *, temperature: float, seconds: float, trust_remote_code: bool
) -> list[Scored]:
    """Demonstrations under the model on disk, on a GPU where one is visible; progress on standard error.

    Args:
        model_path: folder of a Hugging Face causal language model.
        demonstrations: at least one.
        temperature: of the run's rollouts, by which the actor divides its logits; > 0.
        seconds: no further demonstration is begun after this time, loading left out; one is always scored.
        trust_remote_code: as in the launch.
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
        # What predicts the response's tokens, and no logits of the prompt.
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
    """How many demonstrations have a token with a log-probability below this bound, nats."""
    return sum(bool((of.logp < below).any()) for of in scored)


def least_likely(scored: Sequence[Scored]) -> tuple[float, int]:
    """A demonstration's least log-probability, nats, the median over demonstrations, and the id of its token."""
    least = [(of.logp.min().item(), int(of.tokens[of.logp.argmin()])) for of in scored]
    return sorted(least)[(len(least) - 1) // 2]
