"""Memory that the language-model head adds to a training step on one rank, in bytes, estimated from sizes alone.

With N tokens at a time, H hidden units, a vocabulary of V, and bf16 multiplications:

    verl's own        2NV                the logits, bf16; flash-attn's cross-entropy writes their gradient over them
                    + 2NV                their copy, where the temperature is not 1
                    + 2VH                the head's gradient
    linear_logprob    2NH + 4VH          the hidden states' gradient, and the head's, summed in fp32
                    + 8RV + 2CV + ...    two chunks of logits of R rows, C collected rows of their gradient;
                      or 2VH             where it is more: the head's gradient as it is handed on, behind the chunks
    policy_head       2NH + 4VH          both are kept from the forward pass to the backward pass
                    + 8RV + 2CV + ...
                      or 2NH + 2VH       where it is more: both, times the loss's upstream gradient

The chunks are `hapo_kernels.memory`'s, and `hapo.kernels.memory_gib` is what they and the head's gradient may take: all
but the terms with N. The hidden states and the gathered head itself (2VH) are there in any case. A lower bound for
verl's own: without flash-attn, or with an entropy term, it is more. Qwen2.5 of 7B, V = 152,064, H = 3,584, at N =
16,384, R = 1,024 and C = 4,096, in GiB: 4.64 + 1.02 = 5.66 for verl's own at temperature 1, and 0.11 + 2.03 + 2.35 =
4.49 for both of ours. With hapo.kernels.memory_gib=3.1, R is 512 and C 1,024, which take 0.88; what is handed on is
more: 0.11 + 2.03 + 1.02 = 3.15 for linear_logprob, and 0.11 + 2.03 + 1.12 = 3.26 for policy_head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hapo_kernels.memory import Rows, chunks_bytes, head_bytes, least_gib, rows_of, rows_within
from hapo_verl.config import ConfigError, HapoConfig

GIB = 2**30


def verl_head_bytes(tokens: int, hidden: int, vocabulary: int, *, temperature: float) -> int:
    """Of verl's own head, at least."""
    copies = 1 if temperature == 1.0 else 2
    return 2 * copies * tokens * vocabulary + 2 * vocabulary * hidden


def linear_logprob_bytes(tokens: int, hidden: int, vocabulary: int, *, rows: Rows) -> int:
    """Of `hapo.kernels.head=linear_logprob`, in pieces of `rows`."""
    return head_bytes(rows, vocabulary, hidden) + 2 * tokens * hidden


def policy_head_bytes(tokens: int, hidden: int, vocabulary: int, *, rows: Rows) -> int:
    """Of `hapo.kernels.head=policy_head`, in pieces of `rows`."""
    handed_on = 2 * tokens * hidden + 2 * vocabulary * hidden
    return 2 * tokens * hidden + 4 * vocabulary * hidden + max(chunks_bytes(rows, vocabulary, hidden), handed_on)


def rows_of_launch(hapo: HapoConfig, hidden: int, vocabulary: int) -> Rows:
    """The pieces in which a head of ours will take its rows.

    Raises:
        ConfigError: where `hapo.kernels.memory_gib` is too small for any.
    """
    budget = hapo.kernels.memory_gib
    if budget is None:
        return rows_of(vocabulary)
    try:
        return rows_within(budget, vocabulary, hidden)
    except ValueError as error:
        least = least_gib(vocabulary, hidden)
        raise ConfigError(
            f"hapo.kernels.memory_gib={budget}: a head of {vocabulary} tokens and {hidden} hidden units needs {least} "
            f"GiB at the least. Use hapo.kernels.memory_gib={least} or more, or null."
        ) from error


def check_memory(config: DictConfig, hapo: HapoConfig) -> None:
    """Refuse a budget that is too small for the model's head, where the model is on this machine."""
    if hapo.kernels.memory_gib is None:
        return
    sizes = _sizes(Path(str(OmegaConf.select(config, "actor_rollout_ref.model.path"))).expanduser())
    if sizes is not None:
        rows_of_launch(hapo, *sizes)


def _sizes(folder: Path) -> tuple[int, int] | None:
    """Hidden units and vocabulary of a model; None where its configuration is not there, or does not say."""
    try:
        model: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    for block in (model, model.get("text_config") or {}):
        hidden, vocabulary = block.get("hidden_size"), block.get("vocab_size")
        if isinstance(hidden, int) and isinstance(vocabulary, int):
            return hidden, vocabulary
    return None
