"""A language-model head that hands out log-probabilities instead of logits, in the place of `lm_head.forward`.

The model's own forward stays as it is and calls `self.lm_head(hidden)`. FSDP2 gathers an untied head in front of
exactly that call and frees it behind, so whoever reads `lm_head.weight` anywhere else finds a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hapo_kernels.linear_logprob import linear_logprob
from hapo_verl.algo.policy_loss import PolicyHead, hapo_policy_head
from hapo_verl.config import ConfigError, HapoConfig

# Settings of Hugging Face models that change logits behind the head; ours has no logits to change.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "vision_config")


# Marks our heads among the values of verl's key, which knows torch, triton and liger.
_PREFIX = "hapo_"
_MEMORY = "hapo_memory_gib"


def choose_head(config: DictConfig, hapo: HapoConfig) -> None:
    """Write `hapo.kernels.head` and `.memory_gib` where the engines of actor and reference model find them."""
    if hapo.kernels.head != "off":
        block = "actor_rollout_ref.model.fused_kernel_options"
        OmegaConf.update(config, f"{block}.impl_backend", _PREFIX + hapo.kernels.head, force_add=True)
        OmegaConf.update(config, f"{block}.{_MEMORY}", hapo.kernels.memory_gib, force_add=True)


def chosen_head(fused_kernel_options: Mapping[str, Any] | None) -> str | None:
    """The head that `choose_head` wrote; None where verl's own is to run."""
    backend = str((fused_kernel_options or {}).get("impl_backend"))
    return backend.removeprefix(_PREFIX) if backend.startswith(_PREFIX) else None


def chosen_memory(fused_kernel_options: Mapping[str, Any] | None) -> float | None:
    """The budget that `choose_head` wrote, in GiB."""
    return (fused_kernel_options or {}).get(_MEMORY)


class Scores(NamedTuple):
    """What takes the place of logits, for the N positions of the hidden states, flattened.

    Flat because FSDP2 watches what a module returns, and warns of views.
    """

    logp: Tensor  # nats; 0 on positions that are not scored
    entropy: Tensor  # nats; 0 on positions that are not scored, and everywhere if it was not asked for


# From hidden states (..., H), weight (V, H) and bias (V,) to what the model's output carries as `logits`.
Score = Callable[[Tensor, Tensor, "Tensor | None"], Any]


class Head:
    """The forward of an `lm_head`: `score` where one is set, else the logits.

    Attributes:
        score: set before a forward pass of the model, taken away behind it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.score: Score | None = None
        self._linear = linear

    def __call__(self, hidden: Tensor) -> Any:
        linear = self._linear
        if self.score is None:
            return nn.functional.linear(hidden, linear.weight, linear.bias)
        if isinstance(linear.weight, DTensor):
            raise RuntimeError(
                "hapo.kernels.head: lm_head.weight is sharded where the head runs (tensor parallelism). "
                "Use hapo.kernels.head=off."
            )
        # What a Linear would multiply in; the head's own precision rules hold from there on.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return self.score(hidden.to(dtype), linear.weight.to(dtype), bias)


def install(model: nn.Module) -> Head:
    """Put a `Head` before the `lm_head` of a Hugging Face causal language model, PEFT-wrapped or not.

    Raises:
        ConfigError: where the model's head is not one matrix, or its logits are changed behind the head.
    """
    config: Any = model.config
    for name in _AFTER_THE_HEAD:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"hapo.kernels.head: {type(model).__name__} with {name}={getattr(config, name)} changes its logits "
                "behind the head, or has images in front of it. Use hapo.kernels.head=off."
            )
    linear = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]  Hugging Face's door to the head
    if type(linear) is not nn.Linear:
        kind = f"{type(linear).__module__}.{type(linear).__name__}"
        raise ConfigError(
            f"hapo.kernels.head: lm_head is a {kind}; a plain Linear is needed. "
            "Leave lm_head out of actor_rollout_ref.model.target_modules, or use hapo.kernels.head=off."
        )
    head = Head(linear)
    linear.forward = head  # pyright: ignore[reportAttributeAccessIssue]  it may return more than a tensor
    return head


def logprob_score(
    label_N: Tensor,
    temperature_N: Tensor,
    *,
    with_entropy: bool,
    kept_rows: int | None = None,
    memory_gib: float | None = None,
) -> Score:
    """Log-probability of each label, and entropy, straight from hidden states.

    Args:
        label_N: int64, one for each position of the hidden states, flattened; -100 is not scored.
        temperature_N: > 0, likewise.
        with_entropy: also the entropy.
        kept_rows: how many labels are scored, where that is known without asking the device.
        memory_gib: `hapo.kernels.memory_gib`.
    """

    def score(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Scores:
        return Scores(
            *linear_logprob(
                hidden.flatten(0, -2),
                weight_VH,
                label_N,
                bias_V=bias_V,
                temperature=temperature_N,
                with_entropy=with_entropy,
                kept_rows=kept_rows,
                memory_gib=memory_gib,
            )
        )

    return score


def policy_score(label_N: Tensor, temperature_N: Tensor, position_BT: Tensor, terms: Mapping[str, Any]) -> Score:
    """The HAPO loss of the rows' tokens, in the place of logits.

    Args:
        label_N, temperature_N: as for `logprob_score`.
        position_BT: int64, which of the N positions predicts a row's token; any where the mask is 0.
        terms: arguments of `hapo_policy_head` that do not come from the model.
    """

    def score(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> PolicyHead:
        return hapo_policy_head(
            hidden.flatten(0, -2)[position_BT],
            weight_VH,
            label_N[position_BT],
            bias_V=bias_V,
            temperature=temperature_N[position_BT],
            **terms,
        )

    return score
