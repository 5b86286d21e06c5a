"""The terms of a policy loss, as frozen dataclasses, and its results; the equations are in `hapo_kernels.policy_loss`.

The reference, the kernel and `policy_head` all use them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

AGGREGATION_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
SHAPES = ("power", "trsft", "chord")
KL_KINDS = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl")


@dataclass(frozen=True)
class Clip:
    """The clip range of the ratio ρ = π/π_old of on-policy tokens.

    low: ρ is clipped below at 1 - low; `inf` never clips.
    high: ρ is clipped above at 1 + high; `inf` never clips.
    dual: for A < 0 the loss is at most -A·dual (arXiv 1912.09729). Greater than 1; `inf` sets no bound.
    """

    low: float
    high: float
    dual: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"clip.{name}={getattr(self, name)}: a clip range is at least 0. Use inf to switch it off."
                )
        if not self.dual > 1:
            raise ValueError(f"clip.dual={self.dual}: the dual clip is greater than 1. Use inf to switch it off.")


@dataclass(frozen=True)
class Teacher:
    """The rows whose tokens come from a teacher, and the weight ∂F/∂log q of a token of probability q.

    row_B: (B,) bool, True on a teacher row.
    shaping: λ > 0.
    logp_BT: (B, T) log π_teacher of the tokens, nats; None if unknown, which is computed as π_teacher = 1.
    exponent: κ in [0, 1] of the shape `power`; 1 is LUFFY's f(q) = q/(q+λ), 0 is log f.
    shape: the weight. `power`: λq^κ/(q+λ)^(κ+1), or q^κ if λ = inf; `trsft`: min(q/λ, 1); `chord`: q(1-q).
    """

    row_B: Tensor
    shaping: float
    logp_BT: Tensor | None = None
    exponent: float = 1.0
    shape: str = "power"

    def __post_init__(self) -> None:
        if not self.shaping > 0:
            raise ValueError(f"teacher.shaping={self.shaping}: λ of q/(q+λ) is positive. LUFFY uses 0.1.")
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"teacher.exponent={self.exponent}: κ lies in [0, 1]. LUFFY's f(q) is 1, log f(q) is 0.")
        if self.shape not in SHAPES:
            raise ValueError(f"teacher.shape={self.shape!r}: no such shape. Use one of {', '.join(SHAPES)}.")
        if self.shape == "trsft" and self.shaping == math.inf:
            raise ValueError("teacher.shaping=inf with teacher.shape='trsft': min(q/λ, 1) would be 0. Use a finite λ.")

    @property
    def largest_weight(self) -> float:
        """The largest weight ∂F/∂log q over q in (0, 1]; for `power` it is at q = κλ, or at q = 1 if κλ > 1."""
        if self.shape != "power":
            return 1.0 if self.shape == "trsft" else 0.25
        if self.exponent == 0 or self.shaping == math.inf:
            return 1.0
        q = min(1.0, self.exponent * self.shaping)
        return self.shaping * q**self.exponent / (q + self.shaping) ** (self.exponent + 1)


@dataclass(frozen=True)
class KLPenalty:
    """The penalty coefficient · KL(π || π_ref), estimated for each on-policy token.

    reference_logp_BT: (B, T) log π_ref of the tokens, nats.
    kind: verl's `kl_loss_type`: k1 (kl), abs, k2 (mse), k3 (low_var_kl). With a trailing + the gradient is k2's, and
    the value is unchanged.
    """

    reference_logp_BT: Tensor
    kind: str
    coefficient: float

    def __post_init__(self) -> None:
        if self.kind.removesuffix("+") not in KL_KINDS:
            raise ValueError(
                f"kl.kind={self.kind!r}: no such estimator. Use one of {', '.join(KL_KINDS)}, with or without +."
            )


@dataclass(frozen=True)
class EntropyBonus:
    """The term - coefficient · H(π) of every token, with entropies (B, T). With coefficient 0 it is only measured."""

    entropy_BT: Tensor
    coefficient: float


@dataclass(frozen=True)
class Aggregation:
    """How token losses become one number: verl's `loss_agg_mode` with the normalisers of the global batch.

    mode                       Σ over the micro-batch of
    token-mean                 token losses · dp_size / batch_num_tokens
    token-sum                  token losses · dp_size
    seq-mean-token-sum         row sums · dp_size / global_batch_size
    seq-mean-token-sum-norm    row sums · dp_size / (global_batch_size · loss_scale_factor)
    seq-mean-token-mean        row means · dp_size / global_batch_size

    A normaliser that is None is counted in the micro-batch: rows with at least one active token, active tokens, and T
    for loss_scale_factor. The loss then depends on how a batch is divided into micro-batches (and on padding, with T).
    The fields after `mode` are verl's `global_batch_info`: `Aggregation(mode, **config.global_batch_info)`.
    """

    mode: str
    dp_size: int = 1
    batch_num_tokens: int | Tensor | None = None
    global_batch_size: int | Tensor | None = None
    loss_scale_factor: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in AGGREGATION_MODES:
            raise ValueError(
                f"aggregation.mode={self.mode!r}: no such mode. Use one of {', '.join(AGGREGATION_MODES)}."
            )
        if self.dp_size > 1 and self.mode != "token-sum":
            key = "batch_num_tokens" if self.mode == "token-mean" else "global_batch_size"
            if getattr(self, key) is None:
                raise ValueError(
                    f"aggregation.{key}=None with dp_size={self.dp_size}: a rank cannot count the tokens or rows of "
                    f"the others. Pass the global {key}."
                )


class PolicyLossMetrics(NamedTuple):
    """Metrics of a policy loss: 0-d fp32 tensors without gradient (fp64 for fp64 input), all sums over the micro-batch.

    Losses are already divided by the global normaliser, so add them up over micro-batches. For a mean over tokens, add
    up a sum and its count over micro-batches, then divide.
    """

    on_policy_loss: (
        Tensor  # the aggregated loss of the on-policy tokens; with teacher_loss, the policy part of the loss
    )
    teacher_loss: Tensor  # the aggregated loss of the teacher tokens
    kl_loss: Tensor  # aggregated, before its coefficient; 0 without a KL term
    entropy: Tensor  # aggregated, before its coefficient; 0 without an entropy term
    on_policy_tokens: Tensor  # count
    teacher_tokens: Tensor  # count
    clipped_tokens: Tensor  # count of on-policy tokens that the clip holds; / on_policy_tokens = verl's pg_clipfrac
    dual_clipped_tokens: Tensor  # the same for the dual clip; verl's pg_clipfrac_lower
    log_ratio_sum: Tensor  # Σ log(π_old/π), on-policy; / on_policy_tokens = verl's ppo_kl
    teacher_probability_sum: Tensor  # Σ π(token), teacher tokens


class PolicyLoss(NamedTuple):
    """The result of the policy loss."""

    loss: Tensor  # 0-d, differentiable with respect to policy_logp_BT and entropy_BT
    metrics: PolicyLossMetrics
