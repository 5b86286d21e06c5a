"""Estimates the memory in bytes that the language-model head adds to a training step on one rank, from sizes alone.

With N tokens at a time, H hidden units, a vocabulary of V, and bf16 multiplications:

    verl's own        2NV                the logits, bf16; flash-attn's cross-entropy writes their gradient over them
                    + 2NV                a copy of them, unless the temperature is 1
                    + 2VH                the head's gradient
    linear_logprob    2NH + 4VH          the hidden states' gradient, and the head's, summed in fp32
                    + 8RV + 2CV + ...    two chunks of logits of R rows, C collected rows of their gradient;
                      or 2VH             if that is more: the head's gradient in bf16, after the chunks are freed
    policy_head       2NH + 4VH          both gradients are kept from the forward pass to the backward pass
                    + 8RV + 2CV + ...
                      or 2NH + 2VH       if that is more: both gradients, times the loss's upstream gradient

The sizes of the chunks come from `hapo_kernels.memory`. `hapo.kernels.memory_gib` limits the chunks and the head's
gradient together, that is, every term without N. The hidden states and the gathered head itself (2VH) exist in any case
and are not counted. For verl's own head this is a lower bound: without flash-attn, or with an entropy term, it takes
more.

Example in GiB: Qwen2.5 of 7B, V = 152,064, H = 3,584, at N = 16,384, R = 1,024 and C = 4,096. verl's own head takes
4.64 + 1.02 = 5.66 at temperature 1, each of ours 0.11 + 2.03 + 2.35 = 4.49. With hapo.kernels.memory_gib=3.1, R is 512
and C is 1,024, and the chunks take 0.88. The second case is then larger: linear_logprob takes 0.11 + 2.03 + 1.02 =
3.15, policy_head 0.11 + 2.03 + 1.12 = 3.26.
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
    """A lower bound for verl's own head, in bytes."""
    copies = 1 if temperature == 1.0 else 2
    return 2 * copies * tokens * vocabulary + 2 * vocabulary * hidden


def linear_logprob_bytes(tokens: int, hidden: int, vocabulary: int, *, rows: Rows) -> int:
    """The bytes of `hapo.kernels.head=linear_logprob` with chunks of `rows`."""
    return head_bytes(rows, vocabulary, hidden) + 2 * tokens * hidden


def policy_head_bytes(tokens: int, hidden: int, vocabulary: int, *, rows: Rows) -> int:
    """The bytes of `hapo.kernels.head=policy_head` with chunks of `rows`."""
    handed_on = 2 * tokens * hidden + 2 * vocabulary * hidden
    return 2 * tokens * hidden + 4 * vocabulary * hidden + max(chunks_bytes(rows, vocabulary, hidden), handed_on)


def rows_of_launch(hapo: HapoConfig, hidden: int, vocabulary: int) -> Rows:
    """The chunks in which our heads process their rows in this launch.

    Raises:
        ConfigError: if `hapo.kernels.memory_gib` is too small even for the smallest chunks.
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
            f"GiB or more. Use hapo.kernels.memory_gib={least} or more, or null."
        ) from error


def check_memory(config: DictConfig, hapo: HapoConfig) -> None:
    """Raise `ConfigError` if the memory budget is too small for the model's head; skipped for a remote model."""
    if hapo.kernels.memory_gib is None:
        return
    sizes = _sizes(Path(str(OmegaConf.select(config, "actor_rollout_ref.model.path"))).expanduser())
    if sizes is not None:
        rows_of_launch(hapo, *sizes)


def _sizes(folder: Path) -> tuple[int, int] | None:
    """The numbers of hidden units and of vocabulary entries of a model; None if no config.json gives them."""
    try:
        model: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    for block in (model, model.get("text_config") or {}):
        hidden, vocabulary = block.get("hidden_size"), block.get("vocab_size")
        if isinstance(hidden, int) and isinstance(vocabulary, int):
            return hidden, vocabulary
    return None
