"""A language-model head that returns log-probabilities, or the loss, instead of logits; it replaces `lm_head.forward`.

The model's own forward is unchanged and calls `self.lm_head(hidden)`. FSDP2 gathers an untied head just before this
call and frees it just after, so code that reads `lm_head.weight` anywhere else finds a shard.
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

# Settings of Hugging Face models that change the logits after the head; our heads give no logits to change.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "vision_config")


# Marks our heads among the values of verl's key, whose own values are torch, triton and liger.
_PREFIX = "hapo_"
_MEMORY = "hapo_memory_gib"


def choose_head(config: DictConfig, hapo: HapoConfig) -> None:
    """Write `hapo.kernels.head` and `.memory_gib` into the model's configuration, where the engines read them."""
    if hapo.kernels.head != "off":
        block = "actor_rollout_ref.model.fused_kernel_options"
        OmegaConf.update(config, f"{block}.impl_backend", _PREFIX + hapo.kernels.head, force_add=True)
        OmegaConf.update(config, f"{block}.{_MEMORY}", hapo.kernels.memory_gib, force_add=True)


def chosen_head(fused_kernel_options: Mapping[str, Any] | None) -> str | None:
    """The head that `choose_head` wrote; None for verl's own head."""
    backend = str((fused_kernel_options or {}).get("impl_backend"))
    return backend.removeprefix(_PREFIX) if backend.startswith(_PREFIX) else None


def chosen_memory(fused_kernel_options: Mapping[str, Any] | None) -> float | None:
    """The memory budget that `choose_head` wrote, in GiB; None for the default."""
    return (fused_kernel_options or {}).get(_MEMORY)


class Scores(NamedTuple):
    """The head's output instead of logits, for the N flattened positions of the hidden states.

    Flat, because FSDP2 inspects what a module returns and warns about views.
    """

    logp: Tensor  # (N,) nats; 0 on positions that are not scored
    entropy: Tensor  # (N,) nats; 0 on positions that are not scored, and everywhere if it was not asked for


# Hidden states (..., H), weight (V, H), bias (V,) → the value of `logits` in the model's output.
Score = Callable[[Tensor, Tensor, "Tensor | None"], Any]


class Head:
    """The forward of an `lm_head`: calls `score` if it is set, else computes the logits.

    Attributes:
        score: set before a forward pass of the model and reset to None after it.
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
        # The dtype in which a Linear would multiply; inside, the head follows its own precision rules.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return self.score(hidden.to(dtype), linear.weight.to(dtype), bias)


def install(model: nn.Module) -> Head:
    """Replace the forward of the `lm_head` of a Hugging Face causal language model, PEFT-wrapped or not, by a `Head`.

    Raises:
        ConfigError: if the model's head is not a plain Linear, or the model changes its logits after the head.
    """
    config: Any = model.config
    for name in _AFTER_THE_HEAD:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"hapo.kernels.head: {type(model).__name__} with {name}={getattr(config, name)} changes its "
                "logits after the head, or takes images. Use hapo.kernels.head=off."
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
    """A `Score` that computes the log-probability of each label, and the entropy, from hidden states.

    Args:
        label_N: (N,) int64, one for each flattened position of the hidden states; -100 is not scored.
        temperature_N: (N,) > 0, one for each position.
        with_entropy: whether to compute the entropy.
        kept_rows: how many labels are scored, if known without waiting for the device.
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
    """A `Score` that computes the HAPO loss of the rows' tokens.

    Args:
        label_N, temperature_N: as for `logprob_score`.
        position_BT: (B, T) int64, which of the N positions predicts each token; any position where the mask is 0.
        terms: the arguments of `hapo_policy_head` that do not come from the model.
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
